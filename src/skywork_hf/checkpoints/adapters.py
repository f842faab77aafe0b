"""Merging an adapter of PEFT into the weights on their way, module by module. PEFT does the arithmetic."""

from __future__ import annotations

import hashlib
import warnings
from collections import defaultdict
from copy import copy, deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from torch import nn

from ..headers import PLAIN_DTYPES, StoredTensor, read_headers
from ..readers import Reader
from ..untrusted import read_json
from .inspection import TOKENIZER_FILES
from .layouts import empty_model
from .recipes import Product, Recipe, Source
from .transforms import Rounded, refuse_quantized

_CONFIG = "adapter_config.json"
_PREFIX = "base_model.model."
_TOKENS = ".trainable_tokens_"
_MARKS = (".lora_", ".ia3_", _TOKENS)
# Inside modules of `modules_to_save`, of which PEFT saves all where the vocabulary was made larger.
_WRAPPED = (".modules_to_save.", ".original_module.")
# Beginnings of what `init_lora_weights` may be that PEFT computes from a weight's values.
_INIT_FROM_VALUES = ("pissa", "olora")
# PEFT's kinds that change the weight of a module by what the adapter holds of it.
_MERGEABLE = ("LORA", "ADALORA", "IA3", "TRAINABLE_TOKENS")
# What such an adapter may ask for beside, and why that is no change of a weight.
_NOT_MERGEABLE = {
    "target_parameters": "adapts 3-D parameters",
    "layer_replication": "makes a model of more layers",
    "lora_bias": "adds biases, which Skywork's linear layers do not have",
    "alora_invocation_tokens": "works from a token on",
    "arrow_config": "routes between adapters",
    "megatron_config": "is of layers of Megatron-LM",
}
_EMBEDDINGS, _HEAD, _CLASSIFIER = "model.embed_tokens.weight", "lm_head.weight", "score.weight"


def merge_adapter(source: Source, folder: Path) -> Source:
    """The checkpoint with an adapter merged into it, and with the vocabulary and the tokenizer of its training, where
    these lie beside the adapter.

    Args:
        folder: with `adapter_config.json` and `adapter_model.safetensors`.

    Raises:
        ImportError: PEFT is not installed.
        ValueError: the checkpoint is quantised; or the adapter is of another model, of a kind that does not change
            modules one by one, not whole, or not what its config says. Names the file and the field or the tensor.
    """
    folder = folder.resolve()  # its name is written into the result, and "." has none
    config = _peft_config(folder)
    refuse_quantized(source, "merging an adapter")
    stored = read_headers([_weights(folder)])
    adapted, replaced, copies = _sorted(stored)
    known = {product.name for recipe in source.recipes for product in recipe.products}
    if source.config.tie_word_embeddings and not known & {_HEAD, _CLASSIFIER}:
        copies += _take_tied_head(source, folder, adapted, replaced)
    if unknown := sorted((adapted.keys() | replaced.keys()) - known):
        raise ValueError(
            f"{folder} adapts `{unknown[0]}` and {len(unknown) - 1} more that {source.folder} does not have: it was "
            "trained on another model."
        )
    recipes = [_merged(recipe, adapted, replaced, config) for recipe in source.recipes]
    pairs = zip(source.recipes, recipes, strict=True)
    unused = [tensor for before, after in pairs for tensor in before.sources if tensor not in after.sources]
    has_tokenizer = any((folder / name).is_file() for name in TOKENIZER_FILES)
    merged = replace(
        source,
        recipes=recipes,
        ignored=[*source.ignored, *unused, *copies],
        config=_with_vocabulary(source.config, recipes),
        tokenizer=folder if has_tokenizer else source.tokenizer,
        changes=(*source.changes, f"merged {folder.name}, SHA-256 of its config {_config_digest(folder)}"),
    )
    whole = [replaced[name] for name in (_EMBEDDINGS, _HEAD) if name in replaced]
    _check_fits(merged, folder, config, stored, may_be_there={tensor.name for tensor in (*whole, *copies)})
    return merged


def _sorted(
    stored: dict[str, StoredTensor],
) -> tuple[dict[str, list[StoredTensor]], dict[str, StoredTensor], list[StoredTensor]]:
    """What the adapter holds: by the weight that it changes, whole weights, and copies of these.

    Raises:
        ValueError: a tensor is stored as no float, which it would need a scale for.
    """
    adapted: dict[str, list[StoredTensor]] = defaultdict(list)
    replaced: dict[str, StoredTensor] = {}
    copies = []
    for name, tensor in stored.items():
        if tensor.dtype not in PLAIN_DTYPES:
            raise ValueError(f"{tensor} is stored as {tensor.dtype}: expected an adapter in 16 or 32 bit; save it so.")
        path = name.removeprefix(_PREFIX).replace(".token_adapter.", ".")
        mark = next((mark for mark in _MARKS if mark in path), None)
        if mark:
            adapted[f"{path.partition(mark)[0]}.weight"].append(tensor)
        elif any(wrapped in path for wrapped in _WRAPPED):
            copies.append(tensor)
        else:  # of `modules_to_save`, or embeddings, which PEFT saves in case that they were made larger
            replaced[path.replace(".base_layer.", ".")] = tensor
    return adapted, replaced, copies


