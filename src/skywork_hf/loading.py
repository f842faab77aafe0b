"""What both families add to transformers' loading."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from transformers import PreTrainedModel

from .headers import read_headers, refuse_undeclared_quantization


class SkyworkLoadingMixin(PreTrainedModel):
    """Device maps down to the expert, and refuses quantised weights that the config does not speak of: they would be
    read without their scales."""

    # `placement.dispatch.load_placed` and `quantization.bitsandbytes.unpack`. Set by `registration`, as placement and
    # quantisation stand above the models.
    _load_placed: ClassVar[Callable[..., Any]]
    _unpack: ClassVar[Callable[[Any], None]]

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
        loaded = PreTrainedModel._load_pretrained_model(
            model, state_dict, checkpoint_files, load_config, *args, **kwargs
        )
        if not load_config.ignore_mismatched_sizes:
            refuse_other_adapter(model, loaded[0])  # `model.load_adapter` comes this way
        return loaded

    def post_init(self) -> None:
        """transformers' own; in addition, what PEFT loads is checked, and what is saved can be read."""
        super().post_init()
        self.register_state_dict_pre_hook(unpack_before_saving)
        self.register_load_state_dict_pre_hook(refuse_other_sizes)
        self.register_load_state_dict_post_hook(refuse_other_adapter)

    def dequantize(self, dtype: torch.dtype | None = None) -> Any:
        """Give every quantised linear its real values in `dtype`, by default that of the rest of the model."""
        type(self)._unpack(self)
        # transformers asks the config, where saving has left a string.
        return super().dequantize(dtype or self.dtype)


def unpack_before_saving(model: Any, *args: Any) -> None:
    """A hook of `state_dict`."""
    type(model)._unpack(model)


def refuse_other_adapter(model: Any, loaded: Any) -> None:
    """Raise ValueError where an adapter was loaded in part: PEFT and transformers go on with what they find.

    Args:
        model: with adapters of PEFT; any other is left alone.
        loaded: with the names `missing_keys`, `unexpected_keys` and, if known, (name, shape of the file, shape of the
            model) as `mismatched_keys`.
    """
    adapters = getattr(model, "peft_config", None)
    if not adapters:
        return
    weight_of = _adapter_weight(adapters)
    for name in sorted(filter(weight_of.search, loaded.unexpected_keys)):
        raise ValueError(f"The adapter holds `{name}`, which the model has no place for: {_why_no_place(model, name)}")
    for name, stored, expected in sorted(getattr(loaded, "mismatched_keys", ())):
        raise _other_size(name, stored, expected)
    own = _by_adapter(weight_of, (name for name, _ in model.named_parameters()))
    missing = _by_adapter(weight_of, loaded.missing_keys)
    for adapter in adapters:
        lacking = missing.get(adapter, [])
        if 0 < len(lacking) < len(own.get(adapter, [])):  # all of them: it was another adapter that was loaded
            raise ValueError(
                f"The adapter lacks `{min(lacking)}` and {len(lacking) - 1} more weights that its config asks for: it "
                "was trained on another model, such as one with fewer experts, so load it into that."
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


def _adapter_weight(adapters: dict[str, Any]) -> re.Pattern[str]:
    """Matches the names of the weights of `adapters`, and in the one group the adapter's, which files leave out:
    "....w1.lora_A.default.weight" and "....w1.ia3_l.default" are of the adapter "default"."""
    from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING  # there, as there are adapters

    prefixes = {PEFT_TYPE_TO_PREFIX_MAPPING[config.peft_type] for config in adapters.values()} | {"modules_to_save"}
    names = "|".join(map(re.escape, sorted(adapters)))
    return re.compile(rf"\.(?:{'|'.join(map(re.escape, sorted(prefixes)))})\w*(?:\.({names}))?(?:\.|$)")


def _by_adapter(weight_of: re.Pattern[str], names: Iterable[str]) -> dict[str, list[str]]:
    grouped: dict[str, list[str]] = {}
    for name in names:
        if (match := weight_of.search(name)) and match[1]:
            grouped.setdefault(match[1], []).append(name)
    return grouped


def _why_no_place(model: Any, name: str) -> str:
    layer = re.search(r"\.layers\.(\d+)\.", name)
    if layer and int(layer[1]) >= model.config.num_hidden_layers:
        return "it was trained on a model with more layers, so load it into that."
    layout = getattr(model.config, "experts_layout", None)
    if layout is None or ".experts." not in name:
        return "it was trained on another model, so load it into that."
    if layout == "modular" and re.search(r"\.experts\.\d+\.", name):
        return "it was trained on a model with more experts, so load it into that."
    other = "fused" if layout == "modular" else "modular"
    return f'its experts are in the other layout, so load the model with experts_layout="{other}".'
