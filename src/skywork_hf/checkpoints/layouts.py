"""The layouts of checkpoints: whose names the tensors have, and what a config means there."""

from __future__ import annotations

import re
from typing import Any

import torch
from transformers import LlamaConfig

from ..configuration_skywork import SkyworkConfig, SkyworkMoeConfig, experts_of
from ..modeling_skywork import SkyworkForCausalLM, SkyworkForSequenceClassification
from ..modeling_skywork_moe import SkyworkMoeForCausalLM

HUB, TRAINING, MEGATRON, LLAMA = "hub", "training", "megatron", "llama"
# Hub names to those of the training layout; layers without experts have the same names in both.
_TRAINING_NAMES = (
    ("block_sparse_moe.gate.", "mlp.moe.gate.wg."),
    ("block_sparse_moe.experts.", "mlp.moe.experts.experts."),
    (".w1.", ".gate_proj."),
    (".w2.", ".down_proj."),
    (".w3.", ".up_proj."),
)
TRAINING_MARK = "mlp.moe."
# What a field means in the training layout where its config does not have it. The Hub's has other defaults.
_TRAINING_DEFAULTS = {"moe_2layer_gate": True, "moe_feature_no_mul_topk": False}

# Where Llama leaves a choice, what Skywork's dense models are.
_CHOICES_OF_LLAMA = {"attention_bias": (False,), "mlp_bias": (False,), "hidden_act": ("silu", "swish")}

# The parts of a model, by what the names of their tensors contain in either layout; the first that fits counts.
PARTS = {
    "embeddings": r"embed_tokens\.",
    "attention": r"\.self_attn\.|^self_attn\.",
    "experts": r"\.experts\.",
    "dense feed-forward": r"\.mlp\.(gate|up|down)_proj\.",
    "gate": r"\.gate\.",
    "norms": r"norm\.",
    "head": r"^(lm_head|score)\.",
}
OTHER = "other"


def to_training(name: str) -> str:
    """A Hub name in the training layout."""
    if "block_sparse_moe" in name:
        for hub, training in _TRAINING_NAMES:
            name = name.replace(hub, training)
    return name


def to_hub(name: str) -> str:
    """A name of the training layout as the Hub has it."""
    if TRAINING_MARK in name:
        for hub, training in _TRAINING_NAMES:
            name = name.replace(training, hub)
    return name


def is_training_layout(names: Any) -> bool:
    return any(TRAINING_MARK in name for name in names)


def is_base_model(names: Any) -> bool:
    return not any(name.startswith("model.") for name in names)


def layout_named(model_type: str, names: Any) -> str:
    """The layout of the files beside a config of this `model_type`, whose tensors have these names."""
    if model_type == LLAMA:
        return LLAMA
    return TRAINING if is_training_layout(names) else HUB


def part_named(name: str) -> str:
    """The part of the model that a tensor belongs to, a key of `PARTS`, or "other"."""
    return next((part for part, pattern in PARTS.items() if re.search(pattern, name)), OTHER)


def config_of(raw: dict[str, Any], training: bool = False) -> SkyworkConfig | SkyworkMoeConfig:
    """The config that a `config.json` describes.

    Args:
        raw: its content.
        training: whether it lies beside weights in the training layout.

    Raises:
        ValueError: it is a Llama's that no Skywork model computes; names the field.
    """
    if raw["model_type"] == LLAMA:
        raw = _skywork_of_llama(raw)
    if training:
        raw = {**_TRAINING_DEFAULTS, **raw}
    config_class = SkyworkMoeConfig if raw["model_type"] == "skywork_moe" else SkyworkConfig
    return config_class.from_dict({**raw, "experts_layout": "modular"})


def _skywork_of_llama(raw: dict[str, Any]) -> dict[str, Any]:
    if experts_of(raw) is not None:
        raise ValueError("`model_type` is 'llama', and there are experts: take the config.json of these weights.")
    llama = LlamaConfig.from_dict(raw).to_dict()  # with Llama's defaults, which its files do not state
    for field, choices in _CHOICES_OF_LLAMA.items():
        if llama[field] not in choices:
            raise ValueError(f"`{field}` is {llama[field]!r}, and a Skywork model has {choices[0]!r}: it is none.")
    architectures = [name.replace("Llama", "Skywork") for name in llama["architectures"] or []]
    return {**llama, "model_type": SkyworkConfig.model_type, "architectures": architectures}


def model_class_of(config: SkyworkConfig | SkyworkMoeConfig) -> Any:
    """The class whose weights a checkpoint of that config holds."""
    if isinstance(config, SkyworkMoeConfig):
        return SkyworkMoeForCausalLM
    classifies = SkyworkForSequenceClassification.__name__ in (config.architectures or [])
    return SkyworkForSequenceClassification if classifies else SkyworkForCausalLM


def empty_model(config: SkyworkConfig | SkyworkMoeConfig) -> Any:
    """The model on the meta device, with nothing quantised."""
    plain = config.__class__.from_dict({k: v for k, v in config.to_dict().items() if k != "quantization_config"})
    with torch.device("meta"):
        return model_class_of(plain)(plain)


def hub_shapes(config: SkyworkConfig | SkyworkMoeConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the model, in order, under the Hub's names."""
    return {name: tuple(tensor.shape) for name, tensor in empty_model(config).state_dict().items()}
