"""What both families add to transformers' loading."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import PreTrainedModel

from .adapters import SkyworkAdaptersMixin, check_adapter, dora_renaming
from .compat import SPLITS_UNEVEN_HEADS
from .headers import read_headers, refuse_undeclared_quantization
from .trust import is_ours


class SkyworkLoadingMixin(SkyworkAdaptersMixin):
    """Device maps down to the expert, and refuses quantised weights that the config does not speak of, which would be
    read without their scales, and checkpoints whose tensors have other names, which would be filled at random."""

    # `placement.dispatch.load_placed` and `quantization.bitsandbytes.unpack_in_time`; set as `_unpack` is.
    _load_placed: ClassVar[Callable[..., Any]]
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
            load_config = replace(load_config, weight_mapping=[*(load_config.weight_mapping or []), dora_renaming()])
        loaded = PreTrainedModel._load_pretrained_model(
            model, state_dict, checkpoint_files, load_config, *args, **kwargs
        )
        if is_adapter and checkpoint_files and not load_config.ignore_mismatched_sizes:
            info = loaded[0]
            check_adapter(model, info.missing_keys, info.unexpected_keys, info.mismatched_keys)
        if not is_adapter and state_dict is None and checkpoint_files:
            refuse_other_names(model, loaded[0], checkpoint_files)
        if load_config.hf_quantizer is not None:
            SkyworkLoadingMixin._unpack_in_time(model)
        return loaded

    def load_custom_generate(
        self, pretrained_model_name_or_path: Any = None, trust_remote_code: bool | None = None, **kwargs: Any
    ) -> Callable[..., Any]:
        """transformers' own, but for what comes with a Skywork checkpoint, which never runs.

        Raises:
            OSError: it does; or there is none, which `from_pretrained` passes over alike.
        """
        name = pretrained_model_name_or_path
        if str(name) == str(self.config.name_or_path) or is_ours(name, **kwargs):
            raise OSError(
                f"`custom_generate` of {name} is not run, as no code of a Skywork checkpoint is: give `generate` the "
                "function itself, imported from where you have read it."
            )
        return super().load_custom_generate(name, trust_remote_code=trust_remote_code, **kwargs)  # type: ignore[misc]

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        """transformers' own, for the fused layout.

        Raises:
            ValueError: another than "eager" is asked for where there are no 3-D parameters to compute it on.
        """
        if getattr(self.config, "experts_layout", None) == "fused":
            return super().get_correct_experts_implementation(requested_experts)
        if requested_experts not in (None, "eager"):
            has_experts = hasattr(self.config, "experts_layout")
            other = 'load with experts_layout="fused", or leave it away'
            raise ValueError(
                f"`experts_implementation`={requested_experts!r} needs experts in 3-D parameters, which "
                f"{type(self).__name__} does not have here: "
                f"{other if has_experts else 'leave it away, as it is a dense model'}."
            )
        return "eager"

    @classmethod
    def maybe_distribute_model(cls, model: Any, distributed_config: Any, mesh_manager: Any) -> Any:
        """transformers' own, of a model that can be split so; asked before a weight is read."""
        if mesh_manager is not None:
            refuse_uneven_parts(model.config, distributed_config)
            quantization = getattr(model.config, "quantization_config", None)
            if distributed_config.tp_size > 1 and getattr(quantization, "int8_devices", None):
                raise ValueError(
                    "`int8_devices` makes int8 of whole FP8 matrices, of which tensor parallelism gives a process a "
                    "part: load with it in one process, `save_pretrained`, and load the int8 checkpoint in parallel."
                )
            if not SPLITS_UNEVEN_HEADS and model.config.vocab_size % distributed_config.tp_size:
                model.tp_plan.pop("lm_head", None)  # every process has it whole
        return super().maybe_distribute_model(model, distributed_config, mesh_manager)

    def dequantize(self, dtype: torch.dtype | None = None) -> Any:
        """Give every quantised linear its real values in `dtype`, by default that of the rest of the model."""
        type(self)._unpack(self)
        # transformers asks the config, where saving has left a string.
        return super().dequantize(dtype or self.dtype)


def refuse_uneven_parts(config: Any, distributed_config: Any) -> None:
    """Raise ValueError where tensor or expert parallelism would have to split a head or an expert.

    Args:
        config: of a model of ours.
        distributed_config: with the numbers of processes `tp_size` and `ep_size`.
    """
    splits_heads = distributed_config.tp_plan != {}
    fields = {"num_attention_heads": "tp_size", "num_key_value_heads": "tp_size"} if splits_heads else {}
    for field, size in (fields | {"num_local_experts": "ep_size"}).items():
        whole, processes = getattr(config, field, None), getattr(distributed_config, size, None) or 1
        if whole is not None and whole % processes:
            fitting = ", ".join(str(n) for n in range(1, whole + 1) if whole % n == 0)
            raise ValueError(
                f"`{size}`={processes} does not divide `{field}`={whole}: take one of {fitting} processes."
            )


def refuse_other_names(model: Any, loaded: Any, files: list[str]) -> None:
    """Raise ValueError where a checkpoint has not one tensor of a kind that the model's decoder has, such as one for
    each expert of each layer: transformers would go on to fill them all at random. What heads lack is filled, as
    everywhere, and what is missing here and there is reported by transformers.

    Args:
        loaded: with the sets `missing_keys`, `unexpected_keys`, `mismatched_keys`, and `conversion_errors`.
        files: of the checkpoint.
    """
    if loaded.conversion_errors:
        return  # transformers raises them
    body = getattr(model, model.base_model_prefix, model)
    prefix = "" if body is model else f"{model.base_model_prefix}."
    missing = set(loaded.missing_keys) - {name for name, *_ in loaded.mismatched_keys}
    missing -= {source for tied, source in model.all_tied_weights_keys.items() if tied not in missing}
    kinds: dict[str, list[str]] = {}
    for name, _ in body.named_parameters():
        if name.endswith(("weight", "_proj")):  # scales are the quantisers' to check
            kinds.setdefault(re.sub(r"\.\d+(?=\.)", ".*", prefix + name), []).append(prefix + name)
    for kind, names in kinds.items():
        if missing.issuperset(names):
            folder = Path(files[0]).parent
            others = [name for name in loaded.unexpected_keys if not name.endswith("inv_freq")]
            other = min(others, key=lambda name: (not re.search(r"\.\d+\.", name), name), default=None)
            raise ValueError(
                f"{folder} has no tensor `{kind}`{f', but {other!r}' if other else ''}: these are not the names that "
                f"its config asks for, and nothing is filled at random. `skywork-hf inspect {folder}` tells what "
                f"it is, and `skywork-hf convert {folder} NEW_FOLDER` writes what can be loaded."
            )
