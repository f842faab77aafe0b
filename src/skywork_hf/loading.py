"""What both families add to transformers' loading."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, ClassVar

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightRenaming

from .headers import read_headers, refuse_undeclared_quantization


class SkyworkLoadingMixin(PreTrainedModel):
    """Device maps down to the expert, and refuses quantised weights that the config does not speak of: they would be
    read without their scales."""

    # `placement.dispatch.load_placed`, `quantization.bitsandbytes.unpack` and `.unpack_in_time`. Set by
    # `registration`, as placement and quantisation stand above the models.
    _load_placed: ClassVar[Callable[..., Any]]
    _unpack: ClassVar[Callable[[Any], None]]
    _unpack_in_time: ClassVar[Callable[[Any], None]]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *model_args: Any, **kwargs: Any) -> Any:
        """transformers' own; in addition, `device_map` may be "experts" or a plan. See
        `skywork_hf.placement.dispatch.load_placed`."""
        load = super().from_pretrained
        return cls._load_placed(cls, load, pretrained_model_name_or_path, *model_args, **kwargs)

    @staticmethod
    def _load_pretrained_model(
        model: Any, state_dict: Any, checkpoint_files: list[str] | None, load_config: Any, *args: Any, **kwargs: Any
    ) -> Any:
        if load_config.hf_quantizer is None and state_dict is None and checkpoint_files:
            files = [file for file in checkpoint_files if file.endswith(".safetensors")]
            refuse_undeclared_quantization(read_headers(files))
        is_adapter = bool(getattr(model, "peft_config", None))  # `model.load_adapter` comes this way
        if is_adapter:
            load_config = replace(load_config, weight_mapping=[*(load_config.weight_mapping or []), _dora_renaming()])
        loaded = PreTrainedModel._load_pretrained_model(
            model, state_dict, checkpoint_files, load_config, *args, **kwargs
        )
        if is_adapter and checkpoint_files and not load_config.ignore_mismatched_sizes:
            refuse_other_adapter(model, loaded[0])
        if load_config.hf_quantizer is not None:
            SkyworkLoadingMixin._unpack_in_time(model)
        return loaded

    def post_init(self) -> None:
        """transformers' own; in addition, sizes of what PEFT loads are checked."""
        super().post_init()
        self.register_load_state_dict_pre_hook(refuse_other_sizes)

    def dequantize(self, dtype: torch.dtype | None = None) -> Any:
        """Give every quantised linear its real values in `dtype`, by default that of the rest of the model."""
        type(self)._unpack(self)
        # transformers asks the config, where saving has left a string.
        return super().dequantize(dtype or self.dtype)


def refuse_other_adapter(model: Any, loaded: Any) -> None:
    """Raise ValueError where an adapter's file was loaded in part: PEFT and transformers go on with what they find.

    Args:
        model: one of ours that has adapters, or PEFT's around one; any other is left alone.
        loaded: with the names `missing_keys`, `unexpected_keys` and, if known, (name, shape of the file, shape of the
            model) as `mismatched_keys`.
    """
    ours = next((module for module in model.modules() if isinstance(module, SkyworkLoadingMixin)), None)
    if ours is None:
        return
    adapters = model.peft_config
    weight_of = _adapter_weight(adapters)
    for name in sorted(loaded.unexpected_keys):
        weight = weight_of.search(name)
        if weight and not _is_made_anew(model, name, weight):
            why = _why_no_place(model, ours.config, name, name[: weight.start()])
            raise ValueError(f"The adapter holds `{name}`, which the model has no place for: {why}")
    for name, stored, expected in sorted(getattr(loaded, "mismatched_keys", ())):
        raise _other_size(name, stored, expected)
    own = _by_adapter(weight_of, (name for name, _ in model.named_parameters()))
    missing = _by_adapter(weight_of, _missing_parameters(model, loaded.missing_keys))
    for adapter in adapters:
        lacking = missing.get(adapter, [])
        if 0 < len(lacking) < len(own.get(adapter, [])):  # all of them: it was another adapter that was loaded
            raise ValueError(
                f"The adapter lacks `{min(lacking)}` and {len(lacking) - 1} more weights that its config asks for: "
                "it was trained on a model with fewer experts or layers, so load it into that, or with another config."
            )


def refuse_other_sizes(model: Any, state_dict: dict[str, torch.Tensor], prefix: str, *args: Any) -> None:
    """Raise ValueError where a weight of an adapter has another shape in `state_dict` than in `model`, a module whose
    names have `prefix` there: torch would list all of them, one a line."""
    adapters = getattr(model, "peft_config", None)
    if not adapters:
        return
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


def _dora_renaming() -> WeightRenaming:
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


def _by_adapter(weight_of: re.Pattern[str], names: Iterable[str]) -> dict[str, list[str]]:
    grouped: dict[str, list[str]] = {}
    for name in names:
        if (match := weight_of.search(name)) and match["adapter"]:
            grouped.setdefault(match["adapter"], []).append(name)
    return grouped


def _missing_parameters(model: Any, missing: Iterable[str]) -> list[str]:
    """The first names of the parameters that have no name but `missing` ones: layers share some, as VB-LoRA's bank."""
    names_of: dict[torch.nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names_of.setdefault(parameter, []).append(name)
    missing = set(missing)
    return [names[0] for names in names_of.values() if missing.issuperset(names)]


def _is_made_anew(model: Any, name: str, weight: re.Match[str]) -> bool:
    """Whether PEFT makes it of the config's seed: projections that all layers share, as RandLoRA's, and what a layer
    keeps outside its parameters, as SHiRA's indices."""
    module = name[: weight.start()]
    if module == "base_model":
        return True
    kept = getattr(dict(model.named_modules()).get(module), weight["kind"], None)
    return isinstance(kept, dict) and weight["adapter"] in kept


def _why_no_place(model: Any, config: Any, name: str, module: str) -> str:
    layer = re.search(r"\.layers\.(\d+)\.", name)
    if layer and int(layer[1]) >= config.num_hidden_layers:
        return "it was trained on a model with more layers, so load it into that."
    layout = getattr(config, "experts_layout", None)
    expert = re.search(r".*\.experts\.(\d+(?=\.))?", name) if layout else None
    if expert and (layout == "fused" or not expert[1]):  # into fused ones, PEFT renames those of modular experts
        other = "modular" if layout == "fused" else "fused"
        return f'its experts are in the other layout, so load the model with experts_layout="{other}".'
    modules = dict(model.named_modules())
    if module in modules:
        by_transformers = isinstance(model, SkyworkLoadingMixin)
        way_out = ", or transformers does not know it: try `PeftModel.from_pretrained`." if by_transformers else "."
        return f"its config asks for no such weight there{way_out}"
    if expert and expert[0] not in modules:
        return "it was trained on a model with more experts, so load it into that."
    return "it was trained on another model, so load it into that."
