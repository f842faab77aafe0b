"""The golden checkpoints and tiny random models that all tests share."""

from __future__ import annotations

import gc
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch.profiler import ProfilerActivity, profile

from skywork_hf import SkyworkConfig, SkyworkMoeConfig
from skywork_hf.demo import tiny_checkpoint

FIXTURES = Path(__file__).parent / "fixtures"
LAYOUTS = ("modular", "fused")


def checkpoint(name: str) -> Path:
    """The folder of a golden checkpoint; the one that the demo loads lives in the package."""
    return tiny_checkpoint() if name == tiny_checkpoint().name else FIXTURES / name


def golden(name: str) -> dict[str, torch.Tensor]:
    """The outputs of a reference implementation on a golden checkpoint."""
    return load_file(checkpoint(name) / "golden.safetensors")


def _shape(**changes: Any) -> dict[str, Any]:
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return {**shape, "vocab_size": 67, "max_position_embeddings": 64, "initializer_range": 0.2, **changes}


def tiny_dense_config(**changes: Any) -> SkyworkConfig:
    return SkyworkConfig(**_shape(**changes))


def tiny_moe_config(**changes: Any) -> SkyworkMoeConfig:
    experts = {} if changes.keys() & {"num_experts", "num_local_experts"} else {"num_experts": [4]}
    return SkyworkMoeConfig(**_shape(**experts, **changes))


def tokens(batch: int = 2, length: int = 10, vocab: int = 67) -> torch.Tensor:
    """Random ids, none of them padding, bos or eos."""
    return torch.randint(3, vocab, (batch, length))


@torch.no_grad()
def stir(adapted: Any) -> None:
    """Change all that is trained a little, so that an adapter does something."""
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn_like(parameter) / 10)


def forked(run: Callable[[], Any]) -> int:
    """The id of a process, forked from this one, which has imported everything, that does `run` and ends: with 0, or
    with 1 where that raises."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            run()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return child


def peak_bytes(run: Callable[[], Any]) -> int:
    """The most bytes that a call held at once beside what was there before, from every allocation that it made."""
    gc.collect()  # of what earlier tests left, nothing is to be freed meanwhile
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    held = peak = 0
    for event in profiled.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak
