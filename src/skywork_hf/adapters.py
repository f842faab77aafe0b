"""PEFT's adapters on our models: what would give wrong numbers in silence. `registration` says what PEFT adapts when
it is not told.

PEFT asks a model nothing, but there are two things that it does to every model: it sets `peft_config` when it has put
adapters in, and loads them by `load_state_dict`. `SkyworkAdaptersMixin` looks there. What reads or merges into
quantised weights is refused by the weights themselves: see `quantization.linear`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightRenaming
from transformers.utils import logging

logger = logging.get_logger(__name__)

# What PEFT's hooks hand to each layer, by the rows of the batch; experts see the tokens of all rows mixed.
_BY_ROW = {"adapter_names", "alora_offsets"}


class SkyworkAdaptersMixin(PreTrainedModel):
    """A model that hears of adapters when they are put in, loaded or called."""

    # `quantization.bitsandbytes.unpack` and `.keep_unpacked`; set by `registration`, as quantisation stands above.
    _unpack: ClassVar[Callable[[Any], None]]
    _keep_unpacked: ClassVar[Callable[[Any], None]]

    @property
    def peft_config(self) -> dict[str, Any]:
        """The configs of PEFT's adapters by name. PEFT asks for them before it puts the first adapter in, which may
        begin with what it reads in the weights, and sets them afterwards."""
        if "_peft_config" not in self.__dict__:
            type(self)._unpack(self)
            raise AttributeError("There are no adapters in this model.")
        return self.__dict__["_peft_config"]

    @peft_config.setter
    def peft_config(self, configs: dict[str, Any]) -> None:
        adapted = next((module for module in self.modules() if hasattr(module, "adapter_layer_names")), None)
        if adapted is not None and "_looks_at_rows" not in self.__dict__:
            # Not at the model's own call: PEFT 0.20 calls `forward` itself.
            decoder: Any = self.base_model
            hook = partial(refuse_adapters_by_row, self, adapted)
            self.__dict__["_looks_at_rows"] = decoder.layers[0].register_forward_pre_hook(hook)
        self.__dict__["_peft_config"] = configs
        type(self)._keep_unpacked(self)

    @peft_config.deleter
    def peft_config(self) -> None:
        del self.__dict__["_peft_config"]
        if hook := self.__dict__.pop("_looks_at_rows", None):
            hook.remove()

    def post_init(self) -> None:
        """transformers' own; in addition, adapters that are loaded are checked."""
        super().post_init()
        self.register_load_state_dict_pre_hook(refuse_other_sizes)
        self.register_load_state_dict_post_hook(_check_loaded)


def refuse_adapters_by_row(model: nn.Module, adapted: nn.Module, *_: Any) -> None:
    """Raise ValueError where each row of a batch has its own adapter and experts have any; a hook of the first layer.

    PEFT takes the hooks by which it tells the layers off after `forward`, but not after an error: that is done here.

    Args:
        adapted: any layer with adapters. PEFT tells all of them, so that none has to be looked for in each forward.
    """
    if not _hooks_by_row(adapted):
        return
    moe = (name for name, module in model.named_modules() if ".block_sparse_moe." in name and _hooks_by_row(module))
    name = next(moe, None)
    if name is None:
        return
    for module in model.modules():
        for hook in _hooks_by_row(module):
            del module._forward_pre_hooks[hook]
    raise ValueError(
        f"`{name}` has adapters, and experts see the tokens of all rows of a batch mixed, so no row can have one of "
        "its own (`adapter_names`, aLoRA): give each adapter its own batch, after `set_adapter`, or adapt attention "
        "alone."
    )


def _hooks_by_row(module: nn.Module) -> list[int]:
    hooks = module._forward_pre_hooks.items()
    return [key for key, hook in hooks if _BY_ROW & getattr(hook, "keywords", {}).keys()]


def _check_loaded(model: Any, loaded: Any) -> None:
    """A hook of `load_state_dict`, which is how PEFT loads adapters."""
    prefix = model.__dict__.pop("_loaded_under", None)
    if prefix is None:
        return

    def ours(names: Iterable[str]) -> list[str]:
        return [name.removeprefix(prefix) for name in names if name.startswith(prefix)]

    check_adapter(model, ours(loaded.missing_keys), ours(loaded.unexpected_keys))


def check_adapter(
    model: Any, missing: Iterable[str], unexpected: Iterable[str], mismatched: Iterable[tuple[str, Any, Any]] = ()
) -> None:
    """Refuse an adapter whose file was loaded in part: PEFT and transformers go on with what they find.

    Args:
        model: one of ours that has adapters.
        missing: names of its weights that were not loaded.
        unexpected: names that were given and that it has no place for.
        mismatched: names with the shape of the file and that of the model.

    Raises:
        ValueError: a weight of an adapter has no place, or another shape; or some of an adapter's weights are missing
            and it is not to be trained. One that is to be trained gets a warning.
    """
    adapters = model.peft_config
    weight_of = _adapter_weight(adapters)
    for name in sorted(unexpected):
        weight = weight_of.search(name)
        if weight and not _is_there_already(model, name, weight):
            why = _why_no_place(model, model.config, name, name[: weight.start()])
            raise ValueError(f"The adapter holds `{name}`, which the model has no place for: {why}")
    for name, stored, expected in sorted(mismatched):
        raise _other_size(name, stored, expected)
    for adapter, names in _lacking(model, weight_of, set(missing)).items():
        said = f"The adapter lacks `{min(names)}` and {len(names) - 1} more weights that its config asks for"
        if adapters[adapter].inference_mode:
            raise ValueError(
                f"{said}: it was trained on a model with fewer experts or layers, so load it into that, or with "
                "another config; to train what it lacks, load it with `is_trainable=True`."
            )
        logger.warning(f"{said}: these stay as they were.")


def refuse_other_sizes(model: Any, state_dict: dict[str, torch.Tensor], prefix: str, *args: Any) -> None:
    """Raise ValueError where a weight of an adapter has another shape in `state_dict` than in `model`, a module whose
    names have `prefix` there: torch would list all of them, one a line."""
    adapters = model.__dict__.get("_peft_config")
    if not adapters:
        return
    model.__dict__["_loaded_under"] = prefix
    weight_of = _adapter_weight(adapters)
    for name, parameter in model.named_parameters():
        stored = state_dict.get(prefix + name)
        if stored is not None and stored.shape != parameter.shape and weight_of.search(name):
            raise _other_size(prefix + name, stored.shape, parameter.shape)


def _other_size(name: str, stored: Iterable[int], expected: Iterable[int]) -> ValueError:
    return ValueError(
        f"The adapter holds `{name}` as {list(stored)}, and its config makes it {list(expected)} in this model: `r` "
        "and `rank_pattern` must be those it was trained with, and so must the model's sizes."
    )


def dora_renaming() -> WeightRenaming:
    """PEFT saves DoRA's magnitudes without the ".weight" of their names, and transformers would leave them out."""
    return WeightRenaming(r"(lora_magnitude_vector\.[^.]+)$", r"\1.weight")


def _adapter_weight(adapters: dict[str, Any]) -> re.Pattern[str]:
    """Matches the names of the weights of `adapters`, from where their module's ends: `kind` is "lora_A" in
    "....w1.lora_A.default.weight" and "ia3_l" in "....w1.ia3_l.default", and `adapter`, which files leave out, is
    "default"."""
    from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING  # there, as there are adapters

    prefixes = {PEFT_TYPE_TO_PREFIX_MAPPING.get(config.peft_type) for config in adapters.values()} | {
        "modules_to_save"
    }
    kinds = "|".join(re.escape(prefix) for prefix in sorted(filter(None, prefixes)))
    names = "|".join(map(re.escape, sorted(adapters)))
    return re.compile(rf"\.(?P<kind>(?:{kinds})\w*)(?:\.(?P<adapter>{names}))?(?:\.|$)")


def _lacking(model: nn.Module, weight_of: re.Pattern[str], missing: set[str]) -> dict[str, list[str]]:
    """Names of weights, by adapter, that are `missing` where the adapter's others are not.

    Layers share some weights, as VB-LoRA's bank: one that is the only one of its kind PEFT loads outside of the model.
    """
    owned: dict[tuple[str, str], dict[nn.Parameter, list[str]]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if (weight := weight_of.search(name)) and weight["adapter"]:
            kind = owned.setdefault((weight["adapter"], weight["kind"]), {})
            kind.setdefault(parameter, []).append(name)
    lacking: dict[str, list[str]] = {}
    loaded = set()
    for (adapter, _), kind in owned.items():
        absent = [names[0] for names in kind.values() if missing.issuperset(names)]
        if len(absent) < len(kind):
            loaded.add(adapter)
        if len(kind) > 1:
            lacking.setdefault(adapter, []).extend(absent)
    return {adapter: names for adapter, names in lacking.items() if names and adapter in loaded}


def _is_there_already(model: Any, name: str, weight: re.Match[str]) -> bool:
    """Whether PEFT makes it of the config's seed: projections that all layers share, as RandLoRA's, and what a layer
    keeps outside its parameters, as SHiRA's indices; or saved it twice: embeddings that were resized and trained."""
    path = name[: weight.start()]
    kept = getattr(dict(model.named_modules()).get(path), weight["kind"], None)
    if weight["adapter"]:
        return path == "base_model" or (isinstance(kept, dict) and weight["adapter"] in kept)
    return path == "base_model" or (weight["kind"] == "modules_to_save" and kept is not None)


def _why_no_place(model: Any, config: Any, name: str, module: str) -> str:
    layer = re.search(r"\blayers\.(\d+)\.", name)
    if layer and int(layer[1]) >= config.num_hidden_layers:
        return "it was trained on a model with more layers, so load it into that."
    layout = getattr(config, "experts_layout", None)
    expert = re.search(r".*\.experts\.(\d+(?=\.))?", name) if layout else None
    if expert and (layout == "fused" or not expert[1]):  # into fused ones, PEFT renames those of modular experts
        other = "modular" if layout == "fused" else "fused"
        return f'its experts are in the other layout, so load the model with experts_layout="{other}".'
    modules = dict(model.named_modules())
    if module in modules:
        by_transformers = getattr(model, "_hf_peft_config_loaded", False)
        way_out = ", or transformers does not know it: try `PeftModel.from_pretrained`." if by_transformers else "."
        return f"its config asks for no such weight there{way_out}"
    if expert and expert[0] not in modules:
        return "it was trained on a model with more experts, so load it into that."
    return "it was trained on another model, so load it into that."
