"""The matmuls of quantised and bfloat16 weights, kernel by kernel: is the one that `matmul` picks the fastest?

    python benchmarks/cpu_kernels.py [--threads 2] [--device cuda]

For the two shapes of Skywork-MoE's experts and 1 to 128 rows of bfloat16 inputs: int8, FP8 and bfloat16 weights by
each kernel that takes them. Calls go round several weights, so that each is read from memory and not from a cache.
Kernels take turns, and each is given its fastest call, as other programs only ever make a call slower. The floor is
summing the same bytes, in the same turns. Lines end with what is picked, and by how much another is faster where that
is more than a tenth; then come the numbers of rows from which another kernel is picked.

To reach: what is picked takes at most 1.1 times the fastest; one row through `SkyworkInt8Linear` at most 1.35 times
the floor, and through `SkyworkFp8Linear` at most 1.7 times.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from skywork_hf.quantization import formats, matmul
from skywork_hf.quantization.linear import SkyworkFp8Linear, SkyworkInt8Linear, SkyworkLinear

SHAPES = [(12288, 4608), (4608, 12288)]
ROWS = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64, 128]
WEIGHTS = 3
TURNS = 8
# A kernel that once took longer for one call is not asked for more rows.
CALL_SECONDS = 0.5

Call = Callable[[Tensor, Tensor, Tensor], Tensor]  # inputs, weight, scale


def numba(inputs: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    return matmul._numba().linear(inputs, weight, scale if scale is not weight else None)


def kernels(device: torch.device) -> dict[str, dict[str, Call]]:
    """By what weights are held as, and by the names that `matmul` gives."""
    scaled_mm: Call = lambda inputs, weight, scale: matmul.fp8_linear(inputs, weight, scale, "dynamic", None)  # noqa: E731
    found: dict[str, dict[str, Call]] = {
        "int8": {
            "numba": numba,
            "weight_int8pack_mm": torch._weight_int8pack_mm,
            "int_mm": matmul.int8_activations_linear,
            "dequantize": matmul.dequantized_linear,
        },
        "fp8": {"numba": numba, "dequantize": matmul.dequantized_linear, "scaled_mm": scaled_mm},
        "bf16": {"numba": numba, "linear": lambda inputs, weight, _: F.linear(inputs, weight)},
    }
    missing = {"numba", "weight_int8pack_mm"} if device.type == "cuda" else {"scaled_mm"}
    if device.type == "cpu" and matmul._numba() is None:
        missing.add("numba")
    return {kind: {name: call for name, call in of.items() if name not in missing} for kind, of in found.items()}


def picked(kind: str, rows: int, shape: tuple[int, int], device: torch.device) -> str:
    dtype = torch.bfloat16
    if kind == "int8":
        return matmul.int8_kernel(device.type, dtype, rows, shape, True)
    if kind == "fp8":
        return matmul.fp8_kernel(device.type, matmul.has_fp8_unit(device), dtype, rows, shape, "dynamic")
    return matmul.linear_kernel(device.type, dtype, rows)


def make_weights(shape: tuple[int, int], device: torch.device) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """The same real values in each form, several times over."""
    weight = torch.randn(shape, device=device).bfloat16()
    forms = {"int8": formats.quantize_int8(weight), "fp8": formats.quantize_fp8(weight), "bf16": (weight, weight)}
    made: dict[str, list[tuple[Tensor, Tensor]]] = {kind: [] for kind in forms}
    for kind, (values, scale) in forms.items():
        for _ in range(WEIGHTS):
            copy = values.clone()
            made[kind].append((copy, copy if scale is weight else scale))
    return made


def fastest_calls(calls: dict[str, Callable[[Tensor, Tensor], object]], weights: list, device: torch.device) -> dict:
    """Seconds of each call, taking turns; the fastest of all weights and turns."""
    seconds = {name: timed(lambda: call(*weights[0]), device) for name, call in calls.items()}  # noqa: B023
    for _ in range(TURNS):
        for name, call in calls.items():
            if seconds[name] < CALL_SECONDS:
                for pair in weights:
                    seconds[name] = min(seconds[name], timed(lambda: call(*pair), device))  # noqa: B023
    return seconds


def timed(run: Callable[[], object], device: torch.device) -> float:
    synchronise(device)
    start = time.perf_counter()
    run()
    synchronise(device)
    return time.perf_counter() - start


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def read(weight: Tensor, scale: Tensor) -> Tensor:
    return weight.view(torch.int64).sum()


def print_table(kind: str, shape: tuple[int, int], weights: list, device: torch.device) -> None:
    available = kernels(device)[kind]
    print(f"\n{kind} weight [{shape[0]}, {shape[1]}], times in ms")
    print(f"{'rows':>4}{'reading it':>12}" + "".join(f"{name:>20}" for name in available) + "  picked")
    switches: list[str] = []
    too_slow: set[str] = set()
    for rows in ROWS:
        inputs = torch.randn(rows, shape[1], device=device).bfloat16()
        calls = {
            name: lambda weight, scale, call=call: call(inputs, weight, scale)  # noqa: B023
            for name, call in available.items()
            if name not in too_slow and not (name == "int_mm" and device.type == "cuda" and rows < 17)
        }
        seconds = fastest_calls({"reading it": read, **calls}, weights, device)
        floor = seconds.pop("reading it")
        too_slow |= {name for name, of in seconds.items() if of > CALL_SECONDS}
        name = picked(kind, rows, shape, device)
        if not switches or not switches[-1].endswith(name):
            switches.append(f"from {rows} {name}")
        fastest = min(seconds, key=lambda of: seconds[of])
        ratio = seconds[name] / seconds[fastest]
        cells = "".join(f"{seconds[of] * 1e3:20.3f}" if of in seconds else f"{'-':>20}" for of in available)
        verdict = "" if ratio <= 1.1 else f", {ratio:.2f} x {fastest}"
        print(f"{rows:4}{floor * 1e3:12.3f}{cells}  {name}{verdict}", flush=True)
    print("picked: " + ", ".join(switches))


def layer(kind: str, weight: Tensor, scale: Tensor) -> nn.Linear:
    made: nn.Linear = {"int8": SkyworkInt8Linear, "fp8": SkyworkFp8Linear, "bf16": SkyworkLinear}[kind](
        weight.shape[1], weight.shape[0], bias=False, device="meta"
    )
    made.weight = nn.Parameter(weight, requires_grad=False)
    if scale is not weight:
        made.weight_scale = nn.Parameter(scale, requires_grad=False)
    return made


def print_layers(shape: tuple[int, int], weights: dict[str, list[tuple[Tensor, Tensor]]]) -> None:
    """One row through the layers, beside reading their weights."""
    device, inputs = torch.device("cpu"), torch.randn(1, shape[1]).bfloat16()
    for kind, bound in (("int8", "1.35"), ("fp8", "1.70"), ("bf16", "   -")):
        pairs = [(weight, layer(kind, weight, scale)) for weight, scale in weights[kind]]
        calls = {"reading": lambda weight, _: read(weight, weight), "layer": lambda _, of: of(inputs)}
        seconds = fastest_calls(calls, pairs, device)
        ratio = seconds["layer"] / seconds["reading"]
        time_of = f"{seconds['layer'] * 1e3:.3f} ms, {ratio:.2f} x reading it"
        print(f"one row through a layer of {kind:4} {shape}: {time_of} (to reach {bound})", flush=True)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--layers", action="store_true", help="one row through the layers alone")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)
    device = arguments.device
    if device.type == "cuda":
        print(torch.cuda.get_device_name(device))
    else:
        features = f"VNNI {matmul._has_vnni()}, bfloat16 {matmul._has_bfloat16()}"
        print(f"{torch.backends.cpu.get_cpu_capability()} ({features}), {torch.get_num_threads()} threads")
        matmul.ready_cpu_kernels([torch.int8, formats.FP8, torch.bfloat16])
    for shape in SHAPES:
        weights = make_weights(shape, device)
        if device.type == "cpu":
            print_layers(shape, weights)
        for kind in [] if arguments.layers else weights:
            print_table(kind, shape, weights[kind], device)


if __name__ == "__main__":
    main()
