"""Whether the Triton kernels run on a GPU, and agree there with the reference path: asked once, and said if not."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from transformers.utils import logging

logger = logging.get_logger(__name__)

# Of tensor cores and of 16-byte reads past registers, one of which each kernel has.
OLDEST_CAPABILITY = (7, 5)
# Of the norm: a kernel rounds less than the reference path, whose inputs and weights are in 16 bit.
TOLERANCE = 0.02


@cache
def kernels_on(device: torch.device) -> Any:
    """The module `triton_kernels` where it runs on a device, else None; of a GPU one log line says why."""
    if device.type != "cuda":
        return None
    try:
        _check_card(device)
        from . import triton_kernels

        ones = torch.ones(1, 16, dtype=torch.float16, device=device)
        triton_kernels.linear(ones, ones, None).item()  # it builds, and the driver takes it
    except Exception as error:
        _say_reference(device, _reason(error))
        return None
    return triton_kernels


def _check_card(device: torch.device) -> None:
    name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    if torch.version.hip is not None:
        raise RuntimeError(f"{name} is not NVIDIA's, for whose cards the kernels were made")
    if capability < OLDEST_CAPABILITY:
        found, needed = (".".join(map(str, of)) for of in (capability, OLDEST_CAPABILITY))
        raise RuntimeError(f"{name} has compute capability {found}, and the kernels need {needed}")


def _reason(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError) and error.name == "triton":
        return "Triton, which torch's CUDA builds bring, is not installed: `pip install triton`"
    return " ".join(str(error).split()) or type(error).__name__


def _say_reference(device: torch.device, reason: str) -> None:
    logger.warning_once(
        f"The Triton kernels do not run on {device} ({reason}), so the reference path does: a decoded token takes "
        "several times as long with quantised weights."
    )


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
            _say_reference(device, reason)
    return _differences[device, key]


def _compared(kernel: Callable[[], torch.Tensor], reference: Callable[[], torch.Tensor]) -> str | None:
    expected = reference().float()
    try:
        error = (kernel().float() - expected).norm() / expected.norm()
    except Exception as failure:
        return _reason(failure)
    is_right = error.item() <= TOLERANCE
    return None if is_right else f"what they compute differs by {error.item():.2g} of its size"
