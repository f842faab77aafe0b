"""Devices: what common cards have, what this machine has, and how fast memory is read."""

from __future__ import annotations

import difflib
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate.utils import convert_file_size_to_int
from transformers.integrations.accelerate import get_max_memory

from ..quantization.cards import FP8_CAPABILITY, TRITON_CAPABILITY

GIB = 2**30
CPU, DISK = "cpu", "disk"
# A device as device maps write it: 0, 1, ... for GPUs, "cpu", "disk".
Key = int | str
BF16_CAPABILITY = (8, 0)
# Bytes copied to measure a bandwidth: more than any cache holds.
_PROBE = 2**28
# No memory is slower, faster or larger; beyond these, times and sizes are no numbers.
_LEAST_SPEED, _MOST_SPEED, _MOST_MEMORY = 0.001, 1_000_000, 2**60
# What drivers and shops put before a name.
_MAKERS = ("nvidia", "geforce", "tesla", "quadro", "generation")


@dataclass(frozen=True)
class Card:
    """A graphics card: what torch sees of its memory (`torch.cuda.get_device_properties`) in GiB, bandwidth of that
    memory in GB/s, CUDA compute capability."""

    memory: float
    bandwidth: float
    capability: tuple[int, int]


# Of cards for which no figure was found, the least share of the gigabytes on the box that was seen of their kind:
# GeForce cards, cards whose ECC takes its bits from GDDR memory, and those with HBM.
_GEFORCE, _WITH_ECC, _HBM = 0.965, 0.91, 0.984
# Memory: the least that a thread on GitHub reports on Linux (named beside it), with ECC on where cards are sold so. Of
# GeForce and RTX cards that were reported with drivers before 570 alone, 0.15 less, as later ones keep more (a 4090
# has 23.64 before and 23.49 after). The rest: NVIDIA's product pages and table of compute capabilities
# (developer.nvidia.com/cuda-gpus).
CARDS = {
    "rtx3060": Card(11.60, 360, (8, 6)),  # 11.75 before 570: Kunhao-Liu/StyleGaussian#12
    "rtx3080": Card(9.63, 760, (8, 6)),  # 9.78 before 570: zai-org/CogVideo#34
    "rtx3090": Card(23.56, 936, (8, 6)),  # noonghunna/club-3090#58
    "rtx3090ti": Card(24 * _GEFORCE, 1008, (8, 6)),
    "rtx4060ti": Card(15.55, 288, (8, 9)),  # boson-ai/higgs-audio#48
    "rtx4070ti": Card(11.58, 504, (8, 9)),  # 11.73 before 570: OpenLMLab/LOMO#17
    "rtx4070tisuper": Card(16 * _GEFORCE, 672, (8, 9)),
    "rtx4080": Card(16 * _GEFORCE, 717, (8, 9)),
    "rtx4090": Card(23.49, 1008, (8, 9)),  # Sautenich/UAV-VLA#7
    "rtx5060ti": Card(15.44, 448, (12, 0)),  # Luce-Org/lucebox#407
    "rtx5070ti": Card(16 * _GEFORCE, 896, (12, 0)),
    "rtx5080": Card(16 * _GEFORCE, 960, (12, 0)),
    "rtx5090": Card(31.35, 1792, (12, 0)),  # ggml-org/llama.cpp#17536
    "rtxa4000": Card(15.61, 448, (8, 6)),  # DengKaiCQ/VGGT-Long#6
    "rtxa6000": Card(47.38, 768, (8, 6)),  # 47.53 before 570: allenai/open-instruct#163
    "rtx6000ada": Card(44.43, 960, (8, 9)),  # DINGYANB/MTVCrafter#21
    "rtxpro6000": Card(94.97, 1792, (12, 0)),  # antirez/ds4#431
    "p40": Card(22.38, 347, (6, 1)),  # XPixelGroup/BasicSR#188; 23.87 without ECC: ToTheBeginning/PuLID#110
    "t4": Card(14.56, 320, (7, 5)),  # AlphaGPU/leetgpu-challenges#52
    "v100": Card(31.74, 900, (7, 0)),  # liucongg/ChatGLM-Finetuning#73
    "a10": Card(24 * _WITH_ECC, 600, (8, 6)),
    "a30": Card(23.53, 933, (8, 0)),  # google/RB-Modulation#5
    "a40": Card(44.35, 696, (8, 6)),  # ollama/ollama#9858
    "l4": Card(21.96, 300, (8, 9)),  # rhymes-ai/Aria#24
    "l40": Card(44.40, 864, (8, 9)),  # NVlabs/Eagle#68
    "l40s": Card(44.42, 864, (8, 9)),  # stepfun-ai/Step-Video-T2V#8
    "a100": Card(79.14, 2039, (8, 0)),  # lianqi1008/Control-GIC#6
    "a100-40gb": Card(39.39, 1555, (8, 0)),  # bottlerocket-os/bottlerocket#3873
    "h100": Card(79.11, 3350, (9, 0)),  # vllm-project/vllm#27508
    "h100-pcie": Card(80 * _HBM, 2000, (9, 0)),
    "h200": Card(141 * _HBM, 4800, (9, 0)),
}

