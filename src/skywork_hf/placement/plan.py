"""A finished plan: what `from_pretrained` is to be given, and everything that a person wants to know of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..quantization import matmul
from .hardware import CPU, GIB, Device, device_like
from .placer import Placement, place
from .precision import PLAIN
from .request import Request
from .spread import DoesNotFit, Key


@dataclass(frozen=True)
class PlacementPlan:
    """Where each part and each expert of a model goes, in bytes.

    Args:
        request: what was planned.
        placement: the device map, the bytes by device and kind, and what a decoded token reads.
    """

    request: Request
    placement: Placement

    @classmethod
    def of(cls, request: Request) -> PlacementPlan:
        """Plan it.

        Raises:
            DoesNotFit: not within its budgets.
        """
        return cls(request, place(request, request.parts()))

    @property
    def title(self) -> str:
        """The model, and the sequences that were planned for."""
        request = self.request
        count = "one sequence" if request.batch_size == 1 else f"{request.batch_size} sequences"
        return f"{request.name or request.model_class.__name__}: {count} of {request.context_tokens:,} tokens"

    @property
    def device_map(self) -> dict[str, Key]:
        """Module names to devices, for `from_pretrained`."""
        return self.placement.device_map

    @property
    def quantization_config(self) -> Any:
        """For `from_pretrained`; None where the checkpoint needs none."""
        return self.request.precision().config

    @property
    def dtype(self) -> torch.dtype:
        """Of what is not quantised, for `from_pretrained`."""
        return self.request.precision().dtype

    @property
    def bytes_per_device(self) -> dict[Key, dict[str, int]]:
        """Bytes by device and kind: dense, experts, cache, working, context."""
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

    def experts_on(self, *keys: Key) -> int:
        """How many experts these devices hold."""
        return sum(key in keys for layer in self.placement.experts for key in layer)

    def weight_bytes(self, key: Key) -> int:
        """Bytes of parameters and buffers on a device."""
        kinds = self.placement.nbytes[key]
        return kinds["dense"] + kinds["experts"]

    def kernel(self, key: Key) -> str:
        """What an expert on this device runs for one token: a name of `quantization.matmul`, "linear" for weights
        that are not quantised, or "bitsandbytes"."""
        device = next(device for device in self.request.devices if device.key == key)
        precision = self.request.precision()
        return expected_kernel(precision.methods.get(key, PLAIN), device, precision.dtype, self.request.config)

    def will_it_help(self, card: str) -> Comparison:
        """What one more GPU would change; print it.

        Args:
            card: the name of a known card, as "rtx3090", or a size as "24GiB" of a card as fast as the first GPU.

        Raises:
            ValueError: no such card is known, or with it the weights cannot stay where they are.
        """
        more = self.request.with_gpus(device_like(card, self.request.gpus), 1)
        try:
            return Comparison(card, self, PlacementPlan.of(more))
        except DoesNotFit as error:  # as bitsandbytes' weights, which cannot stay on the CPU beside a GPU
            raise ValueError(
                f"With a {card} the model no longer fits: {error.shortfall / GIB:.4g} GiB are missing on GPUs."
            ) from None

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON."""
        from .saving import save  # which has to know this class

        save(self, path)

    @staticmethod
    def load(path: str | Path) -> PlacementPlan:
        """Read what `save` wrote.

        Raises:
            ValueError: the file is something else.
        """
        from .saving import load

        return load(path)

    def draw(self, path: str | Path) -> None:
        """Write the picture, layers by experts in the colours of their devices, as an image. Needs matplotlib."""
        from .picture import draw_plan

        draw_plan(self, path)

    def __str__(self) -> str:
        """The table of devices, the map in letters, and the bound."""
        from .text import describe

        return describe(self)


@dataclass(frozen=True)
class Comparison:
    """A plan, and the one with a card more."""

    card: str
    before: PlacementPlan
    after: PlacementPlan

    @property
    def gib(self) -> float:
        """GiB that the card adds."""
        budgets = [sum(gpu.budget for gpu in plan.request.gpus) for plan in (self.before, self.after)]
        return (budgets[1] - budgets[0]) / GIB

    @property
    def experts_moved_off_the_cpu(self) -> int:
        return self.before.experts_on(CPU) - self.after.experts_on(CPU)

    def __str__(self) -> str:
        from .text import compare

        return compare(self)


def expected_kernel(method: str, device: Device, dtype: torch.dtype, config: Any) -> str:
    """What an expert's linears run for one token where `method` holds them: "a+b" where they run two kernels, "a/b"
    where it is unknown which. See `PlacementPlan.kernel`."""
    shapes = [(config.intermediate_size, config.hidden_size), (config.hidden_size, config.intermediate_size)]
    if method.startswith("fp8"):
        scheme = "none" if method == "fp8-weight-only" else "dynamic"
        has_unit = [True, False] if device.has_fp8_unit is None else [device.has_fp8_unit]
        return "/".join(
            sorted({_joined(matmul.fp8_kernel(unit, shape, scheme) for shape in shapes) for unit in has_unit})
        )
    if method == "int8":
        device_type = "cuda" if device.is_gpu else "cpu"
        return _joined(matmul.int8_kernel(device_type, dtype, 1, shape, True) for shape in shapes)
    return "linear" if method == PLAIN else "bitsandbytes"


def _joined(names: Iterable[str]) -> str:
    return "+".join(sorted(set(names)))
