"""Changes of a checkpoint on its way: another dtype, quantised weights, experts from a dense model."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from ..configuration_skywork import SkyworkConfig, SkyworkMoeConfig
from ..headers import PLAIN_DTYPES
from ..quantization import formats
from ..quantization.config import SkyworkFp8Config, SkyworkInt8Config
from ..quantization.quantizers import linears_to_quantize
from .layouts import empty_model, hub_shapes
from .recipes import Product, Recipe, Source

# What `--quantization` may say, and what the target's `quantization_config` then is.
QUANTIZATIONS: dict[str, Callable[[], Any]] = {
    "int8": SkyworkInt8Config,
    "fp8": lambda: SkyworkFp8Config("dynamic"),
    "fp8-weight-only": lambda: SkyworkFp8Config("none"),
}


def is_quantized(source: Source) -> bool:
    return getattr(source.config, "quantization_config", None) is not None


def refuse_quantized(source: Source, what: str) -> None:
    """
    Raises:
        ValueError: the checkpoint is quantised already, or holds weights that are no floats.
    """
    if is_quantized(source):
        raise ValueError(f"{source.folder} is quantised already, so that {what} is not possible: take the 16-bit one.")
    for product in (product for recipe in source.recipes for product in recipe.products):
        if product.dtype not in PLAIN_DTYPES:
            raise ValueError(
                f"`{product.name}` in {source.folder} is stored as {_name_of(product.dtype)}, so that {what} is not "
                f"possible: expected one of {_PLAIN_NAMES}."
            )


def cast(source: Source, dtype: str | torch.dtype) -> Source:
    """Every tensor in another dtype.

    Raises:
        ValueError: `dtype` is no float that weights are stored in, or the checkpoint is quantised.
    """
    found = next((known for known in PLAIN_DTYPES if dtype in (known, _name_of(known))), None)
    if found is None:
        raise ValueError(f"`dtype`={dtype}: expected one of {_PLAIN_NAMES}.")
    refuse_quantized(source, "another dtype")
    return replace(
        source,
        config=_changed(source.config, dtype=found),
        recipes=[_cast(recipe, found) for recipe in source.recipes],
        changes=(*source.changes, f"cast to {_name_of(found)}"),
    )


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


_PLAIN_NAMES = ", ".join(map(_name_of, PLAIN_DTYPES))


def _cast(recipe: Recipe, dtype: torch.dtype) -> Recipe:
    if all(product.dtype == dtype for product in recipe.products):
        return recipe
    products = tuple(replace(product, dtype=dtype) for product in recipe.products)
    # Of the values before an earlier rounding, so that there is one.
    exact = recipe.make.exact if isinstance(recipe.make, Rounded) else recipe
    return Recipe(products, recipe.sources, Rounded(exact, products))


@dataclass(frozen=True)
class Rounded:
    """Makes what `exact` makes, in the dtypes of `products`.

    Raises:
        ValueError: a value would become infinite. Names the tensor.
    """

    exact: Recipe
    products: tuple[Product, ...]

    def __call__(self, sources: list[torch.Tensor]) -> list[torch.Tensor]:
        values = self.exact.values(sources)
        return [_rounded(product, value) for product, value in zip(self.products, values, strict=True)]


def _rounded(product: Product, value: torch.Tensor) -> torch.Tensor:
    made = value.to(product.dtype)
    most = torch.finfo(product.dtype).max
    # `aminmax` is ten times as fast as `isinf`, and in no memory.
    if most >= torch.finfo(value.dtype).max or all(end.isfinite() for end in made.aminmax()):
        return made
    if (made.isinf() & value.isfinite()).any():
        raise ValueError(
            f"`{product.name}` holds values beyond {most:.5g}, the largest of {_name_of(product.dtype)}: take a dtype "
            "with a larger range."
        )
    return made


def quantize(source: Source, method: str) -> Source:
    """Every attention and expert linear in one byte a weight, with its scale beside it, as loading it with
    `SkyworkInt8Config` or `SkyworkFp8Config` and saving it would write it.

    Raises:
        ValueError: `method` is none of `QUANTIZATIONS`, or the checkpoint is quantised already.
    """
    if method not in QUANTIZATIONS:
        raise ValueError(f"`quantization`={method!r} is unknown; expected one of {', '.join(QUANTIZATIONS)}.")
    refuse_quantized(source, "quantising it")
    linears = {f"{name}.weight" for name in linears_to_quantize(empty_model(source.config), None)}
    config = _changed(source.config, quantization_config=QUANTIZATIONS[method]())
    recipes = [_quantized(recipe, linears, method) for recipe in source.recipes]
    return replace(source, config=config, recipes=recipes, changes=(*source.changes, f"quantised to {method}"))


def _quantized(recipe: Recipe, linears: set[str], method: str) -> Recipe:
    chosen = [product.name in linears for product in recipe.products]
    if not any(chosen):
        return recipe
    products: list[Product] = []
    for product, becomes in zip(recipe.products, chosen, strict=True):
        products += _quantized_products(product, method) if becomes else [product]
    return Recipe(tuple(products), recipe.sources, partial(_make_quantized, recipe, chosen, method))


def _quantized_products(weight: Product, method: str) -> list[Product]:
    scale = weight.name.removesuffix("weight") + "weight_scale"
    if method == "int8":
        return [Product(weight.name, torch.int8, weight.shape), Product(scale, torch.bfloat16, weight.shape[:1])]
    return [Product(weight.name, formats.FP8, weight.shape), Product(scale, torch.float32, ())]


def _make_quantized(
    recipe: Recipe, chosen: list[bool], method: str, sources: list[torch.Tensor]
) -> list[torch.Tensor]:
    made = formats.quantize_int8 if method == "int8" else formats.quantize_fp8
    values: list[torch.Tensor] = []
    for product, value, becomes in zip(recipe.products, recipe.values(sources), chosen, strict=True):
        if not becomes:
            values.append(value)
            continue
        weight, scale = made(value)
        if not scale.isfinite().all():
            raise ValueError(f"`{product.name}` holds values that are not finite: it cannot be quantised.")
        values += [weight, scale]
    return values


def upcycle(
    source: Source, experts: int, top_k: int = 2, interval: int = 1, seed: int = 0, noise: float = 0.0, **fields: Any
) -> Source:
    """A MoE model from a dense one (tech report of Skywork-MoE, section 3): every expert starts as the dense
    feed-forward network, the gate at random. As the weights of the chosen experts sum to 1, the model computes what
    the dense one does until it is trained, but for `noise`.

    Args:
        experts: in each MoE layer.
        top_k: experts chosen for each token.
        interval: layer N becomes a MoE layer where (N + 1) % interval == 0.
        seed: of the gate and of the noise.
        noise: standard deviation of what is added to each expert's weights, as a share of their own; 0 to 1000.
        fields: of `SkyworkMoeConfig`, such as `moe_use_logits_norm`.

    Raises:
        ValueError: the checkpoint has experts, is quantised or is no causal language model; or an argument is out of
            its range.
    """
    if isinstance(source.config, SkyworkMoeConfig):
        raise ValueError(f"{source.folder} has experts already: upcycling starts from a dense checkpoint.")
    refuse_quantized(source, "upcycling")
    _check_arguments(source, experts, top_k, interval, noise)
    dense = source.config.to_dict()
    shape = {key: value for key, value in dense.items() if key not in ("model_type", "architectures")}
    config = SkyworkMoeConfig.from_dict(
        {**shape, "num_experts": experts, "num_experts_per_tok": top_k, "moe_expert_interval": interval, **fields}
    )
    config.dtype = source.config.dtype
    copied = [_upcycled(recipe, config, seed, noise) for recipe in source.recipes]
    recipes = [new for group in copied for new in group] + _gates(config, source.recipes[0].products[0].dtype, seed)
    order = {name: place for place, name in enumerate(hub_shapes(config))}
    if unknown := next((p.name for recipe in recipes for p in recipe.products if p.name not in order), None):
        raise ValueError(
            f"{source.folder} holds `{unknown}`, which a MoE model has no place for: upcycling starts from a causal "
            "language model, as `SkyworkForCausalLM` saves it."
        )
    recipes.sort(key=lambda recipe: order[recipe.products[0].name])
    change = f"upcycled: {experts} experts, top {top_k}, interval {interval}, seed {seed}, noise {noise}"
    return replace(source, config=config, recipes=recipes, changes=(*source.changes, change))


def _check_arguments(source: Source, experts: int, top_k: int, interval: int, noise: float) -> None:
    layers = source.config.num_hidden_layers
    if experts < 2:
        raise ValueError(f"`experts`={experts}: expected at least 2.")
    if not 1 <= top_k <= experts:
        raise ValueError(f"`top_k`={top_k}: expected 1 to `experts`={experts}.")
    if not 1 <= interval <= layers:
        raise ValueError(
            f"`interval`={interval} (--layers): expected 1 to {layers}, as {source.folder} has {layers} layers."
        )
    if not 0 <= noise <= _MOST_NOISE:
        raise ValueError(f"`noise`={noise}: expected a number from 0 to {_MOST_NOISE}.")


_MOST_NOISE = 1000  # nothing is left of weights long before; without a limit they overflow
_EXPERT_NAMES = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


def _upcycled(recipe: Recipe, config: SkyworkMoeConfig, seed: int, noise: float) -> list[Recipe]:
    """One recipe for each expert where the products are a MoE layer's feed-forward part."""
    name = recipe.products[0].name
    if ".mlp." not in name or not config.is_moe_layer(_layer_of(name)):
        return [recipe]
    return [
        Recipe(
            tuple(replace(product, name=_expert_name(product.name, expert)) for product in recipe.products),
            recipe.sources,
            partial(_make_expert, recipe, expert, seed, noise) if noise else recipe.make,
        )
        for expert in range(config.num_local_experts)
    ]


