"""What holds for every test."""

from __future__ import annotations

import gc
import os

os.environ["HF_HUB_OFFLINE"] = "1"  # no test asks the Hub; one that tries fails at once
os.environ["OMP_NUM_THREADS"] = "1"  # tests run beside each other, one process a core; so do the programs they start

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def pytest_collection_finish() -> None:
    # What is imported stays: the `gc.collect()` of each Trainer would look through it, for a third of a second.
    gc.freeze()


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
