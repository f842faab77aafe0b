"""Every line that touches a registry of another library."""

from __future__ import annotations

import re
from typing import Any

from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
)
from transformers.conversion_mapping import USER_REGISTERED_MAPPINGS, register_checkpoint_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter, WeightRenaming
from transformers.models.auto.tokenization_auto import REGISTERED_TOKENIZER_CLASSES
from transformers.quantizers import auto as quantizers_auto
from transformers.utils import logging

from .configuration_skywork import FP8_METHOD, SkyworkConfig, SkyworkMoeConfig
from .importing import when_imported
from .loading import SkyworkLoadingMixin, refuse_other_adapter
from .modeling_skywork import SkyworkForCausalLM, SkyworkForSequenceClassification, SkyworkModel
from .modeling_skywork_moe import SkyworkMoeForCausalLM, SkyworkMoeModel
from .placement.dispatch import load_placed
from .quantization.bitsandbytes import keep_unpacked, unpack, unpack_in_time
from .quantization.config import INT8_METHOD, SkyworkFp8Config, SkyworkInt8Config
from .quantization.linear import refuse_merging, refuse_reading_codes
from .quantization.quantizers import SkyworkFp8Quantizer, SkyworkInt8Quantizer
from .tokenization_skywork import SkyworkTokenizer

logger = logging.get_logger(__name__)


def register() -> None:
    """Make the Auto classes of transformers find ours. May be called again, and after another package took a name:
    ours then take its place, and a warning says whose."""
    for config_class in (SkyworkConfig, SkyworkMoeConfig):
        _warn_if_taken(CONFIG_MAPPING, config_class.model_type, config_class)
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    AutoModel.register(SkyworkConfig, SkyworkModel, exist_ok=True)
    AutoModelForCausalLM.register(SkyworkConfig, SkyworkForCausalLM, exist_ok=True)
    AutoModelForSequenceClassification.register(SkyworkConfig, SkyworkForSequenceClassification, exist_ok=True)
    AutoModel.register(SkyworkMoeConfig, SkyworkMoeModel, exist_ok=True)
    AutoModelForCausalLM.register(SkyworkMoeConfig, SkyworkMoeForCausalLM, exist_ok=True)
    # By its name, which released tokenizer configs and our model configs give. `AutoTokenizer.register` would tie it
    # to the config classes as well, and then `trust_remote_code=True` would run the checkpoint's tokenizer code.
    _warn_if_taken(REGISTERED_TOKENIZER_CLASSES, SkyworkTokenizer.__name__, SkyworkTokenizer)
    REGISTERED_TOKENIZER_CLASSES[SkyworkTokenizer.__name__] = SkyworkTokenizer
    register_checkpoint_conversion_mapping(SkyworkMoeConfig.model_type, _fused_experts_conversion(), overwrite=True)
    # So that transformers asks each model: see `SkyworkMoePreTrainedModel.is_custom_code`.
    USER_REGISTERED_MAPPINGS.discard(SkyworkMoeConfig.model_type)
    SkyworkLoadingMixin._load_placed = staticmethod(load_placed)
    SkyworkLoadingMixin._unpack = staticmethod(unpack)
    SkyworkLoadingMixin._unpack_in_time = staticmethod(unpack_in_time)
    _register_quantizer(FP8_METHOD, SkyworkFp8Config, SkyworkFp8Quantizer)
    _register_quantizer(INT8_METHOD, SkyworkInt8Config, SkyworkInt8Quantizer)
    when_imported("transformers.trainer", _report_router_load)
    when_imported("peft.utils.constants", _set_default_targets)
    when_imported("peft.tuners.tuners_utils", _check_adapters)
    when_imported("peft.peft_model", _check_loaded_adapters)


def _register_quantizer(method: str, config_class: Any, quantizer_class: Any) -> None:
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
    expert_names = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
    for name, targets in vars(constants).items():
        if re.fullmatch(r"TRANSFORMERS_MODELS_TO_\w+_MODULES_MAPPING", name) and "llama" in targets:
            targets[SkyworkConfig.model_type] = list(targets["llama"])
            of_moe = targets.get("mixtral", targets["llama"])
            targets[SkyworkMoeConfig.model_type] = [expert_names.get(target, target) for target in of_moe]


def _check_adapters(tuners: Any) -> None:
    """Where PEFT has made adapters, and where it refuses what it cannot merge into; it asks nothing that a layer could
    answer."""
    check, inject = tuners.BaseTuner._check_merge_allowed, tuners.BaseTuner.inject_adapter
    unmerge = tuners.BaseTuner.unmerge_adapter
    if check.__module__ == __name__:
        return  # `register` was called again

    def check_merge_allowed(tuner: Any) -> None:
        refuse_merging(tuner.model)
        if isinstance(tuner.model, SkyworkLoadingMixin):
            unpack(tuner.model)
        check(tuner)

    def unmerge_adapter(tuner: Any) -> None:
        if isinstance(tuner.model, SkyworkLoadingMixin):
            unpack(tuner.model)
        unmerge(tuner)

    def inject_adapter(tuner: Any, model: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        inject(tuner, model, adapter_name, *args, **kwargs)
        config = tuner.peft_config[adapter_name]
        refuse_reading_codes(model, config.peft_type.value)
        reads_weights = not config.inference_mode or getattr(config, "use_dora", False)
        if reads_weights and isinstance(model, SkyworkLoadingMixin):
            keep_unpacked(model)

    tuners.BaseTuner._check_merge_allowed = check_merge_allowed
    tuners.BaseTuner.unmerge_adapter = unmerge_adapter
    tuners.BaseTuner.inject_adapter = inject_adapter


def _check_loaded_adapters(peft_model: Any) -> None:
    """Where PEFT has read an adapter's file."""
    load = peft_model.PeftModel.load_adapter
    if load.__module__ == __name__:
        return  # `register` was called again

    def load_adapter(model: Any, *args: Any, **kwargs: Any) -> Any:
        loaded = load(model, *args, **kwargs)
        if not kwargs.get("ignore_mismatched_sizes"):
            refuse_other_adapter(model, loaded)
        return loaded

    load_adapter.__doc__ = load.__doc__
    peft_model.PeftModel.load_adapter = load_adapter


def _warn_if_taken(registry: Any, name: str, ours: type) -> None:
    if name in registry and registry[name] is not ours:
        other = registry[name]
        logger.warning(
            f"skywork_hf replaces {other.__module__}.{other.__qualname__}, which was registered as `{name}`: the Auto "
            "classes now load it with skywork_hf."
        )


def _fused_experts_conversion() -> list[WeightConverter | WeightRenaming]:
    """One matrix per expert in the files, 3-D parameters in the fused layout."""
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
