"""Telling the kernel which mapped weights will be read: from a disk come these bytes then, at once, and no others.

Advice is advice: where there is none to give, or the kernel does not take it, nothing is lost."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from collections.abc import Iterable

import torch

# Linux begins to read no more for one piece of advice than a device's largest request or its readahead, which may be
# some hundred KiB; what is beyond would come page by page.
_PIECE = 2**17


def pages_of(weights: Iterable[torch.Tensor]) -> list[range]:
    """Of each mapped weight: the addresses of its pieces, from the page where it begins to the byte where it ends."""
    return [
        range(weight.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE, weight.data_ptr() + weight.nbytes, _PIECE)
        for weight in weights
        if weight.device.type == "cpu"
    ]


def read_only_when_told(pages: Iterable[range]) -> None:
    """No readahead: around each page that is met it would fetch up to some MiB more."""
    if _madvise is not None:
        for weight in pages:
            _madvise(weight.start, weight.stop - weight.start, mmap.MADV_RANDOM)


def will_be_read(pages: Iterable[range]) -> None:
    """Start reading all of them."""
    if _madvise is not None:
        for weight in pages:
            for start in weight:
                _madvise(start, min(_PIECE, weight.stop - start), mmap.MADV_WILLNEED)


def forget(pages: Iterable[range], descriptor: int) -> None:
    """Drop what is in memory of mapped weights, and of the file that is open under `descriptor` all that nothing maps;
    it comes from the disk when it is used again."""
    if _madvise is not None:
        for weight in pages:
            _madvise(weight.start, weight.stop - weight.start, mmap.MADV_DONTNEED)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def resident(weight: range) -> float:
    """The share of a mapped weight's pages that are in memory; 1 where nobody knows."""
    length = weight.stop - weight.start
    pages = (ctypes.c_ubyte * -(-length // mmap.PAGESIZE))()
    if _madvise is None or ctypes.CDLL(None).mincore(ctypes.c_void_p(weight.start), ctypes.c_size_t(length), pages):
        return 1.0
    return sum(page & 1 for page in pages) / len(pages)


def _linux_madvise() -> ctypes._NamedFuncPointer | None:
    if sys.platform != "linux":
        return None
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    return madvise


_madvise = _linux_madvise()
