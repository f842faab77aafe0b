"""Telling the kernel which mapped weights will be read: from a disk come these bytes then, at once, and no others."""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Iterable

import torch
from torch import nn

_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
# Linux begins to read no more for one piece of advice than a device's largest request or its readahead, which may be
# some hundred KiB; what is beyond would come page by page.
_PIECE = 2**17


def read_only_when_told(module: nn.Module) -> None:
    """No readahead for a module's mapped weights: around each page that is met it would fetch up to some MiB more."""
    _advise(module.parameters(), "MADV_RANDOM")


def will_be_read(modules: Iterable[nn.Module]) -> None:
    """Start reading the mapped weights of these modules, all together."""
    _advise((parameter for module in modules for parameter in module.parameters()), "MADV_WILLNEED")


def _advise(tensors: Iterable[torch.Tensor], advice: str) -> None:
    """Advice is advice: where there is none to give, or the kernel does not take it, nothing is lost."""
    if _LIBC is None:
        return
    for tensor in tensors:
        if tensor.device.type != "cpu":
            continue
        first = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
        end = tensor.data_ptr() + tensor.nbytes
        piece = _PIECE if advice == "MADV_WILLNEED" else end - first
        for start in range(first, end, piece):
            length = min(piece, end - start)
            _LIBC.madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), getattr(mmap, advice))
