"""What `gpu.py` measures with: the device, its clocks and counters, the time that is left, and the table."""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from typing import Any

import torch
import transformers
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from skywork_hf.placement.calibration import Calibration, this_machine
from skywork_hf.quantization.formats import FP8

LEAST_SECONDS = 8  # in which a case is begun
# What launches, and what the host waits by; `Bench.wait` does so by the device.
LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch", "cudaMemcpyAsync", "cudaMemsetAsync")
WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize", "cudaMemcpy")


class OutOfTime(Exception):
    pass


@dataclass
class Row:
    """A line of the table. Times in ms; counts as `gpu.py` tells; `more` is what only the JSON has."""

    section: str
    case: str
    ms: float | None = None
    floor: float | None = None
    expected: float | None = None
    launches: float | None = None
    kernels: float | None = None
    waits: float | None = None
    copies: float | None = None
    note: str = ""
    more: dict[str, Any] = field(default_factory=dict)

    HEAD = ("section", "case", "ms", "floor", "of floor", "expected", "launches", "kernels", "waits", "copies", "note")

    def cells(self) -> list[str]:
        share = self.floor / self.ms if self.floor and self.ms else None
        counts = (self.launches, self.kernels, self.waits, self.copies)
        numbers = (self.ms, self.floor, share, self.expected, *counts)
        return [self.section, self.case, *("" if n is None else f"{n:.3g}" for n in numbers), self.note]


@dataclass
class Profile:
    """What a run asked of the GPU, by torch's profiler: ms in which the GPU worked, and counts."""

    ms: float
    launches: float
    kernels: float
    waits: float
    copies: float

    def counts(self, layers: int = 1) -> dict[str, float]:
        """Without the ms, of each of so many layers."""
        return {of: getattr(self, of) / layers for of in ("launches", "kernels", "waits", "copies")}


class Bench:
    """The device, the time that is left, and what was found."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.device, self.is_tiny, self.output = torch.device(arguments.device), arguments.tiny, arguments.output
        self.is_cuda = self.device.type == "cuda"
        self.gpu: Any = 0 if self.is_cuda else None  # as device maps call it
        self.ends = time.monotonic() + arguments.seconds
        self.section, self.rows, self.seconds = "", [], dict[str, float]()
        self.card = torch.cuda.get_device_name() if self.is_cuda else "no GPU"
        versions = {"python": platform.python_version(), "transformers": transformers.__version__}
        self.machine = this_machine() | versions | {"card": self.card, "is_tiny": self.is_tiny}
        self.calibration = Calibration.load(arguments.calibration) if arguments.calibration else None

    def left(self) -> float:
        return self.ends - time.monotonic()

    def run(self, name: str, section: Callable[[Bench], None]) -> None:
        """One section; whatever happens in it is told, and over."""
        self.section, begun = name, time.monotonic()
        try:
            section(self)
        except OutOfTime:
            self.add("", note="the rest was not run: the time is over.")
        except Exception as error:
            self.add("", note=failure(error))
        self.free()
        self.seconds[name] = time.monotonic() - begun
        self.save()

    @contextmanager
    def case(self, name: str, least: float = LEAST_SECONDS) -> Iterator[None]:
        """A part of a section that may fail by itself, and is not begun in less than some seconds; its memory is free
        afterwards."""
        if self.left() < least:
            raise OutOfTime
        try:
            yield
        except OutOfTime:
            raise
        except Exception as error:
            self.add(name, note=failure(error))
        self.free()

    def free(self) -> None:
        gc.collect()
        if self.is_cuda:
            with suppress(RuntimeError):  # after an error that all later calls repeat
                torch.cuda.empty_cache()

    def add(self, case: str, **values: Any) -> None:
        self.rows.append(Row(self.section, case, **values))
        print(f"| {' | '.join(self.rows[-1].cells())} |", flush=True)
        self.save()

    def save(self) -> None:
        """All of it or nothing."""
        content = {"machine": self.machine, "seconds": self.seconds, "rows": [asdict(row) for row in self.rows]}
        descriptor, name = tempfile.mkstemp(dir=self.output.parent, prefix=self.output.name)
        with open(descriptor, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=1)
        os.replace(name, self.output)

    def wait(self) -> None:
        if self.is_cuda:
            torch.cuda.synchronize()

    def fastest(self, run: Callable[[], Any], times: int = 1, rounds: int = 3) -> tuple[float, float]:
        """Of some rounds of so many runs: ms of a run until all are done, and until the host has launched all."""
        found = []
        for _ in range(rounds + 1):
            self.wait()
            start = time.perf_counter()
            for _ in range(times):
                run()
            launched = time.perf_counter() - start
            self.wait()
            found.append((time.perf_counter() - start, launched))
        done, launched = min(found[1:])
        return done / times * 1e3, launched / times * 1e3

    def profiled(self, run: Callable[[], Any], times: int = 1) -> Profile | None:
        """Of a run; None without CUDA."""
        if not self.is_cuda:
            return None
        self.wait()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            for _ in range(times):
                run()
            self.wait()
        events = [event for event in profiler.events() if not event.is_user_annotation]
        names = [event.name for event in events if event.device_type == DeviceType.CPU]
        on_gpu = [event for event in events if event.device_type == DeviceType.CUDA]
        copies = [event for event in on_gpu if event.name.startswith(("Memcpy HtoD", "Memcpy DtoH"))]
        found = (
            sum(event.time_range.elapsed_us() for event in on_gpu) / 1e3,
            sum(name.startswith(LAUNCHES) for name in names),
            len(on_gpu) - len(copies),
            sum(name in WAITS for name in names),
            len(copies),
        )
        return Profile(*(value / times for value in found))

    def kernel_ms(self, run: Callable[[], Any]) -> float:
        """What a run takes of the GPU, however slowly it is launched; without CUDA by the clock."""
        return self.kernel(run)[0]

    def kernel(self, run: Callable[[], Any]) -> tuple[float, dict[str, float]]:
        """The same, with the counts of a `Profile`."""
        run()
        found = self.profiled(run, times=10)
        if found and found.ms:  # it sees nothing of the GPU where the driver keeps its counters
            return found.ms, found.counts()
        return self.fastest(run)[0], {}

    @cache  # noqa: B019
    def bandwidth(self) -> float:
        """Bytes a second, of reading what no cache holds."""
        values = torch.ones((2**24 if self.is_tiny else 2**31) // 4, device=self.device)
        return values.nbytes / self.kernel_ms(values.sum) * 1e3

    @cache  # noqa: B019
    def flops(self, name: str) -> float:
        """Multiplications and additions a second of two large matrices in a format: in 16 bit, where it has none."""
        size = 256 if self.is_tiny else 8192
        values = torch.randn(size, size, device=self.device).bfloat16()
        one = torch.ones((), device=self.device)
        codes = values.to({"int8": torch.int8, "fp8": FP8}.get(name, values.dtype))
        if not self.is_cuda or name == "nf4" or (name == "fp8" and torch.cuda.get_device_capability() < (8, 9)):
            run = partial(torch.mm, values, values.t())
        elif name == "fp8":
            options = {"scale_a": one, "scale_b": one, "out_dtype": torch.bfloat16}
            run = partial(torch._scaled_mm, codes, codes.t(), **options)
        else:
            run = partial(torch._int_mm if name == "int8" else torch.mm, codes, codes.t())
        return 2 * size**3 / self.kernel_ms(run) * 1e3


def failure(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"failed: {type(error).__name__}: {lines[0][:300] if lines else ''}".replace("|", "/")
