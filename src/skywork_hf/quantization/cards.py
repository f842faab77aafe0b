"""What NVIDIA's cards can, by compute capability, and what the Triton kernels take."""

from __future__ import annotations

from functools import cache

import torch

# Of tensor cores and of 16-byte reads past registers, one of which each Triton kernel has.
TRITON_CAPABILITY = (7, 5)
FP8_CAPABILITY = (8, 9)
# Of a call of the Triton kernels, and of the experts that their gate compares with each other.
MAX_TOKENS, MAX_EXPERTS = 16, 64
# Of a table of addresses, a row for each expert: the weight and the scale of w1, w3 and w2.
TABLE_COLUMNS = 6


@cache
def capability(device: torch.device) -> tuple[int, int]:
    """(0, 0) of anything else than an NVIDIA GPU that is here."""
    is_nvidia = device.type == "cuda" and torch.version.hip is None and torch.cuda.is_available()
    return torch.cuda.get_device_capability(device) if is_nvidia else (0, 0)


def has_fp8_unit(device: torch.device) -> bool:
    """Whether `device` multiplies FP8."""
    return capability(device) >= FP8_CAPABILITY
