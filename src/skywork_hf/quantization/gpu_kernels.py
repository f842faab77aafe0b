"""Whether the Triton kernels run on a GPU, and agree there with the reference path: asked once, and said if not."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from transformers.utils import logging

from .cards import TRITON_CAPABILITY, capability

logger = logging.get_logger(__name__)

# Of the norm: a kernel rounds less than the reference path, whose inputs and weights are in 16 bit.
TOLERANCE = 0.02

# The module `triton_kernels`, from the first device on that runs it: read in forwards, where nothing is looked for.
kernels: Any = None


@cache
def has_triton(device: torch.device) -> bool:
    """Whether a device runs the Triton kernels; of a GPU that does not one log line says why."""
    global kernels
    if device.type != "cuda":
        return False
    try:
        _check_card(device)
        from . import triton_kernels

        ones = torch.ones(1, 16, dtype=torch.float16, device=device)
        triton_kernels.linear(ones, ones, None).item()  # it builds, and the driver takes it
    except Exception as error:
        say_reference(device, error)
        return False
    kernels = triton_kernels
    return True


def _check_card(device: torch.device) -> None:
    name = torch.cuda.get_device_name(device)
    if torch.version.hip is not None:
        raise RuntimeError(f"{name} is not NVIDIA's, for whose cards the kernels were made")
    if capability(device) < TRITON_CAPABILITY:
        found, needed = (".".join(map(str, of)) for of in (capability(device), TRITON_CAPABILITY))
        raise RuntimeError(f"{name} has compute capability {found}, and the kernels need {needed}")


def _reason(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError) and error.name == "triton":
        return "Triton, which torch's CUDA builds bring, is not installed: `pip install triton`"
    return " ".join(str(error).split()) or type(error).__name__


def say_reference(device: torch.device, error: Exception | str) -> str:
    """Warn once that the kernels do not run, and return the reason."""
    reason = error if isinstance(error, str) else _reason(error)
    logger.warning_once(
        f"The Triton kernels do not run on {device} ({reason}), so the reference path does: a decoded token takes "
        "several times as long with quantised weights."
    )
    return reason


_differences: dict[Any, str | None] = {}


def difference(
    key: Any,
    device: torch.device,
    kernel: Callable[[], torch.Tensor],
    reference: Callable[[], torch.Tensor],
) -> str | None:
    """How a kernel differs from the reference path, in a sentence that is logged too; None where it does not.

    Args:
        key: what is compared; each is compared once on a device.
        kernel, reference: compute the same.
    """
    if (device, key) not in _differences:
        _differences[device, key] = reason = _compared(kernel, reference)
        if reason is not None:
            say_reference(device, reason)
    return _differences[device, key]


def _compared(kernel: Callable[[], torch.Tensor], reference: Callable[[], torch.Tensor]) -> str | None:
    expected = reference().float()
    try:
        error = ((kernel().float() - expected).norm() / expected.norm()).item()
    except Exception as failure:
        return _reason(failure)
    # Weights that are not finite, or all 0, say nothing.
    says_nothing = not expected.isfinite().all().item() or not expected.any().item()
    return None if error <= TOLERANCE or says_nothing else f"what they compute differs by {error:.2g} of its size"


def sample(tokens: int, width: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Inputs to compare with: [tokens, width]."""
    return torch.arange(tokens * width, device=device).sin().to(dtype).view(tokens, width)
