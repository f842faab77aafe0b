"""Merging an adapter of PEFT into the weights on their way, module by module. PEFT does the arithmetic."""

from __future__ import annotations

import hashlib
import warnings
from collections import defaultdict
from copy import copy, deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..headers import StoredTensor, read_headers
from .inspection import TOKENIZER_FILES, read_json
from .recipes import Product, Recipe, Source, unchanged
from .transforms import refuse_quantized

_CONFIG = "adapter_config.json"
_PREFIX = "base_model.model."
_TOKENS = ".trainable_tokens_"
_MARKS = (".lora_", ".ia3_", _TOKENS)
# PEFT's kinds that change the weight of a module by what the adapter holds of it.
_MERGEABLE = ("LORA", "ADALORA", "IA3", "TRAINABLE_TOKENS")
# What such an adapter may ask for beside, and why that is no change of a weight.
_NOT_MERGEABLE = {
    "target_parameters": "adapts 3-D parameters",
    "layer_replication": "makes a model of more layers",
    "lora_bias": "adds biases, which Skywork's linear layers do not have",
    "alora_invocation_tokens": "works from a token on",
    "arrow_config": "routes between adapters",
}
_EMBEDDINGS, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


def merge_adapter(source: Source, folder: Path) -> Source:
    """The checkpoint with an adapter merged into it, and with the vocabulary and the tokenizer of its training, where
    these lie beside the adapter.

    Args:
        folder: with `adapter_config.json` and `adapter_model.safetensors`.

    Raises:
        ImportError: PEFT is not installed.
        ValueError: the checkpoint is quantised; or the adapter is of another model, of a kind that does not change
            modules one by one, or not whole. Names the file and the field.
    """
    config = _peft_config(folder)
    refuse_quantized(source, "merging an adapter")
    adapted: dict[str, list[StoredTensor]] = defaultdict(list)
    replaced: dict[str, StoredTensor] = {}
    for name, tensor in read_headers([_weights(folder)]).items():
        path = name.removeprefix(_PREFIX).replace(".token_adapter.", ".")
        mark = next((mark for mark in _MARKS if mark in path), None)
        if mark:
            adapted[f"{path.partition(mark)[0]}.weight"].append(tensor)
        else:  # of `modules_to_save`, or embeddings, which PEFT saves in case that they were made larger
            replaced[path.replace(".base_layer.", ".")] = tensor
    recipes = [_merged(recipe, adapted, replaced, config) for recipe in source.recipes]
    known = {product.name for recipe in source.recipes for product in recipe.products}
    if unknown := sorted((adapted.keys() | replaced.keys()) - known):
        raise ValueError(
            f"{folder} adapts `{unknown[0]}` and {len(unknown) - 1} more that {source.folder} does not have: it was "
            "trained on another model."
        )
    pairs = zip(source.recipes, recipes, strict=True)
    unused = [tensor for before, after in pairs for tensor in before.sources if tensor not in after.sources]
    has_tokenizer = any((folder / name).is_file() for name in TOKENIZER_FILES)
    return replace(
        source,
        recipes=recipes,
        ignored=[*source.ignored, *unused],
        config=_with_vocabulary(source.config, recipes),
        tokenizer=folder if has_tokenizer else source.tokenizer,
        changes=(*source.changes, f"merged {folder.name}, SHA-256 of its config {_config_digest(folder)}"),
    )


def _config_digest(folder: Path) -> str:
    return hashlib.sha256((folder / _CONFIG).read_bytes()).hexdigest()


def _with_vocabulary(config: Any, recipes: list[Recipe]) -> Any:
    """The config of the checkpoint, whose embeddings may have been made larger."""
    rows = {product.name: product.shape[0] for recipe in recipes for product in recipe.products}
    if rows.get(_EMBEDDINGS) != rows.get(_HEAD, rows.get(_EMBEDDINGS)):
        raise ValueError(
            f"The merged `{_EMBEDDINGS}` has {rows[_EMBEDDINGS]} rows and `{_HEAD}` {rows[_HEAD]}: the adapter holds "
            "one of them only. Save it with `save_embedding_layers=True`."
        )
    config = deepcopy(config)
    config.vocab_size = rows.get(_EMBEDDINGS, config.vocab_size)
    return config


def _peft_config(folder: Path) -> Any:
    try:
        from peft import PeftConfig
    except ImportError as error:
        raise ImportError('Merging an adapter needs PEFT: pip install "skywork-hf[peft]".') from error
    file = folder / _CONFIG
    if not file.is_file():
        raise ValueError(f"{folder} holds no {_CONFIG}: expected the folder of a PEFT adapter.")
    raw = read_json(file)
    if raw.get("peft_type") not in _MERGEABLE:
        raise ValueError(
            f"{file} is of a {raw.get('peft_type')!r} adapter: expected `peft_type` {', '.join(_MERGEABLE)}, which "
            "are merged module by module; load it with PEFT's `PeftModel` instead."
        )
    for field, why in _NOT_MERGEABLE.items():
        if raw.get(field):
            raise ValueError(f"{file} has `{field}`, which {why}: load the adapter with PEFT's `PeftModel` instead.")
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file} is nothing that PEFT reads ({error}): download or write it again.") from error
    config.task_type = None  # which would wrap a whole model
    return config