def _layer_of(name: str) -> int:
    return int(name.split("layers.")[1].split(".")[0])


def _expert_name(name: str, expert: int) -> str:
    head, _, tail = name.partition(".mlp.")
    part, _, end = tail.partition(".")
    return f"{head}.block_sparse_moe.experts.{expert}.{_EXPERT_NAMES[part]}.{end}"


def _make_expert(
    recipe: Recipe, expert: int, seed: int, noise: float, sources: list[torch.Tensor]
) -> list[torch.Tensor]:
    values = []
    for product, value in zip(recipe.products, recipe.values(sources), strict=True):
        random = _random(f"{product.name} {expert}", seed, product.shape)
        values.append(_rounded(product, value + noise * value.float().std() * random))
    return values


def _gates(config: SkyworkMoeConfig, dtype: torch.dtype, seed: int) -> list[Recipe]:
    """The gates' matrices, made of nothing but the seed."""
    shapes = {name: shape for name, shape in hub_shapes(config).items() if ".block_sparse_moe.gate." in name}
    gates = [Product(name, dtype, shape) for name, shape in shapes.items()]
    return [Recipe((gate,), (), partial(_make_gate, gate, config.initializer_range, seed)) for gate in gates]


def _make_gate(gate: Product, deviation: float, seed: int, sources: list[torch.Tensor]) -> list[torch.Tensor]:
    return [(deviation * _random(gate.name, seed, gate.shape)).to(gate.dtype)]


def _random(name: str, seed: int, shape: tuple[int, ...]) -> torch.Tensor:
    """Standard normal values that depend on the seed and the name alone, and not on what was made before."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8]))
    return torch.randn(shape, generator=generator)


def _changed(config: Any, **fields: Any) -> SkyworkConfig | SkyworkMoeConfig:
    changed = config.__class__.from_dict(config.to_dict())
    for name, value in fields.items():
        setattr(changed, name, value)
    return changed
