"""What differs between the releases of transformers that we support (the range is in `pyproject.toml`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import transformers
from packaging.version import Version

if TYPE_CHECKING:
    import torch

_RELEASE = Version(transformers.__version__).release

# The name of the keys and values of past tokens, in what models take and give back.
CACHE = "cache" if _RELEASE >= (5, 24) else "past_key_values"


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
