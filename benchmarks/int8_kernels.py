"""The matmuls on quantised weights, kernel by kernel: is the one that `matmul.int8_kernel` picks the fastest?

    python benchmarks/int8_kernels.py [--device cuda]

For the two shapes of Skywork-MoE's experts and 1 to 256 rows of bfloat16 input: torch's linear on bfloat16 weights,
the three ways to multiply by int8 weights (torch's weight-only kernel, unpacking blocks, and torch's integer matmul
with int8 activations), and unpacking blocks of FP8 weights. Calls go round several weights, so that each is read from
memory and not from a cache. The floor is one read of the int8 weight, at the bandwidth of summing a large tensor.

To reach: what is picked takes at most 1.1 times the fastest of the int8 kernels.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from skywork_hf.quantization import formats, matmul

SHAPES = [(12288, 4608), (4608, 12288)]
ROWS = [1, 2, 4, 8, 16, 24, 32, 64, 128, 256]
# Columns of the table, with the dtype of the weights. Those of int8 have the names that `matmul.int8_kernel` gives.
COLUMNS = {
    "bf16 linear": torch.bfloat16,
    "weight_int8pack_mm": torch.int8,
    "dequantize": torch.int8,
    "int_mm": torch.int8,
    "fp8 dequantize": formats.FP8,
}
WEIGHTS = 4
PASSES = 5
PASSES_SECONDS = 1.0
# A kernel that once took longer for one call is not asked for more rows.
CALL_SECONDS = 1.0
READ_BYTES = 2**30

Weight = tuple[Tensor, Tensor]


def multiply(column: str, inputs: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    if column == "bf16 linear":
        return F.linear(inputs, weight)
    if column == "weight_int8pack_mm":
        return torch._weight_int8pack_mm(inputs, weight, scale)
    if column == "int_mm":
        return matmul.int8_activations_linear(inputs, weight, scale)
    return matmul.dequantized_linear(inputs, weight, scale)


def make_weights(shape: tuple[int, int], device: torch.device) -> dict[torch.dtype, list[Weight]]:
    """By dtype: the same real values, several times over."""
    weight = torch.randn(shape, device=device).bfloat16()
    forms = [(weight, weight), formats.quantize_int8(weight), formats.quantize_fp8(weight)]
    return {values.dtype: [(values.clone(), scale) for _ in range(WEIGHTS)] for values, scale in forms}


def seconds_of(call: Callable[[Weight], Tensor], weights: list[Weight], device: torch.device) -> float:
    """The time of one call; the fastest of some passes, each once round the weights."""
    call(weights[0])
    first = timed(lambda: call(weights[1]), device)
    if first > CALL_SECONDS:
        return first
    times: list[float] = []
    while len(times) < PASSES and sum(times) < PASSES_SECONDS:
        times.append(timed(lambda: [call(weight) for weight in weights], device))
    return min(times) / len(weights)


def timed(run: Callable[[], object], device: torch.device) -> float:
    synchronise(device)
    start = time.perf_counter()
    run()
    synchronise(device)
    return time.perf_counter() - start


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def read_bandwidth(device: torch.device) -> float:
    """Bytes a second of summing a tensor that no cache holds."""
    values = torch.ones(READ_BYTES // 8, dtype=torch.int64, device=device)
    values.sum()
    return READ_BYTES / min(timed(values.sum, device) for _ in range(PASSES))


@torch.no_grad()
def print_table(shape: tuple[int, int], device: torch.device) -> None:
    weights = make_weights(shape, device)
    floor = shape[0] * shape[1] / read_bandwidth(device)
    print(f"\nweight [{shape[0]}, {shape[1]}], times in ms; one read of it in int8: {floor * 1e3:.2f} ms")
    print(f"{'rows':>4}" + "".join(f"{column:>20}" for column in COLUMNS) + f"  {'picked':18}  {'fastest int8':18}")
    too_slow: set[str] = set()
    for rows in ROWS:
        inputs = torch.randn(rows, shape[1], device=device).bfloat16()
        times = {}
        for column in COLUMNS.keys() - too_slow:
            try:
                times[column] = seconds_of(
                    lambda weight: multiply(column, inputs, *weight),  # noqa: B023
                    weights[COLUMNS[column]],
                    device,
                )
            except (RuntimeError, NotImplementedError):  # this device has no such kernel, or not for so few rows
                continue
            if times[column] > CALL_SECONDS:
                too_slow.add(column)
        print_row(rows, times, matmul.int8_kernel(device.type, inputs.dtype, rows, shape, True))


def print_row(rows: int, times: dict[str, float], picked: str) -> None:
    cells = "".join(f"{times[column] * 1e3:20.3f}" if column in times else f"{'-':>20}" for column in COLUMNS)
    fastest = min((column for column in times if COLUMNS[column] == torch.int8), key=lambda column: times[column])
    verdict = "" if times[picked] <= 1.1 * times[fastest] else f"  {times[picked] / times[fastest]:.2f} x the fastest"
    print(f"{rows:4}{cells}  {picked:18}  {fastest:18}{verdict}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    device = parser.parse_args().device
    torch.manual_seed(0)
    if device.type == "cuda":
        print(torch.cuda.get_device_name(device))
    else:
        print(f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads")
    for shape in SHAPES:
        print_table(shape, device)


if __name__ == "__main__":
    main()
