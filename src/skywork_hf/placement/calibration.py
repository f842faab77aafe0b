"""What `skywork-hf calibrate` has measured of a machine, as JSON; and the rates of a plan's devices, which are taken
from there or expected by tables."""

from __future__ import annotations

import json
import math
import os
import platform
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ..untrusted import read_json
from .devices import CPU, DISK, Device, Key, find_card
from .rates import (
    CPU_MEMORY,
    GPU_MEMORY,
    MEASURED_METHODS,
    PARTS,
    Disk,
    KernelRate,
    Rates,
    expected_cpu,
    expected_gpu,
    family,
)

_FORMAT = "skywork_hf calibration 1"
_BY_METHOD = ("layer", "expert")
_SPEEDS = ("memory", "elements", "attention", "bus", "streaming", "peer")
_TIMES = ("step", "wait", "latency")


@dataclass(frozen=True)
class Calibration:
    """A machine's speeds.

    Args:
        machine: what it is, and the versions of what ran; see `this_machine`.
        cpu: its CPU.
        gpus: its GPUs, in the order of their numbers.
        disk: None where it was not measured.
    """

    machine: dict[str, Any]
    cpu: Rates
    gpus: tuple[Rates, ...]
    disk: Disk | None

    def save(self, path: str | Path) -> None:
        """Write it as JSON, all of it or nothing."""
        path = Path(path)
        content = json.dumps(self.to_dict(), indent=1, allow_nan=False)
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)
        try:
            with open(descriptor, "w", encoding="utf-8") as file:
                file.write(content)
            os.replace(name, path)
        except BaseException:
            os.unlink(name)
            raise

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Read what `save` wrote.

        Raises:
            ValueError: the file is something else.
        """
        try:
            return cls.from_dict(read_json(Path(path)))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path} holds no calibration ({error}): write one with `skywork-hf calibrate`."
            ) from error

    def to_dict(self) -> dict[str, Any]:
        return {
            "format": _FORMAT,
            "machine": self.machine,
            "cpu": _rates_to_json(self.cpu),
            "gpus": [_rates_to_json(gpu) for gpu in self.gpus],
            "disk": self.disk and asdict(self.disk),
        }

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Calibration:
        """
        Raises:
            ValueError, KeyError, TypeError, AttributeError: it is something else.
        """
        if content["format"] != _FORMAT:
            raise ValueError(f"its format is {content['format']!r}, expected {_FORMAT!r}")
        disk = content["disk"]
        return cls(
            dict(content["machine"]),
            _rates_from_json(content["cpu"]),
            tuple(map(_rates_from_json, content["gpus"])),
            disk and Disk(_speed(disk["bandwidth"]), _time(disk["latency"])),
        )

    def completed(self, device: Device) -> Device:
        """A device of a plan, with the bandwidth that was measured where none is known."""
        if device.key == DISK:
            measured = self.disk.bandwidth if self.disk else None
        else:
            rates = self.cpu if device.key == CPU else _by_name(self.gpus).get(device.name)
            measured = rates.memory if rates else None
        return replace(device, bandwidth=device.bandwidth or measured)

    def check_is_of(self, machine: dict[str, Any]) -> None:
        """
        Raises:
            ValueError: it is of another machine, or of other versions; says what differs.
        """
        differing = [
            f"its {name} is {self.machine.get(name)!r} and here it is {value!r}"
            for name, value in machine.items()
            if self.machine.get(name) != value
        ]
        if differing:
            raise ValueError(
                f"The calibration is not of this machine and its versions: {', '.join(differing)}. Run `skywork-hf "
                "calibrate` here; a plan for other devices, which are given by name or size, takes it."
            )


def this_machine() -> dict[str, Any]:
    """What the figures of a calibration depend on."""
    gpus = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    return {
        "CPU": _cpu_name(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "GPUs": [card_name(torch.cuda.get_device_properties(number).name) for number in gpus],
        **{f"version of {name}": _version(name) for name in ("torch", "numba", "skywork-hf")},
    }


def card_name(name: str) -> str:
    """As plans call it."""
    return find_card(name) or name


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def rates_of(
    devices: Iterable[Device], dtype: torch.dtype, calibration: Calibration | None, guess: bool = False
) -> dict[Key, Rates]:
    """The rates of the devices that are known well enough: of the CPU those of the calibration, and of each GPU those
    of its card in it, by name; else by tables from its bandwidth, or, with `guess`, from a common one's.

    Args:
        dtype: of the model.
    """
    found: dict[Key, Rates] = {}
    by_key = {device.key: device for device in devices}
    cpu = by_key.get(CPU)
    cpu_memory = cpu and cpu.bandwidth
    if calibration:
        found[CPU] = _completed(calibration.cpu, expected_cpu(calibration.cpu.memory))
    elif cpu_memory or guess:
        found[CPU] = expected_cpu(cpu_memory or CPU_MEMORY)
    measured = _by_name(calibration.gpus if calibration else ())
    for key, device in by_key.items():
        memory = device.bandwidth or (GPU_MEMORY if guess else None)
        if not device.is_gpu or memory is None:
            continue
        by_tables = expected_gpu(device, memory, dtype, found[CPU].memory if CPU in found else CPU_MEMORY)
        card = measured.get(device.name)
        found[key] = _completed(card, by_tables) if card else by_tables
    return found


def _by_name(gpus: Iterable[Rates]) -> dict[str, Rates]:
    return {gpu.name: gpu for gpu in gpus if gpu.name}


def _completed(measured: Rates, expected: Rates) -> Rates:
    """What was measured, and methods that were not as tables have them."""
    known = measured.layer.keys()
    added = [method for method in expected.layer if method and not family(method, known)]
    return replace(
        measured,
        kernels=(*measured.kernels, *(rate for rate in expected.kernels if rate.method in added)),
        layer={**measured.layer, **{method: expected.layer[method] for method in added}},
        expert={**measured.expert, **{method: expected.expert[method] for method in added}},
    )


def _rates_to_json(rates: Rates) -> dict[str, Any]:
    """An infinite speed, which JSON has no number for, as null."""
    numbers = {name: getattr(rates, name) for name in (*_SPEEDS, *_TIMES)}
    return {
        "name": rates.name,
        **{name: None if math.isinf(value) else value for name, value in numbers.items()},
        **{name: getattr(rates, name) for name in _BY_METHOD},
        "kernels": [asdict(rate) for rate in rates.kernels],
    }


def _rates_from_json(content: dict[str, Any]) -> Rates:
    values: dict[str, Any] = {name: math.inf if content[name] is None else _speed(content[name]) for name in _SPEEDS}
    values |= {name: _time(content[name]) for name in _TIMES}
    values |= {name: {str(key): _time(value) for key, value in content[name].items()} for name in _BY_METHOD}
    kernels = tuple(map(_kernel_from_json, content["kernels"]))
    rates = Rates(name=str(content["name"]), is_measured=True, kernels=kernels, **values)
    known = {(rate.part, rate.method) for rate in kernels}
    for method in MEASURED_METHODS:
        if method not in rates.layer or method not in rates.expert or not {(part, method) for part in PARTS} <= known:
            raise ValueError(f"it says nothing of {method or '16 bit'}")
    return rates


def _kernel_from_json(content: dict[str, Any]) -> KernelRate:
    rate = KernelRate(**content)
    if not (isinstance(rate.rows, int) and rate.rows > 0):
        raise ValueError(f"`rows` is {rate.rows!r}, expected a positive integer")
    return replace(rate, seconds=_speed(rate.seconds), call=_time(rate.call))


def _speed(value: Any) -> float:
    if not value > 0:
        raise ValueError(f"{value!r} is no speed, expected a positive number")
    return float(value)


def _time(value: Any) -> float:
    if not value >= 0:
        raise ValueError(f"{value!r} is no time, expected seconds")
    return float(value)