# What torch sees of a GPU and no planned tensor can be in, in GiB. transformers too leaves 1.2 GiB alone
# (huggingface/transformers#37436).
_CONTEXT = "CUDA's context"
MARGIN = {
    _CONTEXT: 0.45,  # with kernels 0.4 to 0.6, by the threads above: in use, and neither allocated nor reserved
    "kernels": 0.15,  # loaded when they are first called
    "cuBLAS": 0.125,  # its workspace and cuBLASLt's: 32 MiB each on Hopper, less before, on two streams
    "peers": 0.05,  # tables of the memory of other GPUs and of pinned memory
    "fragments": 0.5,  # reserved, and not allocated: up to 0.5 in most of these threads
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
        has_triton: whether it runs the Triton kernels; None where nobody said.
        has_context: whether `budget` is what CUDA's context has left.
    """

    key: Key
    name: str
    budget: int
    bandwidth: float | None = None
    has_fp8_unit: bool | None = None
    has_bf16_unit: bool | None = None
    has_triton: bool | None = None
    has_context: bool = False

    @property
    def is_gpu(self) -> bool:
        return self.key not in (CPU, DISK)

    @property
    def margin_by_kind(self) -> dict[str, float]:
        """GiB of the budget that nothing is planned in: see `MARGIN`."""
        kinds = MARGIN.items() if self.is_gpu else ()
        return {kind: size for kind, size in kinds if kind != _CONTEXT or not self.has_context}

    @property
    def margin(self) -> int:
        """The same in bytes, together."""
        return int(GIB * sum(self.margin_by_kind.values()))


def find_card(name: str) -> str | None:
    """The key in `CARDS`, however the name is spelled (`RTX 4090`, `NVIDIA GeForce RTX 4090`), and whatever forms and
    memory sizes a driver puts around it."""
    return next((key for key in _spellings(name) if key in CARDS), None)


def _spellings(name: str) -> list[str]:
    """What `CARDS` may call a card, the closest first."""
    words = [word for word in re.split(r"[\s_-]+", name.lower()) if word not in _MAKERS]
    variants = [word for word in words if word in ("pcie", "40gb")]
    plain = "".join(word for word in words if not re.fullmatch(r"\d+gb|hbm\d\w*|sxm\d*|pcie|nvl", word))
    return [*(f"{plain}-{word}" for word in variants), plain]


def _unknown_card(name: str) -> ValueError:
    near = difflib.get_close_matches(_spellings(name)[-1], CARDS)
    nearest = f"the nearest are {', '.join(near)}; " if near else ""
    return ValueError(
        f"No card called {name!r} is known: {nearest}expected one of {', '.join(CARDS)}, or a size as 24GiB."
    )


def devices_of(
    max_memory: dict[Any, Any] | None, bandwidth: dict[Any, float] | None = None, here: bool = False
) -> list[Device]:
    """The devices to plan for: GPUs in the order of their numbers, then the CPU, then the disk.

    Args:
        max_memory: as accelerate writes it, `{0: "22GiB", "cpu": "96GiB"}`: all that may be used on each device, in
            bytes or with a unit, or the name of a card, which stands for what torch sees on it. None: what is free on
            the devices that are there, beside the contexts that looking there has made.
        bandwidth: of the memory of some devices, in GB/s, where it is not known by the card's name.
        here: whether sizes are of the GPUs of this machine, which then tell what they are; those of other machines
            are of cards of which nothing else is known.

    Raises:
        ValueError: a size, a device or a card that cannot be understood.
    """
    given = get_max_memory() if max_memory is None else max_memory
    given_bandwidth = {device_key(key): _speed(key, value) for key, value in (bandwidth or {}).items()}
    here = here or max_memory is None
    devices = [_device(device_key(key), value, given_bandwidth, here) for key, value in given.items()]
    devices = [replace(device, has_context=device.is_gpu and max_memory is None) for device in devices]
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


def _device(key: Key, value: Any, bandwidth: dict[Key, float], here: bool = False) -> Device:
    if key in (CPU, DISK):
        return Device(key, "", _bytes(key, value), bandwidth.get(key), False)
    named = find_card(value) if isinstance(value, str) else None
    if named is None and isinstance(value, str) and not re.match(r"[-+.\d]", value):
        raise _unknown_card(value)
    name, spec = (named, CARDS[named]) if named else card_here(key) if here else ("", None)
    budget = int(CARDS[named].memory * GIB) if named else _bytes(key, value)
    speed = bandwidth.get(key, spec.bandwidth * 1e9 if spec else None)
    needed = (FP8_CAPABILITY, BF16_CAPABILITY, TRITON_CAPABILITY)
    fp8, bf16, triton = (spec.capability >= least if spec else None for least in needed)
    return Device(key, name, budget, speed, fp8, bf16, triton)


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


def card_here(key: Key) -> tuple[str, Card | None]:
    """The name and figures of the GPU with this number in this machine, as far as they are known."""
    if not (isinstance(key, int) and torch.cuda.is_available() and key < torch.cuda.device_count()):
        return "", None
    properties = torch.cuda.get_device_properties(key)
    known = find_card(properties.name)
    bandwidth = CARDS[known].bandwidth if known else measured_bandwidth(f"cuda:{key}") / 1e9
    capability = (properties.major, properties.minor)
    return known or properties.name, Card(properties.total_memory / GIB, bandwidth, capability)


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
