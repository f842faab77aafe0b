"""What the kernel is told of mapped weights."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import time

import pytest
import torch
from torch import nn

from skywork_hf.placement.pages import pages_of, read_only_when_told, will_be_read

NBYTES = 2**26  # more than the kernel begins to read at once


def resident(tensor: torch.Tensor) -> float:
    """The share of a mapped tensor's pages that are in memory."""
    pages = (ctypes.c_ubyte * (tensor.nbytes // mmap.PAGESIZE))()
    assert ctypes.CDLL(None).mincore(ctypes.c_void_p(tensor.data_ptr()), ctypes.c_size_t(tensor.nbytes), pages) == 0
    return sum(page & 1 for page in pages) / len(pages)


@pytest.mark.skipif(sys.platform != "linux", reason="advice for Linux")
def test_all_of_a_large_weight_is_read_ahead(tmp_path):
    file = tmp_path / "weight.bin"
    file.write_bytes(bytes(NBYTES))
    descriptor = os.open(file, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)
    weight = torch.from_file(str(file), shared=True, size=NBYTES, dtype=torch.uint8)
    module = nn.Module()
    module.register_parameter("weight", nn.Parameter(weight, requires_grad=False))
    read_only_when_told(pages_of(module))
    will_be_read(pages_of(module))
    deadline = time.monotonic() + 30
    while resident(weight) < 1 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert resident(weight) == 1
