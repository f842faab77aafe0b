"""Plain data: what is asked, what was found, and what follows from the two."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from ..untrusted import naming
from .calibration import Calibration
from .devices import Device, Key
from .precision import PLAIN, Precision, precision_of
from .sizes import ModelParts, model_parts
from .speed import Expected, Reading, expected_kernel
from .usage import ExpertUsage

# What bytes are counted by.
KINDS = ("dense", "experts", "cache", "working", "margin")


@dataclass(frozen=True)
class Request:
    """The arguments of `plan_device_map`, with budgets in bytes and nothing left to default; kept with the plan, so
    that it can be changed and planned again."""

    name: str
    config: Any
    model_class: Any
    devices: tuple[Device, ...]
    quantization: Any
    dtype: Any
    context_tokens: int
    batch_size: int
    strategy: str
    usage: ExpertUsage | None
    stream_from_rows: int | None
    kv_cache_dtype: str | None
    calibration: Calibration | None

    @property
    def gpus(self) -> list[Device]:
        return [device for device in self.devices if device.is_gpu]

    @property
    def tokens(self) -> int:
        """Of all sequences together."""
        return self.context_tokens * self.batch_size

    @property
    def title(self) -> str:
        """The model, and the sequences that are planned for."""
        count = "one sequence" if self.batch_size == 1 else f"{self.batch_size} sequences"
        cache = f", KV cache in {self.kv_cache_dtype}" if self.kv_cache_dtype else ""
        return f"{self.name}: {count} of {self.context_tokens:,} tokens{cache}"

    @cached_property
    def precision(self) -> Precision:
        return precision_of(self.config, self.quantization, self.dtype, list(self.devices))

    @cached_property
    def parts(self) -> ModelParts:
        dtype, kept = self.precision.dtype, self.precision.modules_to_not_convert
        with naming(self.name):
            parts = model_parts(self.model_class, self.config, dtype, kept, self.kv_cache_dtype)
        return parts if self.strategy == "experts" else replace(parts, layers=[layer.whole for layer in parts.layers])


@dataclass
class Placement:
    """Where everything goes.

    Args:
        device_map: module names to devices.
        dense: the device of each layer's dense part.
        experts: by layer, the device of each expert; empty for a layer without.
        nbytes: by device and kind (`KINDS`).
        reading: what a decoded token reads.
        expected: what steps are expected to take; None where the speed of a device is unknown.
        stream_from_rows: from how many rows on experts of the CPU are copied to their layer's GPU; None for never.
    """

    device_map: dict[str, Key]
    dense: list[Key]
    experts: list[list[Key]]
    nbytes: dict[Key, dict[str, int]]
    reading: Reading
    expected: Expected | None
    stream_from_rows: int | None


@dataclass(frozen=True)
class Solution:
    """A request that was placed.

    Args:
        request: what was planned.
        placement: the device map, the bytes by device and kind, and what a decoded token reads.
    """

    request: Request
    placement: Placement

    @property
    def bytes_per_device(self) -> dict[Key, dict[str, int]]:
        """Bytes by device and kind: dense, experts, cache, working, margin."""
        return self.placement.nbytes

    @property
    def bytes_read_per_token(self) -> dict[Key, float]:
        """By device, what decoding a token reads there on average: weights, and the cache when it is full."""
        read = self.placement.reading.nbytes
        return {key: amount / self.request.batch_size for key, amount in read.items()}

    @property
    def tokens_per_second(self) -> float | None:
        """The bound that the bandwidths set; None where one is unknown."""
        return self.placement.reading.tokens_per_second(self.request.batch_size)

    @property
    def expected_tokens_per_second(self) -> float | None:
        """While decoding, all sequences together, by the kernels that run; None where a device's speed is unknown."""
        expected = self.placement.expected
        return self.request.batch_size / sum(expected.decode.values()) if expected else None

    def experts_on(self, *keys: Key) -> int:
        """How many experts these devices hold."""
        return sum(key in keys for layer in self.placement.experts for key in layer)

    def weight_bytes(self, key: Key) -> int:
        """Bytes of parameters and buffers on a device."""
        kinds = self.placement.nbytes[key]
        return kinds["dense"] + kinds["experts"]

    def kernel(self, key: Key) -> str:
        """What an expert on this device runs for one token: see `expected_kernel`."""
        device = next(device for device in self.request.devices if device.key == key)
        precision = self.request.precision
        return expected_kernel(precision.methods.get(key, PLAIN), device, precision.dtype, self.request.config)
