"""What a decoded token has to read and by which kernels, and so how many tokens a second there can be at most."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import comb, prod
from typing import Any

import torch

from ..quantization import matmul
from .devices import Device, Key
from .precision import PLAIN
from .sizes import ModelParts, Part

# More sets of chosen experts than this are sampled, with a fixed seed; so many in each layer.
_MOST_SETS, _DRAWS = 2000, 200


@dataclass
class Reading:
    """One decoding step.

    Args:
        nbytes: by device, what a token reads there on average, weights and cache.
        seconds: by what is read, as ("experts", 0) for the experts of GPU 0, the time that it takes at the bandwidth
            of its device, where nothing else is waited for; None where a bandwidth is unknown.
    """

    nbytes: dict[Key, float]
    seconds: dict[tuple[str, Key], float] | None

    def tokens_per_second(self, batch_size: int) -> float | None:
        """The upper bound: no kernel reads faster, and everything else takes no time."""
        return batch_size / sum(self.seconds.values()) if self.seconds else None

    @property
    def bottleneck(self) -> tuple[str, Key, float] | None:
        """What takes most of the time, where, and its share of the time."""
        if not self.seconds:
            return None
        kind, key = max(self.seconds, key=lambda what: self.seconds[what])  # type: ignore[index]
        return kind, key, self.seconds[kind, key] / sum(self.seconds.values())


def expected_kernel(method: str, device: Device, dtype: torch.dtype, config: Any) -> str:
    """What an expert's linears run for one token where `method` holds them: "a+b" where they run two kernels, "a/b"
    where it is unknown which. Names are those of `quantization.matmul`, and "bitsandbytes"."""
    shapes = [(config.intermediate_size, config.hidden_size), (config.hidden_size, config.intermediate_size)]
    device_type = "cuda" if device.is_gpu else "cpu"
    if method.startswith("fp8"):
        scheme = "none" if method == "fp8-weight-only" else "dynamic"
        has_unit = [True, False] if device.has_fp8_unit is None else [device.has_fp8_unit]
        return "/".join(
            sorted(
                {
                    _joined(matmul.fp8_kernel(device_type, unit, dtype, 1, shape, scheme) for shape in shapes)
                    for unit in has_unit
                }
            )
        )
    if method == "int8":
        return _joined(matmul.int8_kernel(device_type, dtype, 1, shape, True) for shape in shapes)
    return matmul.linear_kernel(device_type, dtype, 1) if method == PLAIN else "bitsandbytes"


def _joined(names: Iterable[str]) -> str:
    return "+".join(sorted(set(names)))


def reading_of(
    parts: ModelParts,
    size: Callable[[Part, Key], int],
    devices: dict[Key, Device],
    dense: Sequence[Key],
    lm_head: Key,
    experts: Sequence[Sequence[Key]],
    tokens: tuple[int, int],
    loads: Sequence[Sequence[float]] | None,
) -> Reading:
    """What one step reads.

    Layers run one after another; the experts of a layer at the same time, so that the slowest device counts. Which
    experts are chosen together is taken to follow from how often each is chosen.

    Args:
        size: bytes of a part on a device.
        dense: the device of each layer's dense part.
        lm_head: that of the LM head, of which all is read; of the embeddings a token reads one row, which is nothing.
        experts: by layer, that of each expert.
        tokens: of the full cache, all sequences together, and the number of sequences.
        loads: by MoE layer, how often each expert is chosen; None for equally often.
    """
    context, batch = tokens
    nbytes: dict[Key, float] = defaultdict(float)
    seconds: dict[tuple[str, Key], float] = defaultdict(float)
    top_k = getattr(parts.config, "num_experts_per_tok", 0)

    def speed(key: Key) -> float:
        return devices[key].bandwidth or 0

    def read(kind: str, key: Key, amount: float) -> None:
        nbytes[key] += amount
        seconds[kind, key] += amount / speed(key) if speed(key) else 0

    # A tied LM head is the embeddings.
    tied = size(parts.embeddings, lm_head) if parts.is_tied else 0
    read("dense part", lm_head, size(parts.lm_head, lm_head) + tied)
    moe_layer = 0
    for layer, key, places in zip(parts.layers, dense, experts, strict=True):
        read("dense part", key, size(layer.dense, key) + parts.kv_bytes(context, batch))
        if not layer.experts:
            continue
        sizes = [size(expert, place) for expert, place in zip(layer.experts, places, strict=True)]
        load = loads[moe_layer] if loads else [1.0] * len(sizes)
        moe_layer += 1
        for chosen, probability in _chosen_sets(load, top_k, batch):
            there: dict[Key, float] = defaultdict(float)
            for expert in chosen:
                there[places[expert]] += sizes[expert] * probability
            for place, amount in there.items():
                nbytes[place] += amount
            slowest = max(there, key=lambda place: there[place] / speed(place) if speed(place) else 0)
            seconds["experts", slowest] += there[slowest] / speed(slowest) if speed(slowest) else 0
    unknown = any(amount and not speed(key) for key, amount in nbytes.items())
    return Reading(dict(nbytes), None if unknown else dict(seconds))


def _chosen_sets(load: Sequence[float], top_k: int, batch: int) -> Iterator[tuple[Sequence[int], float]]:
    """Sets of experts that a step may choose, with their probabilities, which sum to 1."""
    experts = range(len(load))
    if batch == 1 and comb(len(load), top_k) <= _MOST_SETS:
        sets = list(combinations(experts, top_k))
        weights = [prod(load[expert] for expert in chosen) for chosen in sets]
        if not any(weights):  # fewer experts were ever chosen than a token chooses
            weights = [1.0] * len(sets)
        total = sum(weights)
        return ((chosen, weight / total) for chosen, weight in zip(sets, weights, strict=True) if weight)
    draw = random.Random(0)
    return ((_draw(draw, load, top_k, batch), 1 / _DRAWS) for _ in range(_DRAWS))


def _draw(draw: random.Random, load: Sequence[float], top_k: int, batch: int) -> list[int]:
    """The experts that `batch` tokens choose, each `top_k` different ones (Efraimidis and Spirakis' keys)."""
    chosen: set[int] = set()
    chooseable = sum(map(bool, load))
    for _ in range(batch):
        if len(chosen) >= max(chooseable, top_k):
            break  # there are no others
        keys = [draw.random() ** (1 / weight) if weight else 0.0 for weight in load]
        chosen.update(sorted(range(len(load)), key=lambda expert: keys[expert])[-top_k:])
    return sorted(chosen)