def _take_tied_head(
    source: Source, folder: Path, adapted: dict[str, list[StoredTensor]], replaced: dict[str, StoredTensor]
) -> list[StoredTensor]:
    """Take out, and return, what the adapter holds of a head that is the embeddings.

    Raises:
        ValueError: it was trained with a head that is no longer the embeddings.
    """
    embeddings, head = ([*adapted.get(name, ()), *filter(None, [replaced.get(name)])] for name in (_EMBEDDINGS, _HEAD))
    only_tokens = not head and all(_TOKENS in tensor.name for tensor in embeddings)  # PEFT ties these by itself
    if not only_tokens and not _are_equal(embeddings, head):
        raise ValueError(
            f"{folder} changes `{(head or embeddings)[0].name}`, and the head of {source.folder} is its embeddings "
            "(`tie_word_embeddings`), which the adapter does not change alike: load it with PEFT's "
            "`PeftModel` instead."
        )
    adapted.pop(_HEAD, None)
    replaced.pop(_HEAD, None)
    return head


def _are_equal(some: list[StoredTensor], others: list[StoredTensor]) -> bool:
    if [tensor.shape for tensor in some] != [tensor.shape for tensor in others]:
        return False
    reader = Reader()
    return all(torch.equal(*reader.read(pair)) for pair in zip(some, others, strict=True))


def _check_fits(
    merged: Source, folder: Path, config: Any, stored: dict[str, StoredTensor], may_be_there: set[str]
) -> None:
    """
    Raises:
        ValueError: the adapter's file holds anything else than what PEFT would save of an adapter of this config to
            this model, but for what `may_be_there`. Names the tensor.
    """
    config_file, weights = folder / _CONFIG, _weights(folder)
    try:
        expected = _shapes(merged.config, config)
    except Exception as error:  # whatever PEFT meets: it reads most fields only here
        raise ValueError(
            f"{config_file} makes no adapter of {merged.folder} ({shorten(str(error), 200)}): take the file that was "
            "saved with the adapter, and the checkpoint that it was trained on."
        ) from error
    if missing := sorted(expected.keys() - stored.keys()):
        raise ValueError(
            f"{weights} lacks `{missing[0]}` and {len(missing) - 1} more weights that {_CONFIG} asks for in "
            f"{merged.folder}: the adapter is not whole, or was trained on another model, such as one with fewer "
            "experts or layers."
        )
    if unexpected := sorted(stored.keys() - expected.keys() - may_be_there):
        raise ValueError(
            f"{weights} holds `{unexpected[0]}` and {len(unexpected) - 1} more weights that {_CONFIG} does not ask "
            f"for in {merged.folder}: take the {_CONFIG} that was saved with the adapter."
        )
    for name, shape in expected.items():
        if stored[name].shape != shape:
            raise ValueError(
                f"{stored[name]} is {list(stored[name].shape)}, and {_CONFIG} makes it {list(shape)} in "
                f"{merged.folder}: its fields must be those that the adapter was trained with, and so must the "
                "model's sizes."
            )
    _check_token_indices(merged, config, stored, config_file)


