"""What both families add to transformers' loading."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from transformers import PreTrainedModel

from .headers import read_headers, refuse_quantized


class SkyworkLoadingMixin(PreTrainedModel):
    """Device maps down to the expert, and refuses quantised weights that the config does not speak of: they would be
    read without their scales."""

    # `placement.dispatch.load_placed`. Set by `registration`, as placement stands above the models.
    _load_placed: ClassVar[Callable[..., Any]]

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
            refuse_quantized(read_headers([file for file in checkpoint_files if file.endswith(".safetensors")]))
        return PreTrainedModel._load_pretrained_model(
            model, state_dict, checkpoint_files, load_config, *args, **kwargs
        )

    def dequantize(self, dtype: torch.dtype | None = None) -> Any:
        """Give every quantised linear its real values in `dtype`, by default that of the rest of the model."""
        # transformers asks the config, where saving has left a string.
        return super().dequantize(dtype or self.dtype)
