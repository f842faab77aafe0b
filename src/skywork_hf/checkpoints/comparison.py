"""`skywork-hf verify A B`: whether two checkpoints hold the same model, whatever their layouts and dtypes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm.auto import tqdm

from ..quantization import kernels
from .layouts import part_named
from .readers import Reader
from .recipes import Source
from .sources import read_source

_SCALE = "weight_scale"


@dataclass(frozen=True)
class Difference:
    """How far a kind of tensor differs: the largest |a - b| / |a| (Frobenius norms), and of which tensor."""

    part: str
    tensors: int
    error: float
    name: str


@dataclass(frozen=True)
class CheckpointComparison:
    """Args:
    differences: by part of the model.
    only_in_first: names of tensors, as the Hub has them.
    only_in_second: the same.
    """

    differences: list[Difference]
    only_in_first: list[str]
    only_in_second: list[str]

    @property
    def is_equal(self) -> bool:
        """Whether both hold the same tensors with the same values."""
        return not (self.only_in_first or self.only_in_second) and all(d.error == 0 for d in self.differences)

    def __str__(self) -> str:
        lines = [f"{'part':20}{'tensors':>8}{'largest relative error':>24}  of"]
        lines += [f"{d.part:20}{d.tensors:8}{d.error:24.3g}  {d.name}" for d in self.differences]
        for names, which in ((self.only_in_first, "first"), (self.only_in_second, "second")):
            if names:
                lines.append(f"only in the {which}: {', '.join(names[:5])}{' ...' if len(names) > 5 else ''}")
        return "\n".join(lines)


def compare_checkpoints(first: str | Path, second: str | Path) -> CheckpointComparison:
    """Compare tensor by tensor under the Hub's names; quantised weights by their real values, in float32.

    Raises:
        ValueError: one is not whole; or a tensor has another shape in the other.
    """
    tensors = [_Tensors(read_source(Path(folder))) for folder in (first, second)]
    names = [set(one.names) for one in tensors]
    worst: dict[str, Difference] = {}
    for name in tqdm([name for name in tensors[0].names if name in names[1]], desc="Comparing", unit="tensor"):
        a, b = (one.value(name) for one in tensors)
        if a.shape != b.shape:
            raise ValueError(f"`{name}` is {list(a.shape)} in {first} and {list(b.shape)} in {second}.")
        error = float((a - b).norm() / a.norm().clamp_min(torch.finfo(torch.float32).tiny))
        part = part_named(name)
        before = worst.get(part, Difference(part, 0, -1.0, name))
        error, of = max((before.error, before.name), (error, name))
        worst[part] = Difference(part, before.tensors + 1, error, of)
    only = [sorted(names[0] - names[1]), sorted(names[1] - names[0])]
    return CheckpointComparison(list(worst.values()), *only)


class _Tensors:
    """The real values of a checkpoint's tensors by their Hub names."""

    def __init__(self, source: Source) -> None:
        self._reader = Reader()
        self._recipes = {product.name: recipe for recipe in source.recipes for product in recipe.products}
        self.names = [name for name in self._recipes if not name.endswith(("_scale", ".SCB"))]

    def value(self, name: str) -> torch.Tensor:
        value = self._stored(name)
        scale = f"{name.removesuffix('weight')}{_SCALE}"
        if scale in self._recipes and value.dtype in (torch.int8, kernels.FP8):
            return kernels.dequantize(value, self._stored(scale), torch.float32)
        return value.float()

    def _stored(self, name: str) -> torch.Tensor:
        recipe = self._recipes[name]
        values = recipe.values(self._reader.read(recipe.sources))
        return next(v for product, v in zip(recipe.products, values, strict=True) if product.name == name)
