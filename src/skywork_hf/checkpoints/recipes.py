"""How the tensors of one checkpoint are made from those of another, before any of them is read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ..headers import StoredTensor

Make = Callable[[list[torch.Tensor]], list[torch.Tensor]]


@dataclass(frozen=True)
class Product:
    """A tensor that is to be written.

    Args:
        name: the Hub's name, until a layout renames it.
        dtype: what it will be stored in.
        shape: its shape.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class Recipe:
    """Products that are made together.

    Args:
        products: what is made, in order.
        sources: what it is made of, in order; empty for what is new.
        make: from the values of `sources` those of `products`; must be a function of these alone, as it is called
            again to verify and to resume. None: the only source is the only product, as it is stored.
    """

    products: tuple[Product, ...]
    sources: tuple[StoredTensor, ...]
    make: Make | None = None

    @property
    def nbytes(self) -> int:
        return sum(product.nbytes for product in self.products)

    def values(self, sources: list[torch.Tensor]) -> list[torch.Tensor]:
        return sources if self.make is None else self.make(sources)

    def renamed(self, rename: Callable[[str], str]) -> Recipe:
        return replace(self, products=tuple(replace(product, name=rename(product.name)) for product in self.products))


def unchanged(tensor: StoredTensor, name: str) -> Recipe:
    """A stored tensor under another name."""
    return Recipe((Product(name, tensor.dtype, tensor.shape),), (tensor,))


@dataclass
class Source:
    """A checkpoint, whatever its layout, as the Hub's would be made of it.

    Args:
        layout: "hub", "training", "llama" or "megatron".
        folder: where files beside the weights, such as the tokenizer's, are taken from.
        config: what `config.json` of the Hub's layout would say.
        recipes: one for each group of tensors of the model, under the Hub's names, in the model's order.
        ignored: stored tensors that nothing is made of, such as tables of rotary frequencies.
        tokenizer: the folder of the tokenizer, where it is another one.
        changes: what was done to the checkpoint that was read, a line each, with all that the result depends on and
            that neither `recipes` nor `config` show.
    """

    layout: str
    folder: Path
    config: Any
    recipes: list[Recipe]
    ignored: list[StoredTensor] = field(default_factory=list)
    tokenizer: Path | None = None
    changes: tuple[str, ...] = ()
