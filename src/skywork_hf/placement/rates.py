"""How fast a device does what a forward pass asks of it: as it was measured, or as tables of its kind expect.

The tables are for cards and CPUs that are not there. Nothing in them was measured on a GPU by this project.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch

from .devices import Device

LAYER, LINEAR, EXPERT = "layer", "linear", "expert"
PARTS = (LINEAR, EXPERT)
# Those that are measured: others are their kin, or bitsandbytes'.
MEASURED_METHODS = ("", "int8", "fp8")

# Bytes that a kernel moves on a GPU for each byte of weights: counted by running the layers on simulated devices, with
# one row, each intermediate tensor written once and read once.
MOVED = {
    "linear": 1.0,
    "triton": 1.02,
    "scaled_mm": 1.02,
    "int_mm": 1.05,
    "dequantize": 5.05,
    "dequantize, float16": 21.05,
    "bitsandbytes": 1.0,  # whose kernels unpack in registers
}
# Launches of a linear on a GPU, counted in the same way; and of a layer beside its linears: norms, rotary embeddings,
# attention, gate, sorting rows by expert, gathering.
LAUNCHES = {
    "linear": 1,
    "triton": 1,
    "scaled_mm": 11,
    "scaled_mm, static": 5,
    "dequantize, static": 6,
    "int_mm": 9,
    "dequantize": 7,
    "dequantize, float16": 10,
    "bitsandbytes": 3,
}
LAYER_LAUNCHES, ATTENTION_LINEARS, EXPERT_LINEARS = 68, 4, 3
# The same of a layer where the Triton kernels run, and of its experts for a few rows: where all are on its GPU, where
# not, and for each further GPU (`tests/test_gpu_experts.py` counts them).
TRITON_LAYER_LAUNCHES, TABLE_LAUNCHES, TABLES_LAUNCHES, FURTHER_GPU_LAUNCHES = 44, 2, 7, 5
# Launches of a step beside its layers: embedding, rotary tables, mask, norm, head.
STEP_LAUNCHES = 30
# Seconds that the host takes for a launch in eager PyTorch: 4 to 6 us on a desktop CPU of today. It is why an H100
# decodes a 7B model at 0.27 of its bandwidth and an L4 at 0.81 (Chen 2026, "Memory-Bound but Not Bandwidth-Limited").
LAUNCH = 5e-6
# Seconds until a host knows that a GPU is done, and until a copy begins to arrive; NVIDIA's p2pBandwidthLatencyTest
# gives 10 to 20 us between cards without peer access, as GeForce cards are.
WAIT, LATENCY = 10e-6, 15e-6
# What kernels reach of a card's bandwidth, the L4's above; and of its matrix units, as prompts are cut into experts.
MEMORY_SHARE, MATMUL_SHARE = 0.8, 0.5
# Hidden values a second of a layer, for each byte a second of memory: some 15 passes of reading and writing 16 and 32
# bits, norms in float32 among them.
ELEMENTS_A_BYTE = 1 / 90
# Bytes a second one way over 16 lanes from pinned memory, by generation of PCIe: NVIDIA's bandwidthTest shows about
# 0.8 of the specification's 15.8, 31.5 and 63 GB/s.
PCIE = {3: 12.5e9, 4: 25e9, 5: 50e9}
# By card: generation of PCIe, the one before for those with 8 lanes; dense TFLOP/s in 16 bit with sums in 32. NVIDIA's
# product pages and architecture papers. int8 and FP8 run at twice that.
CARD_RATES = {
    "rtx3060": (4, 25),
    "rtx3080": (4, 60),
    "rtx3090": (4, 71),
    "rtx3090ti": (4, 80),
    "rtx4060ti": (3, 44),
    "rtx4070ti": (4, 80),
    "rtx4070tisuper": (4, 88),
    "rtx4080": (4, 97),
    "rtx4090": (4, 165),
    "rtx5060ti": (4, 47),
    "rtx5070ti": (5, 88),
    "rtx5080": (5, 113),
    "rtx5090": (5, 210),
    "rtxa4000": (4, 77),
    "rtxa6000": (4, 155),
    "rtx6000ada": (4, 364),
    "rtxpro6000": (5, 504),
    "p40": (3, 12),
    "t4": (3, 65),
    "v100": (3, 125),
    "a10": (4, 125),
    "a30": (4, 165),
    "a40": (4, 150),
    "l4": (4, 121),
    "l40": (4, 181),
    "l40s": (4, 362),
    "a100": (4, 312),
    "a100-40gb": (4, 312),
    "h100": (5, 989),
    "h100-pcie": (5, 756),
    "h200": (5, 989),
}
# A card without a name: the RTX 3090's bus, and its multiplications and additions for each byte that it reads.
_PCIE, _FLOPS_A_BYTE = 4, 76.0
# A CPU and a card of which nothing is known: two channels of DDR4-3200, an RTX 3090.
CPU_MEMORY, GPU_MEMORY = 50e9, 936e9
# A CPU of which only the bandwidth is known: what its kernels reach of that with few rows; half the peak of eight
# cores with AVX2; the host's seconds of a layer, of a chosen expert, and of a step beside its layers
# (`skywork-hf calibrate`, 2 cores of an AMD EPYC).
CPU_SHARE, CPU_DEQUANTIZE_SHARE, CPU_FLOPS = 0.8, 0.05, 0.3e12
CPU_LAYER, CPU_EXPERT, CPU_STEP = 350e-6, 50e-6, 300e-6

# Rows from which on experts of the CPU are copied to a GPU where nothing was planned: what tables give for an expert
# in int8, a card on PCIe 4 and a CPU of 50 GB/s, doubled, as nobody looked.
STREAM_FROM_ROWS = 24

_ROWS = (1, 16, 256, 4096)
_WEIGHTS = 10**9
# By method: bytes of a weight, and what may run it on a GPU and on a CPU, where "" is all other kernels.
_METHODS: dict[str, tuple[float, tuple[str, ...], tuple[str, ...]]] = {
    "": (2, ("linear", "triton"), ("",)),
    "int8": (1, ("dequantize", "triton", "int_mm"), ("dequantize", "")),
    "fp8": (1, ("dequantize", "triton", "scaled_mm"), ("dequantize", "")),
    "fp8-static": (1, ("dequantize", "triton", "scaled_mm"), ("dequantize", "")),
    "bnb-int8": (1, ("bitsandbytes",), ("dequantize",)),
    "nf4": (0.6, ("bitsandbytes",), ("dequantize",)),
}


@dataclass(frozen=True)
class KernelRate:
    """What a kernel takes.

    Args:
        part: "linear" for a single one, "expert" for the three of an expert.
        method: what weights are held as, see `Precision.methods`; those that begin alike count as one.
        kernel: its name in `quantization.matmul`; "" for all that have no rate of their own.
        rows: of inputs, in 16 bit.
        seconds: for 10^9 weights, without the host's time for a call.
        call: seconds of a call however few the weights are, beyond those of the host for one row.
    """

    part: str
    method: str
    kernel: str
    rows: int
    seconds: float
    call: float = 0.0


@dataclass(frozen=True)
class Rates:
    """One device.

    Args:
        name: of the card or the CPU.
        is_measured: by `skywork-hf calibrate`; else expected by the tables of this file.
        memory: bytes a second that are read from its memory.
        kernels: in any order.
        layer: by method, seconds of the host for a layer without its chosen experts.
        expert: by method, the same for each chosen expert.
        step: the same for a step beside its layers.
        elements: values of hidden states a second of a layer, beside matmuls and attention.
        attention: multiplications and additions a second of attention in prompts.
        wait: seconds until the host knows that a GPU is done.
        latency: seconds until a copy to or from a GPU begins to arrive.
        bus: bytes a second between pinned memory and a GPU.
        streaming: bytes a second at which a GPU is given weights that are mapped from files.
        peer: bytes a second from GPU to GPU.
    """

    name: str
    is_measured: bool
    memory: float
    kernels: tuple[KernelRate, ...]
    layer: dict[str, float]
    expert: dict[str, float]
    step: float
    elements: float
    attention: float
    wait: float = 0.0
    latency: float = 0.0
    bus: float = math.inf
    streaming: float = math.inf
    peer: float = math.inf
    _curves: dict[tuple[str, ...], list[tuple[int, float]]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def seconds(self, part: str, method: str, kernel: str, rows: float) -> float:
        """Of a kernel on 10^9 weights: between two numbers of rows that are known on a line, with fewer rows than are
        known as with the least, with more in proportion."""
        return self._at(rows, self._curve(part, method, kernel, "seconds"))

    def call(self, part: str, method: str, kernel: str, rows: float) -> float:
        """The same of a kernel's call."""
        return self._at(rows, self._curve(part, method, kernel, "call"))

    def _at(self, rows: float, points: list[tuple[int, float]]) -> float:
        if rows <= points[0][0]:
            return points[0][1]
        if rows >= points[-1][0]:
            return points[-1][1] * rows / points[-1][0]
        above = next(number for number, (known, _) in enumerate(points) if known >= rows)
        (fewer, first), (more, second) = points[above - 1 : above + 1]
        return first + (second - first) * (rows - fewer) / (more - fewer)

    def _curve(self, *of: str) -> list[tuple[int, float]]:
        """Seconds by rows; where the kernel has none of its own, of what ran instead. More rows never take less."""
        if of not in self._curves:
            part, method, kernel, value = of
            known = [rate for rate in self.kernels if (rate.part, rate.method) == (part, family(method, self.layer))]
            chosen = [rate for rate in known if rate.kernel == kernel] or known
            points: dict[int, float] = {}
            for rate in sorted(chosen, key=lambda rate: -rate.rows):
                points[rate.rows] = min([getattr(rate, value), *points.values()])
            self._curves[of] = sorted(points.items())
        return self._curves[of]

    def host(self, method: str, of: str) -> float:
        """The host's seconds for a layer without its experts, or for one expert."""
        seconds = self.expert if of == EXPERT else self.layer
        return seconds[family(method, seconds)]


