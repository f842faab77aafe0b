"""Skywork-13B and Skywork-MoE as ordinary Hugging Face transformers models: importing this package is all it takes.

It costs next to nothing until transformers is used, as the public names are loaded when they are asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .registration import register

if TYPE_CHECKING:
    from .configuration_skywork import SkyworkConfig as SkyworkConfig
    from .configuration_skywork import SkyworkMoeConfig as SkyworkMoeConfig
    from .modeling_skywork import SkyworkForCausalLM as SkyworkForCausalLM
    from .modeling_skywork import SkyworkForSequenceClassification as SkyworkForSequenceClassification
    from .modeling_skywork import SkyworkModel as SkyworkModel
    from .modeling_skywork_moe import SkyworkMoeForCausalLM as SkyworkMoeForCausalLM
    from .modeling_skywork_moe import SkyworkMoeModel as SkyworkMoeModel
    from .placement import collect_expert_usage as collect_expert_usage
    from .placement import placement_report as placement_report
    from .placement import plan_device_map as plan_device_map
    from .quantization import SkyworkFp8Config as SkyworkFp8Config
    from .quantization import SkyworkInt8Config as SkyworkInt8Config
    from .tokenization_skywork import SkyworkTokenizer as SkyworkTokenizer
    from .training import AdaptiveAuxLossCallback as AdaptiveAuxLossCallback

    __version__: str

_NAMES = {
    "configuration_skywork": ("SkyworkConfig", "SkyworkMoeConfig"),
    "modeling_skywork": ("SkyworkForCausalLM", "SkyworkForSequenceClassification", "SkyworkModel"),
    "modeling_skywork_moe": ("SkyworkMoeForCausalLM", "SkyworkMoeModel"),
    "placement": ("collect_expert_usage", "placement_report", "plan_device_map"),
    "quantization": ("SkyworkFp8Config", "SkyworkInt8Config"),
    "tokenization_skywork": ("SkyworkTokenizer",),
    "training": ("AdaptiveAuxLossCallback",),
}
_MODULES = {name: module for module, names in _NAMES.items() for name in names}
__all__ = list(_MODULES)

register()


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return import_module("importlib.metadata").version("skywork-hf")
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import_module("transformers")  # which registers, before a module of ours waits for it
    value = globals()[name] = getattr(import_module(f".{_MODULES[name]}", __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})
