"""What is to be planned, once the arguments are understood; kept with the plan, so that it can be changed and planned
again."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ..untrusted import naming
from .hardware import Device
from .memory import ModelParts, model_parts
from .precision import Precision, precision_of
from .usage import ExpertUsage


@dataclass(frozen=True)
class Request:
    """The arguments of `plan_device_map`, with budgets in bytes and nothing left to default."""

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

    @property
    def gpus(self) -> list[Device]:
        return [device for device in self.devices if device.is_gpu]

    @property
    def tokens(self) -> int:
        """Of all sequences together."""
        return self.context_tokens * self.batch_size

    def precision(self) -> Precision:
        return precision_of(self.config, self.quantization, self.dtype, list(self.devices))

    def parts(self) -> ModelParts:
        precision = self.precision()
        with naming(self.name or self.model_class.__name__):
            parts = model_parts(self.model_class, self.config, precision.dtype, precision.modules_to_not_convert)
        return parts if self.strategy == "experts" else replace(parts, layers=[layer.whole for layer in parts.layers])

    def with_gpus(self, like: Device, count: int) -> Request:
        """`count` more GPUs."""
        numbers = [device.key for device in self.devices if isinstance(device.key, int)]
        first = max(numbers, default=-1) + 1
        added = [replace(like, key=first + n) for n in range(count)]
        others = [device for device in self.devices if not device.is_gpu]
        return replace(self, devices=(*self.gpus, *added, *others), quantization=self._for_more_gpus())

    def with_budget(self, key: int | str, budget: int) -> Request:
        """Another budget for the CPU or the disk."""
        others = tuple(device for device in self.devices if device.key != key)
        known = next((device for device in self.devices if device.key == key), Device(key, "", 0, None, False))
        return replace(self, devices=(*others, replace(known, budget=budget)))

    def _for_more_gpus(self) -> Any:
        """`quantization`, saying of GPUs to come what it says of those there are."""
        if not isinstance(self.quantization, dict) or "quant_method" in self.quantization:
            return self.quantization
        first = next((self.quantization[gpu.key] for gpu in self.gpus if gpu.key in self.quantization), None)
        return self.quantization if first is None else {"gpu": first, **self.quantization}
