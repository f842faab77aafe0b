"""Devices: what common cards have, what this machine has, and how fast memory is read."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate.utils import convert_file_size_to_int
from transformers.integrations.accelerate import get_max_memory

GIB = 2**30
CPU, DISK = "cpu", "disk"
# A device as device maps write it: 0, 1, ... for GPUs, "cpu", "disk".
Key = int | str
FP8_CAPABILITY = (8, 9)
BF16_CAPABILITY = (8, 0)
# Bytes copied to measure a bandwidth: more than any cache holds.
_PROBE = 2**28
# No memory is slower, faster or larger; beyond these, times and sizes are no numbers.
_LEAST_SPEED, _MOST_SPEED, _MOST_MEMORY = 0.001, 1_000_000, 2**60
# What drivers and shops put before a name.
_MAKERS = ("nvidia", "geforce", "tesla", "quadro", "generation")


@dataclass(frozen=True)
class Card:
    """A graphics card: memory in GiB, bandwidth of that memory in GB/s, CUDA compute capability."""

    memory: float
    bandwidth: float
    capability: tuple[int, int]


# From NVIDIA's product pages and its table of compute capabilities (developer.nvidia.com/cuda-gpus).
CARDS = {
    "rtx3060": Card(12, 360, (8, 6)),
    "rtx3080": Card(10, 760, (8, 6)),
    "rtx3090": Card(24, 936, (8, 6)),
    "rtx3090ti": Card(24, 1008, (8, 6)),
    "rtx4060ti": Card(16, 288, (8, 9)),
    "rtx4070tisuper": Card(16, 672, (8, 9)),
    "rtx4080": Card(16, 717, (8, 9)),
    "rtx4090": Card(24, 1008, (8, 9)),
    "rtx5070ti": Card(16, 896, (12, 0)),
    "rtx5080": Card(16, 960, (12, 0)),
    "rtx5090": Card(32, 1792, (12, 0)),
    "rtxa6000": Card(48, 768, (8, 6)),
    "rtx6000ada": Card(48, 960, (8, 9)),
    "rtxpro6000": Card(96, 1792, (12, 0)),
    "p40": Card(24, 347, (6, 1)),
    "t4": Card(16, 320, (7, 5)),
    "v100": Card(32, 900, (7, 0)),
    "a10": Card(24, 600, (8, 6)),
    "a40": Card(48, 696, (8, 6)),
    "l4": Card(24, 300, (8, 9)),
    "l40s": Card(48, 864, (8, 9)),
    "a100": Card(80, 2039, (8, 0)),
    "a100-40gb": Card(40, 1555, (8, 0)),
    "h100": Card(80, 3350, (9, 0)),
    "h100-pcie": Card(80, 2000, (9, 0)),
    "h200": Card(141, 4800, (9, 0)),
}


@dataclass(frozen=True)
class Device:
    """One place for weights.

    Args:
        name: a card of `CARDS`, or what the machine calls it, or "".
        budget: bytes that may be used in all.
        bandwidth: of its memory, in bytes a second; None where nobody said.
        has_fp8_unit: whether it multiplies FP8; None where nobody said.
        has_bf16_unit: whether it multiplies bfloat16; None where nobody said.
    """

    key: Key
    name: str
    budget: int
    bandwidth: float | None = None
    has_fp8_unit: bool | None = None
    has_bf16_unit: bool | None = None

    @property
    def is_gpu(self) -> bool:
        return self.key not in (CPU, DISK)


def _find_card(name: str) -> str | None:
    """The key in `CARDS`, however the name is spelled (`RTX 4090`, `NVIDIA GeForce RTX 4090`), and whatever forms and
    memory sizes a driver puts around it."""
    words = [word for word in re.split(r"[\s_-]+", name.lower()) if word not in _MAKERS]
    variants = [word for word in words if word in ("pcie", "40gb")]
    plain = "".join(word for word in words if not re.fullmatch(r"\d+gb|hbm\d\w*|sxm\d*|pcie|nvl", word))
    return next((key for key in (*(f"{plain}-{word}" for word in variants), plain) if key in CARDS), None)


def devices_of(max_memory: dict[Any, Any] | None, bandwidth: dict[Any, float] | None = None) -> list[Device]:
    """The devices to plan for: GPUs in the order of their numbers, then the CPU, then the disk.

    Args:
        max_memory: as accelerate writes it, `{0: "22GiB", "cpu": "96GiB"}`: all that may be used on each device, in
            bytes or with a unit, or the name of a card, which then gives all three figures. None: what is free on the
            devices that are there.
        bandwidth: of the memory of some devices, in GB/s, where it is not known by the card's name.

    Raises:
        ValueError: a size, a device or a card that cannot be understood.
    """
    given = get_max_memory() if max_memory is None else max_memory
    given_bandwidth = {device_key(key): _speed(key, value) for key, value in (bandwidth or {}).items()}
    devices = [_device(device_key(key), value, given_bandwidth) for key, value in given.items()]
    if len({device.key for device in devices}) < len(devices):
        raise ValueError(f"`max_memory` names a device twice: {', '.join(map(str, given))}.")
    if unknown := given_bandwidth.keys() - {device.key for device in devices}:
        raise ValueError(f"`bandwidth` names {sorted(map(str, unknown))}, which `max_memory` does not have.")
    order = {CPU: 1, DISK: 2}
    # As strings of one length, since device keys may be numbers and names.
    return sorted(devices, key=lambda device: (order.get(str(device.key), 0), str(device.key).rjust(8)))


def device_key(key: Any) -> Key:
    """A device as plans call it: "cuda:1" is 1."""
    text = str(key).removeprefix("cuda:")
    if text.isdigit():
        return int(text)
    if text not in (CPU, DISK):
        try:
            torch.device(text)
        except RuntimeError:
            raise ValueError(f'{key!r} is no device: expected a GPU\'s number, "cpu" or "disk".') from None
    return text


def _device(key: Key, value: Any, bandwidth: dict[Key, float]) -> Device:
    if key in (CPU, DISK):
        return Device(key, "", _bytes(key, value), bandwidth.get(key), False)
    named = _find_card(value) if isinstance(value, str) else None
    if named is None and isinstance(value, str) and not re.match(r"[-+.\d]", value):
        raise ValueError(f"No card called {value!r} is known; expected one of {', '.join(CARDS)}, or a size as 24GiB.")
    here = _card_here(key)
    name, spec = (named, CARDS[named]) if named else here
    budget = int(CARDS[named].memory * GIB) if named else _bytes(key, value)
    speed = bandwidth.get(key, spec.bandwidth * 1e9 if spec else None)
    units = [spec.capability >= needed if spec else None for needed in (FP8_CAPABILITY, BF16_CAPABILITY)]
    return Device(key, name, budget, speed, *units)


def _speed(key: Any, value: float) -> float:
    """GB/s in bytes a second."""
    if not _LEAST_SPEED <= value <= _MOST_SPEED:
        raise ValueError(f"`bandwidth` of {key!r} is {value!r}: expected GB/s from {_LEAST_SPEED} to {_MOST_SPEED:,}.")
    return value * 1e9


def _bytes(key: Key, value: Any) -> int:
    try:
        size = int(convert_file_size_to_int(value) if isinstance(value, str) else value)
    except (ValueError, TypeError, OverflowError):
        raise ValueError(f"`max_memory` of {key!r} is {value!r}: expected bytes, or a size as '22GiB'.") from None
    if not 0 <= size <= _MOST_MEMORY:
        raise ValueError(
            f"`max_memory` of {key!r} is {value!r}: expected a size from 0 to {_MOST_MEMORY // GIB:,}GiB."
        )
    return size


def _card_here(key: Key) -> tuple[str, Card | None]:
    """The name and figures of the GPU with this number in this machine, as far as they are known."""
    if not (isinstance(key, int) and torch.cuda.is_available() and key < torch.cuda.device_count()):
        return "", None
    properties = torch.cuda.get_device_properties(key)
    known = _find_card(properties.name)
    capability = (properties.major, properties.minor)
    if known:
        return known, Card(CARDS[known].memory, CARDS[known].bandwidth, capability)
    return properties.name, Card(properties.total_memory / GIB, measured_bandwidth(f"cuda:{key}") / 1e9, capability)


def measured_bandwidth(device: str = CPU) -> float:
    """Bytes a second that all of a device's cores read from its memory: the fastest of some sums of 256 MiB."""
    probe = torch.ones(_PROBE // 4, device=device)
    return _PROBE / fastest_seconds(lambda: probe.sum().item())


def fastest_seconds(run: Callable[[], Any], rounds: int = 3) -> float:
    """Seconds of the fastest of some calls; `run` waits for its own result."""
    run()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def device_like(name: str, gpus: list[Device]) -> Device:
    """A GPU to add: a card by name, or a size, of a card that is otherwise as the first of `gpus`.

    Raises:
        ValueError: the name is of no known card and is no size.
    """
    try:
        new = _device(-1, name, {})
    except ValueError as error:
        raise ValueError(str(error).replace("`max_memory` of -1", "The card")) from None
    if new.name or not gpus:
        return new
    return replace(gpus[0], key=-1, budget=new.budget)