@dataclass(frozen=True)
class Disk:
    """Reading weights that are mapped from files: bytes a second, and seconds until the first arrives."""

    bandwidth: float
    latency: float

    def seconds(self, nbytes: float) -> float:
        return self.latency + nbytes / self.bandwidth


def family(method: str, known: Iterable[str]) -> str:
    """Of the methods that are known the one that says most of `method`: "fp8" of "fp8-weight-only"."""
    return max((name for name in known if method.startswith(name)), key=len)


def expected_gpu(device: Device, memory: float, dtype: torch.dtype, cpu_memory: float) -> Rates:
    """A card that is not there.

    Args:
        device: the card.
        memory: its bandwidth, bytes a second.
        dtype: of the model.
        cpu_memory: bytes a second that the host reads.
    """
    generation, tflops = CARD_RATES.get(device.name, (_PCIE, _FLOPS_A_BYTE * memory / 1e12))
    bus, flops = PCIE[generation], tflops * 1e12 * MATMUL_SHARE

    def seconds(size: float, kernel: str, rows: int) -> float:
        moved = size * MOVED[_counted(kernel, dtype)] / (MEMORY_SHARE * memory)
        return max(moved, 2 * rows / (flops * (2 if kernel in ("int_mm", "scaled_mm") else 1)))

    launches = {}
    for method, (_, kernels, _) in _METHODS.items():
        kernel = "dequantize" if "dequantize" in kernels and not device.has_fp8_unit else kernels[-1]
        kernel = "dequantize" if method == "int8" else kernel  # integer matmuls take many rows
        kernel = "triton" if "triton" in kernels and device.has_triton else kernel
        launches[method] = LAUNCHES[
            f"{kernel}, static" if method == "fp8-static" and kernel != "triton" else _counted(kernel, dtype)
        ]
    of_a_layer = TRITON_LAYER_LAUNCHES if device.has_triton else LAYER_LAUNCHES
    return Rates(
        name=device.name,
        is_measured=False,
        memory=memory,
        kernels=_kernel_rates(True, seconds),
        layer={key: LAUNCH * (of_a_layer + ATTENTION_LINEARS * number) for key, number in launches.items()},
        expert={key: LAUNCH * EXPERT_LINEARS * number for key, number in launches.items()},
        step=LAUNCH * STEP_LAUNCHES,
        elements=memory * ELEMENTS_A_BYTE,
        attention=flops,
        wait=WAIT,
        latency=LATENCY,
        bus=bus,
        # From pages that are not pinned the driver copies into some that are: reads once and writes once.
        streaming=1 / (1 / bus + 2 / cpu_memory),
        peer=bus,
    )


