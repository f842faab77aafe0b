"""`skywork-hf verify A B`: whether two checkpoints hold the same model, whatever their layouts and dtypes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from ..headers import PLAIN_DTYPES
from ..quantization import formats
from ..quantization.checks import INPUT_SCALE_NAMES
from ..readers import Reader
from .inspection import activations_text, is_static
from .layouts import part_named
from .recipes import Source
from .sources import read_source

# Where the scales of a quantised weight lie beside it, and what they are multiplied by.
_SCALES = {"weight_scale": 1.0, "SCB": 1 / formats.INT8_MAX}
_BESIDE = ("_scale", ".SCB", ".weight_format")
_ACTIVATION_SCALES = "activation scales"
_FOUR_BITS = ".quant_state.bitsandbytes__"
# Fields of a config that change what is computed and no shape.
_FIELDS_COMPARED = (
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "rms_norm_eps",
    "rope_parameters",
    "max_position_embeddings",
    "sliding_window",
    "tie_word_embeddings",
    "num_experts_per_tok",
    "moe_use_logits_norm",
    "moe_gate_norm_std",
    "multiplies_input_by_top_k",
)


@dataclass(frozen=True)
class Difference:
    """How far a kind of tensor differs: the largest |a - b| / |a| (Frobenius norms), and of which tensor; infinite
    where that is no number."""

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
    fields: fields of the configs that change what is computed and differ, with both values; of `quantization_config`
        what becomes of activations, where the weights are stored alike.
    """

    differences: list[Difference]
    only_in_first: list[str]
    only_in_second: list[str]
    fields: dict[str, tuple[Any, Any]]

    @property
    def is_equal(self) -> bool:
        """Whether both hold the same tensors with the same values, of models that compute the same."""
        alone = self.only_in_first or self.only_in_second
        return not (alone or self.fields) and all(d.error == 0 for d in self.differences)

    def __str__(self) -> str:
        lines = [f"{'part':20}{'tensors':>8}{'largest relative error':>24}  of"]
        lines += [f"{d.part:20}{d.tensors:8}{d.error:24.3g}  {d.name}" for d in self.differences]
        for names, which in ((self.only_in_first, "first"), (self.only_in_second, "second")):
            if names:
                lines.append(f"only in the {which}: {', '.join(names[:5])}{' ...' if len(names) > 5 else ''}")
        lines += [
            f"config: `{field}` is {a} in the first and {b} in the second" for field, (a, b) in self.fields.items()
        ]
        return "\n".join(lines)


def compare_checkpoints(first: str | Path, second: str | Path) -> CheckpointComparison:
    """Compare tensor by tensor under the Hub's names, quantised weights by their real values, scales of activations
    where both models use them, and the configs.

    Raises:
        ValueError: one is not whole, or quantised in a way that is not read; or a tensor has another shape in the
            other.
    """
    sources = [read_source(Path(folder)) for folder in (first, second)]
    tensors = [_Tensors(source) for source in sources]
    names = [set(one.names) for one in tensors]
    compared = [*tensors[0].names, *tensors[0].activation_scales]
    others = names[1].union(tensors[1].activation_scales)
    worst: dict[str, Difference] = {}
    for name in tqdm([name for name in compared if name in others], desc="Comparing", unit="tensor"):
        a, b = (one.value(name) for one in tensors)
        if a.shape != b.shape:
            raise ValueError(f"`{name}` is {list(a.shape)} in {first} and {list(b.shape)} in {second}.")
        part = _ACTIVATION_SCALES if name in tensors[0].activation_scales else part_named(name)
        before = worst.get(part, Difference(part, 0, -1.0, name))
        error, of = max((before.error, before.name), (_relative_error(a, b), name))
        worst[part] = Difference(part, before.tensors + 1, error, of)
    return CheckpointComparison(
        list(worst.values()),
        sorted(names[0] - names[1]),
        sorted(names[1] - names[0]),
        _differing_fields(*(source.config for source in sources)),
    )


def _relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = (values.to(torch.promote_types(a.dtype, b.dtype)) for values in (a, b))
    if torch.allclose(a, b, rtol=0, atol=0, equal_nan=True):
        return 0.0
    # The squares of large and of small values are no numbers of float32.
    difference, norm = (float(torch.linalg.vector_norm(values, dtype=torch.float64)) for values in (a - b, a))
    error = difference / norm if norm else math.inf
    return error if math.isfinite(error) else math.inf  # a NaN would be smaller than nothing


def _differing_fields(first: Any, second: Any) -> dict[str, tuple[Any, Any]]:
    pairs = {field: (getattr(first, field, None), getattr(second, field, None)) for field in _FIELDS_COMPARED}
    schemes = [activations_text(_quantization(config)) for config in (first, second)]
    if schemes[0] and schemes[1] and schemes[0][0] == schemes[1][0]:
        pairs["quantization_config"] = (schemes[0][1], schemes[1][1])
    return {field: pair for field, pair in pairs.items() if pair[0] != pair[1]}


def _quantization(config: Any) -> dict[str, Any]:
    return getattr(config, "quantization_config", None) or {}


class _Tensors:
    """The real values of a checkpoint's tensors by their Hub names.

    Attributes:
        names: those of the model's own.
        activation_scales: the names of static scales of activations, in the newer of their spellings, with those that
            they are stored under; empty where the model does not use them.
    """

    def __init__(self, source: Source) -> None:
        self._reader = Reader()
        self._folder = source.folder
        self._recipes = {product.name: recipe for recipe in source.recipes for product in recipe.products}
        if any(_FOUR_BITS in name for name in self._recipes):
            raise ValueError(
                f"{source.folder} is in bitsandbytes' 4 bits, which are not compared: take the 16-bit one."
            )
        self.names = [name for name in self._recipes if not name.endswith(_BESIDE)]
        self.activation_scales = self._activation_scales() if is_static(_quantization(source.config)) else {}

    def _activation_scales(self) -> dict[str, str]:
        first = INPUT_SCALE_NAMES[0]
        return {
            f"{name.removesuffix(end)}{first}": name
            for end in reversed(INPUT_SCALE_NAMES)  # the first counts where both are there
            for name in self._recipes
            if name.endswith(f".{end}")
        }

    def value(self, name: str) -> torch.Tensor:
        """In float32, or in float64 where it is stored so."""
        if name in self.activation_scales:
            return self._stored(self.activation_scales[name]).float().reshape(())  # older files have [1]
        value = self._stored(name)
        if value.dtype in PLAIN_DTYPES:
            return value if value.dtype == torch.float64 else value.float()
        for end, factor in _SCALES.items():
            scale = f"{name.removesuffix('weight')}{end}"
            if scale in self._recipes and value.dtype in (torch.int8, formats.FP8):
                return formats.dequantize(value, self._stored(scale).float() * factor, torch.float32)
        raise ValueError(
            f"`{name}` in {self._folder} is stored as {value.dtype}, without a scale that is known here: take the "
            "16-bit checkpoint."
        )

    def _stored(self, name: str) -> torch.Tensor:
        recipe = self._recipes[name]
        values = recipe.values(self._reader.read(recipe.sources))
        return next(v for product, v in zip(recipe.products, values, strict=True) if product.name == name)
