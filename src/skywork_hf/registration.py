"""Every line that touches a registry of another library."""

from __future__ import annotations

from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter, WeightRenaming
from transformers.utils import logging

from .configuration_skywork import SkyworkConfig, SkyworkMoeConfig
from .modeling_skywork import SkyworkForCausalLM, SkyworkForSequenceClassification, SkyworkModel
from .modeling_skywork_moe import SkyworkMoeForCausalLM, SkyworkMoeModel
from .tokenization_skywork import SkyworkTokenizer

logger = logging.get_logger(__name__)


def register() -> None:
    """Make the Auto classes of transformers find ours. May be called again, and after another package took a name:
    ours then take its place, and a warning says whose."""
    for config_class in (SkyworkConfig, SkyworkMoeConfig):
        _warn_if_taken(config_class)
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
        AutoTokenizer.register(config_class, SkyworkTokenizer, exist_ok=True)
    AutoModel.register(SkyworkConfig, SkyworkModel, exist_ok=True)
    AutoModelForCausalLM.register(SkyworkConfig, SkyworkForCausalLM, exist_ok=True)
    AutoModelForSequenceClassification.register(SkyworkConfig, SkyworkForSequenceClassification, exist_ok=True)
    AutoModel.register(SkyworkMoeConfig, SkyworkMoeModel, exist_ok=True)
    AutoModelForCausalLM.register(SkyworkMoeConfig, SkyworkMoeForCausalLM, exist_ok=True)
    register_checkpoint_conversion_mapping(SkyworkMoeConfig.model_type, _fused_experts_conversion(), overwrite=True)


def _warn_if_taken(config_class: type[SkyworkConfig] | type[SkyworkMoeConfig]) -> None:
    name = config_class.model_type
    if name in CONFIG_MAPPING and CONFIG_MAPPING[name] is not config_class:
        other = CONFIG_MAPPING[name]
        logger.warning(
            f"skywork_hf replaces {other.__module__}.{other.__qualname__}, which was registered for the model type "
            f"`{name}`: the Auto classes now load it with skywork_hf."
        )


def _fused_experts_conversion() -> list[WeightConverter | WeightRenaming]:
    """One matrix per expert in the files, 3-D parameters in the fused layout. Where a model has no parameter of the
    merged name, as in the modular layout, transformers loads the tensors under their own names."""
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
