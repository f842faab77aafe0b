"""The language-model loss of both families: transformers' own, and a word where that says none."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
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


def causal_lm_loss(
    config: PreTrainedConfig,
    logits: torch.Tensor,
    labels: torch.Tensor,
    vocab_size: int,
    num_items_in_batch: torch.Tensor | int | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """`ForCausalLMLoss`, which sees to it that there is something to divide by. Warns once where there is no target,
    and where rows are longer than the model's context.

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
    try:
        return bool(items == 0)
    except RuntimeError:  # a tensor without a value: on the meta device, in `vmap`, while tracing
        return False
