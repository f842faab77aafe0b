"""What both families add to transformers' loading."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

import torch
from transformers import PreTrainedModel

from .adapters import SkyworkAdaptersMixin, check_adapter, dora_renaming
from .headers import read_headers, refuse_undeclared_quantization


class SkyworkLoadingMixin(SkyworkAdaptersMixin):
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
            load_config = replace(load_config, weight_mapping=[*(load_config.weight_mapping or []), dora_renaming()])
        loaded = PreTrainedModel._load_pretrained_model(
            model, state_dict, checkpoint_files, load_config, *args, **kwargs
        )
        if is_adapter and checkpoint_files and not load_config.ignore_mismatched_sizes:
            info = loaded[0]
            check_adapter(model, info.missing_keys, info.unexpected_keys, info.mismatched_keys)
        if load_config.hf_quantizer is not None:
            SkyworkLoadingMixin._unpack_in_time(model)
        return loaded

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        """transformers' own, for the fused layout.

        Raises:
            ValueError: another than "eager" is asked for where there are no 3-D parameters to compute it on.
        """
        if getattr(self.config, "experts_layout", None) == "fused":
            return super().get_correct_experts_implementation(requested_experts)
        if requested_experts not in (None, "eager"):
            way_out = 'load with experts_layout="fused", or leave it away'
            raise ValueError(
                f"`experts_implementation`={requested_experts!r} needs experts in 3-D parameters, which "
                f"{type(self).__name__} does not have here: "
                + (
                    f"{way_out}."
                    if hasattr(self.config, "experts_layout")
                    else "leave it away, as it is a dense model."
                )
            )
        return "eager"

    def dequantize(self, dtype: torch.dtype | None = None) -> Any:
        """Give every quantised linear its real values in `dtype`, by default that of the rest of the model."""
        type(self)._unpack(self)
        # transformers asks the config, where saving has left a string.
        return super().dequantize(dtype or self.dtype)
