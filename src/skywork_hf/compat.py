"""What differs between the releases of transformers that we support (the range is in `pyproject.toml`)."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import transformers
from packaging.version import Version
from tokenizers import normalizers

if TYPE_CHECKING:
    import torch

_RELEASE = Version(transformers.__version__).release

# The name of the keys and values of past tokens, in what models take and give back.
CACHE = "cache" if _RELEASE >= (5, 24) else "past_key_values"


def warns_of_the_old_cache_name(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A `forward` that takes both names, and warns where transformers' own models do."""
    if CACHE != "cache":
        return forward
    from transformers.utils.deprecation import deprecate_kwarg

    return deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")(forward)


def cache_argument(past_key_values: Any, cache: Any) -> dict[str, Any]:
    """What a `forward` that takes both names hands on to transformers' own, which warns of the old one."""
    return {CACHE: past_key_values if cache is None else cache}


def slice_logits_to_keep(hidden_states: torch.Tensor, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
    """Of `hidden_states` [batch, tokens, hidden_size] the tokens that the installed transformers' models would keep:
    the last `logits_to_keep` (all: 0), or those at the positions in a tensor (of two dimensions from 5.20 on)."""
    from transformers import modeling_utils

    if hasattr(modeling_utils, "slice_logits_to_keep"):
        return modeling_utils.slice_logits_to_keep(hidden_states, logits_to_keep)
    return hidden_states[:, slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep]


# Whether tensor parallelism takes a head whose rows the processes do not divide, as those of Skywork's vocabulary; as
# seen in 5.23, and not in 5.19.
SPLITS_UNEVEN_HEADS = _RELEASE >= (5, 23)

# Whether tokenizers' `apply_chat_template` takes `sanitize_control_tokens`, which in 5.19 is a variable of templates.
SANITIZES_CHATS = _RELEASE >= (5, 20)


def reader_of_hidden_names(tokenizer: Any, tokenize: bool) -> tuple[Any, Callable[[str], str]]:
    """A copy of a tokenizer, and a function that hides names of tokens in a text: to the copy they are text."""
    if not tokenize:
        raise ValueError("`sanitize_control_tokens=True` requires `tokenize=True`: a text does not show what is text.")
    mark = "\ufdd0"  # Unicode keeps it free for such uses
    reader = copy.deepcopy(tokenizer)
    # Normalizers come after the search for added tokens.
    steps = [normalizers.Replace(mark, ""), reader.backend_tokenizer.normalizer]
    reader.backend_tokenizer.normalizer = normalizers.Sequence([step for step in steps if step is not None])
    names = re.compile("|".join(map(re.escape, tokenizer.added_tokens_encoder)))
    return reader, lambda text: names.sub(lambda name: mark.join([*name[0], ""]), text)
