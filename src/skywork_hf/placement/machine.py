"""What a plan, which may have been made on another machine, asks of this one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from ..quantization import gpu_kernels, matmul
from .devices import GIB, Device
from .problem import Solution
from .speed import expected_kernel
from .text import device_name

_INSTEAD = "plan for the GPUs that are here (`plan_device_map` without `max_memory`, or with theirs)."


@dataclass(frozen=True)
class GpuHere:
    """A GPU of this machine: its name, all that torch sees of its memory and what of it is free beside the context, in
    bytes, whether it multiplies FP8, and whether it runs the Triton kernels."""

    name: str
    memory: int
    free: int
    has_fp8_unit: bool
    has_triton: bool


def gpus_here() -> list[GpuHere] | None:
    """Those that device maps give numbers; None where they are no CUDA devices, of which nothing is asked."""
    if not torch.cuda.is_available():
        return None if torch.accelerator.is_available() else []
    return [_gpu_here(number) for number in range(torch.cuda.device_count())]


def _gpu_here(number: int) -> GpuHere:
    properties = torch.cuda.get_device_properties(number)
    free, _ = torch.cuda.mem_get_info(number)
    free += torch.cuda.memory_reserved(number) - torch.cuda.memory_allocated(number)
    device = torch.device("cuda", number)
    has_fp8_unit, has_triton = matmul.has_fp8_unit(device), gpu_kernels.has_triton(device)
    return GpuHere(properties.name, properties.total_memory, free, has_fp8_unit, has_triton)


def differences(plan: Solution) -> list[str]:
    """In sentences, what is another than was planned and does not keep the plan from running.

    Raises:
        ValueError: the plan cannot run, as it uses GPUs that are not here, or more memory than they have.
    """
    here = gpus_here()
    used = [gpu for gpu in plan.request.gpus if any(plan.bytes_per_device[gpu.key].values())]
    numbered = [(gpu.key, gpu) for gpu in used if isinstance(gpu.key, int)]
    if here is None:
        return []
    missing = [str(number) for number, _ in numbered if number >= len(here)]
    if missing:
        count = f"{len(here) or 'no'} GPU{'' if len(here) == 1 else 's'}"
        raise ValueError(f"The plan uses GPU {' and '.join(missing)}, and this machine has {count}: {_INSTEAD}")
    return [sentence for number, gpu in numbered for sentence in _differences(plan, gpu, here[number])]


def _differences(plan: Solution, planned: Device, here: GpuHere) -> Iterator[str]:
    name = device_name(plan, planned.key)
    filled = sum(plan.bytes_per_device[planned.key].values()) - planned.margin
    if filled > here.memory:
        raise ValueError(
            f"{name} holds {filled / GIB:.4g} GiB by the plan, and the {here.name} here has {here.memory / GIB:.4g} "
            f"GiB: {_INSTEAD}"
        )
    needed = filled + replace(planned, has_context=True).margin
    if needed > here.free:
        yield (
            f"{name} takes {needed / GIB:.4g} GiB by the plan, and {here.free / GIB:.4g} GiB are free: memory may run "
            "out, unless what else is there ends."
        )
    found = replace(planned, has_fp8_unit=here.has_fp8_unit, has_triton=here.has_triton)
    precision = plan.request.precision
    kernel = expected_kernel(precision.methods[planned.key], found, precision.dtype, plan.request.config)
    if kernel not in plan.kernel(planned.key).split("/"):
        yield f"{name} was to run {plan.kernel(planned.key)}, and the {here.name} here runs {kernel}."