def _shapes(model_config: Any, config: Any) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that PEFT would save of such an adapter."""
    from peft import get_peft_model_state_dict

    config = copy(config)
    if str(getattr(config, "init_lora_weights", "")).startswith(_INIT_FROM_VALUES):
        config.init_lora_weights = True
    model = _adapted(empty_model(model_config), config)
    # On the CPU, in no memory: AdaLoRA takes rows out, for which torch wants values.
    state = {name: torch.zeros(()).expand(tensor.shape) for name, tensor in model.state_dict().items()}
    saved = get_peft_model_state_dict(model, state, save_embedding_layers=False)
    return {name: tuple(tensor.shape) for name, tensor in saved.items()}


def _check_token_indices(merged: Source, config: Any, stored: dict[str, StoredTensor], config_file: Path) -> None:
    rows = merged.config.vocab_size
    for name in stored:
        if _TOKENS not in name:
            continue
        indices = _token_indices(name.partition(_TOKENS)[0].removesuffix(".token_adapter"), config)
        if wrong := [index for index in indices.tolist() if type(index) is not int or not 0 <= index < rows]:
            raise ValueError(
                f"{config_file} trains token {wrong[0]}: expected whole numbers from 0 to {rows - 1}, the tokens of "
                f"{merged.folder}."
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
    if not file.exists():
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
    except Exception as error:  # as many kinds as there are wrong values
        raise ValueError(f"{file} is nothing that PEFT reads ({error}): download or write it again.") from error
    config.task_type = None  # which would wrap a whole model
    return config


def _weights(folder: Path) -> Path:
    for name in ("adapter_model.safetensors", "adapter_model.bin"):
        if (folder / name).exists():
            return folder / name
    raise ValueError(f"{folder} holds no adapter_model.safetensors: expected the folder of a PEFT adapter.")


def _merged(
    recipe: Recipe, adapted: dict[str, list[StoredTensor]], replaced: dict[str, StoredTensor], config: Any
) -> Recipe:
    whole = [replaced.get(product.name) for product in recipe.products]
    tensors = [tensor for product in recipe.products for tensor in adapted.get(product.name, [])]
    if not any(whole) and not tensors:
        return recipe
    pairs = list(zip(recipe.products, whole, strict=True))
    exact = [_replacement(product, tensor) if tensor else product for product, tensor in pairs]
    # In float32 where the adapter changes a product: rounding comes once, at the end.
    exact = [replace(product, dtype=torch.float32) if product.name in adapted else product for product in exact]
    sources = (*(() if all(whole) else recipe.sources), *filter(None, whole), *tensors)
    is_copy = len(sources) == 1 and all(whole)
    make = (
        None if is_copy else partial(_make_merged, recipe, [tensor is not None for tensor in whole], tensors, config)
    )
    made = Recipe(tuple(exact), sources, make)
    products = tuple(
        replace(product, dtype=before.dtype) for product, before in zip(exact, recipe.products, strict=True)
    )
    return made if made.products == products else Recipe(products, sources, Rounded(made, products))


def _replacement(product: Product, tensor: StoredTensor) -> Product:
    """In the adapter's dtype."""
    compared = slice(1 if product.name in (_EMBEDDINGS, _HEAD) else 0, None)  # these may have more rows now
    if tensor.shape[compared] != product.shape[compared]:
        raise ValueError(f"{tensor} is {list(tensor.shape)}, and `{product.name}` is {list(product.shape)}.")
    return replace(product, dtype=tensor.dtype, shape=tensor.shape)


def _make_merged(
    recipe: Recipe, is_whole: list[bool], tensors: list[StoredTensor], config: Any, sources: list[torch.Tensor]
) -> list[torch.Tensor]:
    """`sources` are those of `recipe`, unless all its products are replaced, what replaces them, and `tensors`."""
    count = 0 if all(is_whole) else len(recipe.sources)
    made = [] if all(is_whole) else recipe.values(sources[:count])
    others = iter(sources[count:])
    values = [next(others) if replaces else made[place] for place, replaces in enumerate(is_whole)]
    state = {tensor.name: value for tensor, value in zip(tensors, others, strict=True)}
    merged = []
    for product, value in zip(recipe.products, values, strict=True):
        path = product.name.removesuffix(".weight")
        own = {name: tensor for name, tensor in state.items() if name.startswith(f"{_PREFIX}{path}.")}
        merged.append(_merge(path, value.float(), own, config) if own else value)
    return merged


def _token_indices(path: str, config: Any) -> torch.Tensor:
    """The rows of an embedding that the adapter has values for: a list is about the input's."""
    indices = getattr(config, "trainable_token_indices", None) or config.token_indices
    if isinstance(indices, dict):
        indices = next(rows for name, rows in indices.items() if path.endswith(name))
    return torch.tensor(indices)


def _merge(path: str, weight: torch.Tensor, state: dict[str, torch.Tensor], config: Any) -> torch.Tensor:
    """Let PEFT adapt a model that has one module, at its place in the real one, and merge that."""
    from peft import set_peft_model_state_dict

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
    config.trainable_token_indices = config.modules_to_save = None  # of modules that this model has not
    if config.peft_type == "ADALORA" and config.rank_pattern:
        config.rank_pattern = {name: rows for name, rows in config.rank_pattern.items() if name.startswith(f"{path}.")}
    # Some begin with random weights, which the merge depends on; it must come out the same when it is verified.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int.from_bytes(hashlib.sha256(path.encode()).digest()[:8]))
        model = _adapted(root, config)
    set_peft_model_state_dict(model, {name: tensor.float() for name, tensor in state.items()})
    layer: Any = model.get_submodule(f"{_PREFIX}{path}")
    layer.merge(safe_merge=True)
    return layer.get_base_layer().weight.detach()


def _adapted(model: nn.Module, config: Any) -> Any:
    """PEFT's model, whose weights are called as in the adapter's file."""
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # such as of patterns for modules that the model has not: these are checked
        return PeftModel(model, copy(config))