def expected_cpu(memory: float) -> Rates:
    """A CPU of which only the bandwidth is known, bytes a second."""

    def seconds(size: float, kernel: str, rows: int) -> float:
        return max(size / (memory * (CPU_DEQUANTIZE_SHARE if kernel else CPU_SHARE)), 2 * rows / CPU_FLOPS)

    return Rates(
        name="",
        is_measured=False,
        memory=memory,
        kernels=_kernel_rates(False, seconds),
        layer=dict.fromkeys(_METHODS, CPU_LAYER),
        expert=dict.fromkeys(_METHODS, CPU_EXPERT),
        step=CPU_STEP,
        elements=memory * ELEMENTS_A_BYTE,
        attention=CPU_FLOPS,
    )


def _kernel_rates(is_gpu: bool, seconds: Callable[[float, str, int], float]) -> tuple[KernelRate, ...]:
    """`seconds` of a weight with so many bytes, a kernel and rows, for all of `_METHODS`."""
    return tuple(
        KernelRate(part, method, kernel, rows, _WEIGHTS * seconds(size, kernel, rows))
        for method, (size, on_gpus, on_cpus) in _METHODS.items()
        for kernel in (on_gpus if is_gpu else on_cpus)
        for part in PARTS
        for rows in _ROWS
    )


def _counted(kernel: str, dtype: torch.dtype) -> str:
    """The row of `MOVED` and `LAUNCHES`: float16 is unpacked through float32."""
    return f"{kernel}, float16" if kernel == "dequantize" and dtype is torch.float16 else kernel
