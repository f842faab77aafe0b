"""What the kernel is told of mapped weights."""

from __future__ import annotations

import os
import sys
import time

import pytest
import torch
from torch import nn

from skywork_hf.placement.pages import forget, pages_of, read_only_when_told, resident, will_be_read

NBYTES = 2**26  # more than the kernel begins to read at once


@pytest.mark.skipif(sys.platform != "linux", reason="advice for Linux")
def test_all_of_a_large_weight_is_read_ahead(tmp_path):
    file = tmp_path / "weight.bin"
    file.write_bytes(bytes(NBYTES))
    descriptor = os.open(file, os.O_RDONLY)
    os.fsync(descriptor)
    weight = torch.from_file(str(file), shared=True, size=NBYTES, dtype=torch.uint8)
    module = nn.Module()
    module.register_parameter("weight", nn.Parameter(weight, requires_grad=False))
    pages = pages_of(module.parameters())
    forget(pages, descriptor)
    os.close(descriptor)
    read_only_when_told(pages)
    will_be_read(pages)
    deadline = time.monotonic() + 30
    while resident(pages[0]) < 1 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert resident(pages[0]) == 1
