"""Stand-in for a module of transformers that its source distribution lacks: ranks are processes on the CPU, and talk
over gloo."""

from __future__ import annotations

import multiprocessing
import tempfile
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist


def _get_distributed_backend() -> str:
    return "gloo"


def _get_distributed_device_type() -> str:
    return "cpu"


def _get_rank_device(rank: int) -> torch.device:
    return torch.device("cpu")


def _set_rank_device(rank: int) -> None:
    torch.set_num_threads(1)


def _start_rank_processes(function: Callable, args: tuple, nprocs: int) -> None:
    """Run `function(rank, *args)` in `nprocs` processes, and fail where one of them does."""
    # A server that has imported what takes long: each rank is then its fork, and starts at once. It must not import
    # `tests`: unlike the ranks, it does not have this process's path.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["skywork_hf", "transformers.distributed", "transformers.testing_utils"])
    ranks = [context.Process(target=function, args=(rank, *args), daemon=True) for rank in range(nprocs)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(timeout=300)
    codes = [rank.exitcode for rank in ranks]
    for rank in ranks:
        rank.kill()
    assert set(codes) == {0}, f"exit codes of the ranks: {codes}; their output tells why"


def _in_group(rank: int, store: str, world_size: int, function: Callable, args: tuple) -> None:
    _set_rank_device(rank)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world_size, timeout=timedelta(seconds=120)
    )
    function(rank, *args)
    dist.destroy_process_group()


def run_distributed(world_size: int) -> Callable:
    """`run_distributed(world_size)(function)(*args)` calls `function(rank, *args)` in each rank of a process group."""

    def runner(function: Callable) -> Callable:
        def run(*args: Any) -> None:
            with tempfile.TemporaryDirectory() as folder:
                _start_rank_processes(_in_group, (f"{folder}/store", world_size, function, args), world_size)

        return run

    return runner
