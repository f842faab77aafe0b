"""float16 cannot hold what experts may compute: that they overflow is said, and costs no wait of its own."""

from __future__ import annotations

import torch
from transformers.utils import logging

logger = logging.get_logger(__name__)

# A forward that waits for the flag, where nothing else waits.
_EVERY = 256


class OverflowWatch:
    """Says once that float16 overflowed in a layer's experts, in inference: not under autocast or with gradients,
    whose users scale them, nor while a forward is compiled or captured. Other dtypes cost nothing.

    The flag stays on the device. It is read together with something that the host waits for anyway, in the next
    forward (`read_with`); without that, at the first forward and every 256th.
    """

    def __init__(self) -> None:
        self._flag: torch.Tensor | None = None
        self._forwards = 0
        self._has_said = False

    def read_with(self, numbers: torch.Tensor) -> list[int]:
        """`numbers.tolist()`; what `look` found before comes in the same wait.

        Args:
            numbers: int64 [count].
        """
        flag, self._flag = self._flag, None
        if flag is None:
            return numbers.tolist()
        *values, overflowed = torch.cat([numbers, flag.to(numbers)]).tolist()
        if overflowed:
            self._say()
        return values

    def look(self, inputs: torch.Tensor, outputs: torch.Tensor) -> None:
        """Note whether a token went in finite and came out not.

        Args:
            inputs, outputs: [tokens, hidden_size], of the experts.
        """
        if self._has_said or not _is_watched(inputs):
            return
        flag = (_broken(outputs) > _broken(inputs)).any().view(1)
        self._flag = flag if self._flag is None else self._flag.to(flag.device) | flag
        if self._forwards % _EVERY == 0:
            if self._flag.item():
                self._say()
            self._flag = None
        self._forwards += 1

    def _say(self) -> None:
        self._has_said = True
        logger.warning_once(
            "float16 overflowed in the experts: values beyond 65,504 became infinite, and what comes of them is not "
            "the model's. Load it with dtype=torch.bfloat16, or torch.float32."
        )


def _broken(rows: torch.Tensor) -> torch.Tensor:
    """Which rows have a value that is not finite: bool [rows]."""
    return (rows - rows).any(dim=-1)  # NaN, which is not 0; two kernels, where `isfinite` and `all` start six


def _is_watched(inputs: torch.Tensor) -> bool:
    if inputs.dtype is not torch.float16 or torch.is_grad_enabled() or inputs.is_meta:
        return False
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    kind = inputs.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return False
    return not (inputs.is_cuda and torch.cuda.is_current_stream_capturing())
