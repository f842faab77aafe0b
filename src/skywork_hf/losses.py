"""The language-model loss of both families: transformers' own, and a word where that says none."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.utils import logging

logger = logging.get_logger(__name__)

IGNORED = -100  # the label that the loss leaves out

# The getter as a function, since torch.compile follows neither `super().loss_function` nor a property's `fget`.
_loss_function: Callable[[PreTrainedModel], Any] = PreTrainedModel.loss_function.fget  # type: ignore[attr-defined]


class SkyworkLossMixin(PreTrainedModel):
    """The loss of a batch without a target is 0, where a mean over none is NaN and would make all weights NaN. Any
    loss but transformers' language-model loss is left alone: that of other heads, and one that a user sets."""

    @PreTrainedModel.loss_function.getter  # type: ignore[attr-defined]  # the setter stays
    def loss_function(self) -> Any:
        function = _loss_function(self)
        return partial(causal_lm_loss, self.config) if function is ForCausalLMLoss else function


def learns_in_context(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The `forward` of a causal model that leaves out targets with nothing before them: a row's first token behind
    padding, and a text's first token behind another text, where `position_ids` begin anew in packed rows."""
    parameters = list(inspect.signature(forward).parameters.values())[1:]
    names = [parameter.name for parameter in parameters if parameter.kind is not parameter.VAR_KEYWORD]

    @wraps(forward)
    def with_targets_in_context(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = dict(zip(names, args, strict=False)) | kwargs
        if given.get("labels") is None or len(given) < len(args) + len(kwargs):
            return forward(self, *args, **kwargs)  # which refuses what is given twice, or beyond its arguments
        return forward(self, **given | _targets_in_context(**given))

    return with_targets_in_context


def _targets_in_context(
    labels: torch.Tensor,
    attention_mask: Any = None,
    position_ids: torch.Tensor | None = None,
    shift_labels: torch.Tensor | None = None,
    num_items_in_batch: torch.Tensor | int | None = None,
    ignore_index: int = IGNORED,
    **kwargs: Any,
) -> dict[str, Any]:
    """What changes of a loss's arguments. Whoever counted the targets of the step counted those that are left out
    here, too: the count is scaled by the batch's own share, so that the loss of a step is a mean of its batches' means
    where targets were left out, and of all targets where none was."""
    begins = _begins(labels.shape[-1], attention_mask, position_ids)
    if begins is None:
        return {}
    begins = begins.to(labels.device)
    changed: dict[str, Any]
    if shift_labels is None:
        kept = labels[..., 1:].masked_fill(begins, ignore_index)
        changed = {"labels": torch.cat([labels[..., :1], kept], dim=-1)}
    else:
        kept = shift_labels[..., :-1].masked_fill(begins.to(shift_labels.device), ignore_index)
        changed = {"shift_labels": torch.cat([kept, shift_labels[..., -1:]], dim=-1)}
    if num_items_in_batch is not None:
        given = {"labels": labels, "shift_labels": shift_labels, "ignore_index": ignore_index}
        share = target_count(**given | changed) / at_least_one(target_count(**given))  # type: ignore[arg-type]
        changed["num_items_in_batch"] = num_items_in_batch * share.to(
            getattr(num_items_in_batch, "device", share.device)
        )
    return changed


def _begins(length: int, attention_mask: Any, position_ids: torch.Tensor | None) -> torch.Tensor | None:
    """Of all tokens of a row but the first, whether no token of their text stands before them: bool [batch, length -
    1]; None where nothing tells."""
    begins, real = None, None
    if isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2 and attention_mask.shape[1] >= length:
        real = attention_mask[:, -length:].bool()
        begins = real[:, 1:] & ~real[:, :-1]
    if position_ids is not None and position_ids.dim() == 2 and position_ids.shape[1] == length:
        anew = position_ids.diff() <= 0
        begins = anew if real is None or begins is None else begins | (anew & real[:, 1:]).to(begins.device)
    return begins


def causal_lm_loss(
    config: PreTrainedConfig,
    logits: torch.Tensor,
    labels: torch.Tensor,
    vocab_size: int,
    num_items_in_batch: torch.Tensor | int | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """`ForCausalLMLoss`, which sees to it that there is something to divide by. Warns once where rows are longer than
    the model's context, and where there is no target, if that is counted on the CPU.

    Args:
        logits: [batch, tokens, vocab_size].
        labels: int64 [batch, tokens], not shifted; -100, or `ignore_index` in `kwargs`, is no target. `shift_labels`
            in `kwargs` are shifted.
        num_items_in_batch: the targets of the optimiser's step that the batch is a part of; None: the batch's own.

    Returns:
        float32, no dimensions: the sum over the targets by their number; 0 where there is none.
    """
    items = target_count(labels, **kwargs) if num_items_in_batch is None else num_items_in_batch
    if not torch.compiler.is_compiling():
        _warn(items, labels.shape[-1], config)
    return ForCausalLMLoss(logits, labels, vocab_size, at_least_one(items), **kwargs)


def target_count(
    labels: torch.Tensor, shift_labels: torch.Tensor | None = None, ignore_index: int = IGNORED, **kwargs: Any
) -> torch.Tensor:
    """How many tokens a batch is to predict: int64, no dimensions. Takes what else a loss is given, too."""
    return (labels[..., 1:] if shift_labels is None else shift_labels).ne(ignore_index).sum()


def at_least_one(items: torch.Tensor | int) -> Any:
    """A count that can be divided by."""
    return items.clamp_min(1) if isinstance(items, torch.Tensor) else max(items, 1)


def _warn(items: torch.Tensor | int, row_length: int, config: Any) -> None:
    if _is_zero(items):
        logger.warning_once(
            "A step has no token to predict, as all its labels are -100: its loss counts as 0. Look at the data, and "
            "at the length that rows are cut to."
        )
    if row_length > config.max_position_embeddings:
        logger.warning_once(
            f"Rows are longer than max_position_embeddings={config.max_position_embeddings}, beyond which the model "
            "has learnt no positions: cut them, unless they are packed or the positions are scaled."
        )


def _is_zero(items: torch.Tensor | int) -> bool:
    """Whether a count is 0, of which nothing is known where the host would wait for it: on other devices."""
    try:
        return not (isinstance(items, torch.Tensor) and items.device.type != "cpu") and bool(items == 0)
    except RuntimeError:  # a tensor without a value: in `vmap`, while tracing
        return False