def _weights(folder: Path) -> Path:
    for name in ("adapter_model.safetensors", "adapter_model.bin"):
        if (folder / name).is_file():
            return folder / name
    raise ValueError(f"{folder} holds no adapter_model.safetensors: expected the folder of a PEFT adapter.")


def _merged(
    recipe: Recipe, adapted: dict[str, list[StoredTensor]], replaced: dict[str, StoredTensor], config: Any
) -> Recipe:
    recipe = _replaced(recipe, [replaced.get(product.name) for product in recipe.products])
    tensors = [tensor for product in recipe.products for tensor in adapted.get(product.name, [])]
    if not tensors:
        return recipe
    return Recipe(recipe.products, (*recipe.sources, *tensors), partial(_make_merged, recipe, tensors, config))


def _replaced(recipe: Recipe, whole: list[StoredTensor | None]) -> Recipe:
    """With the tensors that the adapter holds whole, if any, in place of those products."""
    if not any(whole):
        return recipe
    pairs = list(zip(recipe.products, whole, strict=True))
    products = tuple(_replacement(product, tensor) if tensor else product for product, tensor in pairs)
    tensors = tuple(tensor for tensor in whole if tensor)
    if len(pairs) == 1 and tensors[0].dtype == products[0].dtype:
        return unchanged(tensors[0], products[0].name)
    kept = () if all(whole) else recipe.sources
    return Recipe(products, (*kept, *tensors), partial(_make_replaced, recipe, [tensor is None for tensor in whole]))


def _replacement(product: Product, tensor: StoredTensor) -> Product:
    """In the checkpoint's dtype."""
    compared = slice(1 if product.name in (_EMBEDDINGS, _HEAD) else 0, None)  # these may have more rows now
    if tensor.shape[compared] != product.shape[compared]:
        raise ValueError(f"{tensor} is {list(tensor.shape)}, and `{product.name}` is {list(product.shape)}.")
    return replace(product, shape=tensor.shape)


def _make_replaced(recipe: Recipe, stays: list[bool], sources: list[torch.Tensor]) -> list[torch.Tensor]:
    count = len(recipe.sources) if any(stays) else 0
    made = recipe.values(sources[:count]) if count else []
    tensors = iter(sources[count:])
    return [
        made[place] if stays[place] else next(tensors).to(product.dtype)
        for place, product in enumerate(recipe.products)
    ]


def _make_merged(
    recipe: Recipe, tensors: list[StoredTensor], config: Any, sources: list[torch.Tensor]
) -> list[torch.Tensor]:
    """Merge in float32: rounding to 16 bit comes once, at the end."""
    count = len(recipe.sources)
    state = {tensor.name: value for tensor, value in zip(tensors, sources[count:], strict=True)}
    merged = []
    for product, value in zip(recipe.products, recipe.values(sources[:count]), strict=True):
        path = product.name.removesuffix(".weight")
        own = {name: tensor for name, tensor in state.items() if name.startswith(f"{_PREFIX}{path}.")}
        merged.append(_merge(path, value.float(), own, config).to(value.dtype) if own else value)
    return merged


def _token_indices(path: str, config: Any) -> torch.Tensor:
    """The rows of an embedding that the adapter has values for: a list is about the input's."""
    indices = getattr(config, "trainable_token_indices", None) or config.token_indices
    if isinstance(indices, dict):
        indices = next(rows for name, rows in indices.items() if path.endswith(name))
    return torch.tensor(indices)


def _merge(path: str, weight: torch.Tensor, state: dict[str, torch.Tensor], config: Any) -> torch.Tensor:
    """Let PEFT adapt a model that has one module, at its place in the real one, and merge that."""
    from peft import inject_adapter_in_model, set_peft_model_state_dict

    rows_of_tokens = next((name for name in state if _TOKENS in name), None)
    if rows_of_tokens is not None:
        return weight.index_copy(0, _token_indices(path, config), state[rows_of_tokens].float())
    rows, columns = weight.shape
    is_embedding = any(".lora_embedding_" in name for name in state)
    module: Any = nn.Embedding(rows, columns) if is_embedding else nn.Linear(columns, rows, bias=False)
    module.weight = nn.Parameter(weight.clone())
    root = nn.Module()
    parent = root
    *parents, last = path.split(".")
    for name in parents:
        parent.add_module(name, nn.Module())
        parent = parent.get_submodule(name)
    parent.add_module(last, module)
    config = copy(config)
    config.trainable_token_indices = None  # of modules that this model has not
    with warnings.catch_warnings():
        # Patterns are for modules that this model has not.
        warnings.filterwarnings("ignore", message=r"The following (rank|alpha)_pattern keys did not match")
        model = inject_adapter_in_model(config, root)
    floats = {name.removeprefix(_PREFIX): tensor.float() for name, tensor in state.items()}
    set_peft_model_state_dict(model, floats)
    layer: Any = model.get_submodule(path)
    layer.merge(safe_merge=True)
    return layer.get_base_layer().weight.detach()
