"""Every line that touches a registry of another library, and the one import hook that waits for those libraries.

Nothing here imports another library: what that costs is paid when it is used.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

# Set, it has the `.pth` file beside this package import it in each process that starts; see `__main__`.
VARIABLE = "SKYWORK_HF_REGISTER"


def register() -> None:
    """Write into the registries of the libraries that are loaded, and into those of the others once they are.

    May be called again, and after another package took a name: ours then takes its place, and a warning says whose.
    """
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    _loaded.extend(name for name in _ONCE_LOADED if sys.modules.get(name))
    _register_loaded()


def _register_classes(transformers: Any) -> None:
    """Everything that loads, quantises or looks up by name finds ours."""
    from transformers.conversion_mapping import USER_REGISTERED_MAPPINGS, register_checkpoint_conversion_mapping
    from transformers.models.auto import modeling_auto, tokenization_auto

    from . import configuration_skywork as configuration
    from . import modeling_skywork as dense
    from . import modeling_skywork_moe as moe
    from .loading import SkyworkLoadingMixin
    from .placement.dispatch import load_placed
    from .quantization.bitsandbytes import keep_unpacked, unpack, unpack_in_time
    from .quantization.config import INT8_METHOD, SkyworkFp8Config, SkyworkInt8Config
    from .quantization.quantizers import SkyworkFp8Quantizer, SkyworkInt8Quantizer
    from .tokenization_skywork import SkyworkTokenizer

    configs: tuple[Any, ...] = (configuration.SkyworkConfig, configuration.SkyworkMoeConfig)
    for config in configs:
        _warn_if_taken(transformers.CONFIG_MAPPING, config.model_type, config)
        transformers.AutoConfig.register(config.model_type, config, exist_ok=True)
    models: tuple[Any, ...] = (
        (transformers.AutoModel, modeling_auto.MODEL_MAPPING_NAMES, (dense.SkyworkModel, moe.SkyworkMoeModel)),
        (
            transformers.AutoModelForCausalLM,
            modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
            (dense.SkyworkForCausalLM, moe.SkyworkMoeForCausalLM),
        ),
        (
            transformers.AutoModelForSequenceClassification,
            modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
            (dense.SkyworkForSequenceClassification,),
        ),
    )
    for auto_class, names, classes in models:
        for model in classes:
            auto_class.register(model.config_class, model, exist_ok=True)
            names[model.config_class.model_type] = model.__name__
    # By its name, which released tokenizer configs and our model configs give. `AutoTokenizer.register` would tie it
    # to the config classes as well, and then `trust_remote_code=True` would run the checkpoint's tokenizer code.
    registered = tokenization_auto.REGISTERED_TOKENIZER_CLASSES
    _warn_if_taken(registered, SkyworkTokenizer.__name__, SkyworkTokenizer)
    registered[SkyworkTokenizer.__name__] = SkyworkTokenizer
    for config in configs:
        tokenization_auto.TOKENIZER_MAPPING_NAMES[config.model_type] = SkyworkTokenizer.__name__
    moe_type = configuration.SkyworkMoeConfig.model_type
    register_checkpoint_conversion_mapping(moe_type, _fused_experts_conversion(), overwrite=True)
    # So that transformers asks each model: see `SkyworkMoePreTrainedModel.is_custom_code`.
    USER_REGISTERED_MAPPINGS.discard(moe_type)
    SkyworkLoadingMixin._load_placed = staticmethod(load_placed)
    SkyworkLoadingMixin._unpack = staticmethod(unpack)
    SkyworkLoadingMixin._unpack_in_time = staticmethod(unpack_in_time)
    SkyworkLoadingMixin._keep_unpacked = staticmethod(keep_unpacked)
    _register_quantizer(configuration.FP8_METHOD, SkyworkFp8Config, SkyworkFp8Quantizer)
    _register_quantizer(INT8_METHOD, SkyworkInt8Config, SkyworkInt8Quantizer)
    _set_attributes([*configs, *(model for *_, classes in models for model in classes), SkyworkTokenizer])


def _set_attributes(classes: list[type]) -> None:
    """Of `transformers`, which may be several modules: `transformers.processing_utils` runs its `__init__` once more
    and puts what comes of it into `sys.modules`, while those who came before keep the first."""
    names = [vars(module).get("transformers") for module in list(sys.modules.values()) if hasattr(module, "__dict__")]
    named = {module for module in names if isinstance(module, ModuleType) and module.__name__ == "transformers"}
    for transformers in {*named, sys.modules["transformers"]}:
        for ours in classes:
            setattr(transformers, ours.__name__, ours)


def _register_quantizer(method: str, config_class: Any, quantizer_class: Any) -> None:
    from transformers.quantizers import auto as quantizers_auto

    # Not `register_quantizer`, which refuses a name that is there: this may be called again.
    quantizers_auto.AUTO_QUANTIZATION_CONFIG_MAPPING[method] = config_class
    quantizers_auto.AUTO_QUANTIZER_MAPPING[method] = quantizer_class
    # Those whose arguments may override what a quantised checkpoint's config.json says.
    overriding: Any = quantizers_auto.LOADING_ATTRIBUTES_CONFIG_TYPES
    if config_class not in overriding:
        quantizers_auto.LOADING_ATTRIBUTES_CONFIG_TYPES = (*overriding, config_class)


def _report_router_load(trainer: Any) -> None:
    """Among the default callbacks, as these are called before tensorboard and the like; see `ReportRouterLoad`."""
    from .training.aux_loss import ReportRouterLoad  # needs the Trainer's module itself

    if ReportRouterLoad not in trainer.DEFAULT_CALLBACKS:
        trainer.DEFAULT_CALLBACKS.append(ReportRouterLoad)


def _set_default_targets(constants: Any) -> None:
    """What PEFT adapts in our models when it is not told: what it adapts in Llama and Mixtral."""
    from .configuration_skywork import SkyworkConfig, SkyworkMoeConfig

    expert_names = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
    mappings = re.compile(r"TRANSFORMERS_MODELS_TO_\w+_MODULES_MAPPING")
    for targets in [value for name, value in vars(constants).items() if mappings.fullmatch(name)]:
        if isinstance(targets, dict) and "llama" in targets:
            targets[SkyworkConfig.model_type] = list(targets["llama"])
            of_moe = targets["mixtral" if "mixtral" in targets else "llama"]
            targets[SkyworkMoeConfig.model_type] = [expert_names.get(target, target) for target in of_moe]


def _warn_if_taken(registry: Any, name: str, ours: type) -> None:
    if name in registry and registry[name] is not ours:
        other = registry[name]
        from transformers.utils import logging

        logging.get_logger(__name__).warning(
            f"skywork_hf replaces {other.__module__}.{other.__qualname__}, which was registered as `{name}`: the Auto "
            "classes now load it with skywork_hf."
        )


def _fused_experts_conversion() -> list[Any]:
    """One matrix per expert in the files, 3-D parameters in the fused layout."""
    from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter

    experts = "block_sparse_moe.experts"
    return [
        WeightConverter(
            source_patterns=[f"{experts}.*.w1.weight", f"{experts}.*.w3.weight"],
            target_patterns=f"{experts}.gate_up_proj",
            operations=[MergeModulelist(dim=0), Concatenate(dim=1)],
        ),
        WeightConverter(
            source_patterns=f"{experts}.*.w2.weight",
            target_patterns=f"{experts}.down_proj",
            operations=[MergeModulelist(dim=0)],
        ),
    ]


# What is called with a module once it is loaded.
_ONCE_LOADED: dict[str, Callable[[Any], None]] = {
    "transformers": _register_classes,
    "transformers.trainer": _report_router_load,
    "peft.utils.constants": _set_default_targets,
}
# Those that are loaded and were not called with, and the modules of ours that are being loaded: registering imports
# these, so it waits while one of them is half there, having imported the library itself.
_loaded: list[str] = []
_ours_loading: set[str] = set()


def _register_loaded() -> None:
    while _loaded and not _ours_loading:
        name = _loaded.pop(0)
        _ONCE_LOADED[name](sys.modules[name])


class _Finder:
    """Finds what the finders after it find, and stays: it is also asked by who only wants to know whether a library is
    there, and by those who load it again after an error."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in _ONCE_LOADED and not fullname.startswith(f"{__package__}."):
            return None
        others = sys.meta_path[sys.meta_path.index(self) + 1 :]
        specs = (other.find_spec(fullname, path, target) for other in others if hasattr(other, "find_spec"))
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is not None and spec.loader is not None:
            loader: Any = _Loader(spec.loader)
            spec.loader = loader
        return spec


class _Loader:
    """Another loader, which it gives its place back to."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["loader"], name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        created: ModuleType | None = self.loader.create_module(spec)
        return created

    def exec_module(self, module: ModuleType) -> None:
        name = module.__name__
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        if name not in _ONCE_LOADED:
            _ours_loading.add(name)
        try:
            self.loader.exec_module(module)
        finally:
            _ours_loading.discard(name)
        if name in _ONCE_LOADED:
            _loaded.append(name)
        _register_loaded()
