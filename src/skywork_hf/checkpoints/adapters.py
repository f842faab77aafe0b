"""Merging an adapter of PEFT into the weights on their way, module by module. PEFT does the arithmetic."""

from __future__ import annotations

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
from .inspection import TOKENIZER_FILES
from .recipes import Recipe, Source, unchanged
from .transforms import refuse_quantized

_PREFIX = "base_model.model."
_TOKENS = ".trainable_tokens_"
_MARKS = (".lora_", ".ia3_", _TOKENS)
_EMBEDDINGS, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


def merge_adapter(source: Source, folder: Path) -> Source:
    """The checkpoint with an adapter merged into it, and with the vocabulary and the tokenizer of its training, where
    these lie beside the adapter.

    Args:
        folder: with `adapter_config.json` and `adapter_model.safetensors`.

    Raises:
        ImportError: PEFT is not installed.
        ValueError: the checkpoint is quantised; or the adapter is of another model, or of a kind that does not change
            linear layers one by one.
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
    has_tokenizer = any((folder / name).is_file() for name in TOKENIZER_FILES)
    return replace(
        source,
        recipes=recipes,
        config=_with_vocabulary(source.config, recipes),
        tokenizer=folder if has_tokenizer else source.tokenizer,
    )


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
    if not (folder / "adapter_config.json").is_file():
        raise ValueError(f"{folder} holds no adapter_config.json: expected the folder of a PEFT adapter.")
    config = PeftConfig.from_pretrained(str(folder))
    if getattr(config, "target_parameters", None):
        raise ValueError(f"{folder} adapts 3-D parameters (`target_parameters`): merge it with PEFT, in memory.")
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
    names = [product.name for product in recipe.products]
    if len(names) == 1 and names[0] in replaced:
        recipe = _replacement(recipe, replaced[names[0]])
    tensors = [tensor for name in names for tensor in adapted.get(name, [])]
    if not tensors:
        return recipe
    return Recipe(recipe.products, (*recipe.sources, *tensors), partial(_make_merged, recipe, tensors, config))


def _replacement(recipe: Recipe, tensor: StoredTensor) -> Recipe:
    """A tensor that the adapter holds whole, in the checkpoint's dtype."""
    product = recipe.products[0]
    compared = slice(1 if product.name in (_EMBEDDINGS, _HEAD) else 0, None)  # these may have more rows now
    if tensor.shape[compared] != product.shape[compared]:
        raise ValueError(f"{tensor} is {list(tensor.shape)}, and `{product.name}` is {list(product.shape)}.")
    if tensor.dtype == product.dtype:
        return unchanged(tensor, product.name)
    return Recipe((replace(product, shape=tensor.shape),), (tensor,), partial(_make_replaced, product.dtype))


def _make_replaced(dtype: torch.dtype, sources: list[torch.Tensor]) -> list[torch.Tensor]:
    return [sources[0].to(dtype)]


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
