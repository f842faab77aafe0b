"""Skywork-13B and Skywork-MoE as ordinary transformers models: importing this package is all it takes."""

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from .configuration_skywork import SkyworkConfig, SkyworkMoeConfig
from .modeling_skywork import SkyworkForCausalLM, SkyworkForSequenceClassification, SkyworkModel
from .modeling_skywork_moe import SkyworkMoeForCausalLM, SkyworkMoeModel
from .placement import collect_expert_usage, placement_report, plan_device_map
from .quantization import SkyworkFp8Config, SkyworkInt8Config
from .registration import register
from .tokenization_skywork import SkyworkTokenizer

if TYPE_CHECKING:
    from .training import AdaptiveAuxLossCallback

__version__ = version("skywork-hf")
__all__ = [
    "AdaptiveAuxLossCallback",
    "SkyworkConfig",
    "SkyworkForCausalLM",
    "SkyworkForSequenceClassification",
    "SkyworkFp8Config",
    "SkyworkInt8Config",
    "SkyworkModel",
    "SkyworkMoeConfig",
    "SkyworkMoeForCausalLM",
    "SkyworkMoeModel",
    "SkyworkTokenizer",
    "collect_expert_usage",
    "placement_report",
    "plan_device_map",
]

register()


def __getattr__(name: str) -> Any:
    # When it is asked for: it takes transformers' Trainer, whose import takes seconds.
    if name == "AdaptiveAuxLossCallback":
        from .training import AdaptiveAuxLossCallback

        return AdaptiveAuxLossCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
