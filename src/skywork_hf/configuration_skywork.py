"""Configurations of the two Skywork families.

Released configs come in several shapes (see `docs/checkpoints.md`); each is put into one clean transformers-5 shape
when it is read, so the models below see one spelling of every fact, and what is written loads back equal.
"""

from __future__ import annotations

import re
from copy import copy
from dataclasses import fields
from typing import TYPE_CHECKING, Any, TypeGuard

from huggingface_hub.dataclasses import strict
from transformers import LlamaConfig, MixtralConfig, PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from .compat import CACHE
from .trust import MODEL_TYPES, refuse_tokenizer_code

EXPERTS_LAYOUTS = ("modular", "fused")
# What we call `fp8` with one scale for each matrix, once it is read: transformers' own `fp8` is another format, with
# scales for blocks. Files say `fp8`.
FP8_METHOD = "skywork_fp8"

if TYPE_CHECKING:
    _ConfigBase = PreTrainedConfig
else:
    _ConfigBase = object

# Spellings of released configs that are not fields of our dataclasses, but mean one.
_RELEASED_SPELLINGS = {"num_experts", "rope_scaling", "rope_theta"}
# Left behind when a released config is read: `auto_map` names remote code that is not used, `pretraining_tp` slices
# matmuls and changes nothing but rounding, `model_type` is the class's own. `custom_pipelines` is code as well, and
# `model_name` here is a property.
_RELEASED_LEFTOVERS = ("auto_map", "custom_pipelines", "pretraining_tp", "model_type", "model_name")
_EXPERT_COUNTS = ("num_experts", "num_local_experts")
# What is beyond is damage, and building it, even without values, would not end: ten times what Skywork-MoE has (52
# layers, 832 experts in all of them) takes seconds.
_MOST_LAYERS, _MOST_EXPERTS, _LARGEST = 1024, 2**13, 2**31
_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)

_EXPERTS = "layers.*.block_sparse_moe.experts"
_FUSED_TP_PLAN = {
    f"{_EXPERTS}.gate_up_proj": "packed_colwise",
    f"{_EXPERTS}.down_proj": "rowwise",
    _EXPERTS: "moe_tp_experts",
}
_FUSED_EP_PLAN = {
    f"{_EXPERTS}.gate_up_proj": "grouped_gemm",
    f"{_EXPERTS}.down_proj": "grouped_gemm",
    _EXPERTS: "ep_dispatch_experts",
}
_MODULAR_TP_PLAN = {f"{_EXPERTS}.*.w1": "colwise", f"{_EXPERTS}.*.w3": "colwise", f"{_EXPERTS}.*.w2": "rowwise"}


def experts_of(config: dict[str, Any]) -> int | None:
    """The number of experts that a released or clean config dict states, or None where it states none.

    `num_experts` may be a list with one count per group of layers (`[16]` in Skywork-MoE-Base), an int, or be called
    `num_local_experts`.

    Raises:
        ValueError: the list is empty or holds different counts, or two fields contradict each other.
    """
    counts = set()
    for field in _EXPERT_COUNTS:
        value = config.get(field)
        if value is None:
            continue
        values = value if isinstance(value, list | tuple) else [value]
        if not values or any(isinstance(v, bool) or not isinstance(v, int) for v in values):
            raise ValueError(f"`{field}`={value!r}: expected an integer, or a list that repeats one integer.")
        if len(set(values)) > 1:
            raise ValueError(
                f"`{field}`={value!r}: different numbers of experts in different layers are not supported; "
                "every MoE layer of the released checkpoints has the same number."
            )
        counts.add(values[0])
    if len(counts) > 1:
        raise ValueError(
            f"`num_experts`={config['num_experts']!r} contradicts `num_local_experts`={config['num_local_experts']!r}."
        )
    return counts.pop() if counts else None


class _SkyworkConfigMixin(_ConfigBase):
    """What reading a released config takes in both families."""

    default_theta = 10000.0
    tokenizer_class = "SkyworkTokenizer"  # for folders with no tokenizer_config.json
    _family = "Skywork"  # which the names of its classes begin with

    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: Any  # None until `__post_init__`
    rope_parameters: Any

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Build the config of the family that the expert fields of `config_dict` tell, whatever its `model_type`.

        Keywords that are config fields override `config_dict` before anything is checked.
        """
        try:
            return cls._from_dict(config_dict, **kwargs)
        except (ValueError, OSError) as error:
            # After these, AutoTokenizer goes on without this config.
            try:
                refuse_tokenizer_code(kwargs.get("name_or_path", ""), RuntimeError)
            except RuntimeError as refusal:
                raise RuntimeError(f"{error} And {refusal}") from error
            raise

    @classmethod
    def _from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        own = {field.name for field in fields(cls)} - {field.name for field in fields(PreTrainedConfig)}
        overrides = {key: kwargs.pop(key) for key in list(kwargs) if key in own | _RELEASED_SPELLINGS}
        if any(key in overrides for key in _EXPERT_COUNTS):
            config_dict = {key: value for key, value in config_dict.items() if key not in _EXPERT_COUNTS}
        config_dict = {**config_dict, **overrides}
        family = cls._family_of(config_dict)
        if family is not cls:
            return family._from_dict(config_dict, **kwargs)
        if kwargs.get("quantization_config", ...) is None:
            del kwargs["quantization_config"]  # the default of `from_pretrained`, not a wish to forget the file's
        loaded = super().from_dict(config_dict, **kwargs)
        config = loaded[0] if isinstance(loaded, tuple) else loaded
        config._asked_for_fused = overrides.get("experts_layout") == "fused"
        return loaded

    @property
    def model_name(self) -> str:
        """Not there. AutoTokenizer asks for it before it looks for a tokenizer's class: the one place where code of
        the checkpoint can be refused.

        Raises:
            ValueError: AutoTokenizer would run code of the checkpoint.
            AttributeError: it would not.
        """
        refuse_tokenizer_code(self.name_or_path)
        raise AttributeError(f"{type(self).__name__} has no `model_name`.")

    def to_dict(self) -> dict[str, Any]:
        return _as_in_files(super().to_dict())

    def to_diff_dict(self) -> dict[str, Any]:
        return _as_in_files(super().to_diff_dict())

    @classmethod
    def _family_of(cls, config_dict: dict[str, Any]) -> type[_SkyworkConfigMixin]:
        # `model_type` and `architectures` of the released MoE checkpoint are those of the dense one.
        experts = experts_of(config_dict)
        if experts is None:
            architectures = config_dict.get("architectures") or []
            moe = issubclass(cls, SkyworkMoeConfig) or "SkyworkMoeForCausalLM" in architectures
        else:
            moe = experts > 1
        family = SkyworkMoeConfig if moe else SkyworkConfig
        return cls if issubclass(cls, family) else family

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        config_dict, kwargs = super().get_config_dict(*args, **kwargs)
        if config_dict.get("model_type") in MODEL_TYPES:
            config_dict["model_type"] = cls.model_type  # the family is told by `from_dict`, not by this string
        return config_dict, kwargs

    def __post_init__(self, **kwargs: Any) -> None:
        for leftover in _RELEASED_LEFTOVERS:
            kwargs.pop(leftover, None)
        if is_our_fp8(quantization := kwargs.get("quantization_config")):
            kwargs["quantization_config"] = {**quantization, "quant_method": FP8_METHOD}
        # The released MoE checkpoint gives the dense family's, by which other programs look up the class.
        self.architectures = self.architectures and [
            re.sub("^Skywork(Moe)?(?=Model$|ForCausalLM$)", self._family, name) for name in self.architectures
        ]
        if hidden := next((key for key in kwargs if callable(getattr(type(self), key, None))), None):
            raise ValueError(f"`{hidden}` is no field of a config, but what it can do.")
        # transformers writes into these two; the caller's own dicts stay as they are.
        self.rope_parameters = copy(self.rope_parameters)
        kwargs["rope_scaling"] = copy(kwargs.get("rope_scaling"))
        super().__post_init__(**kwargs)
        self._check()

    def standardize_rope_params(self) -> None:
        """Rope parameters in transformers' spelling: `rope_type` (released: `type`), and Skywork's own `ntk`, whose
        base is `rope_theta * factor` at every length, written as the plain rope that it is."""
        super().standardize_rope_params()
        self.rope_parameters.pop("type", None)
        _check_rope(self.rope_parameters)
        if self.rope_parameters["rope_type"] == "ntk":
            self.rope_parameters["rope_theta"] *= self.rope_parameters.pop("factor")
            self.rope_parameters["rope_type"] = "default"

    def validate_architecture(self) -> None:
        self._check()

    def _check(self) -> None:
        for field, most in {**dict.fromkeys(_SIZES, _LARGEST), "num_hidden_layers": _MOST_LAYERS}.items():
            value = getattr(self, field, None)
            if value is not None and not (type(value) is int and 1 <= value <= most):
                raise ValueError(f"`{field}`={value!r}: expected an integer from 1 to {most:,}.")
        if self.hidden_size % self.num_attention_heads != 0:
            raise ValueError(
                f"`num_attention_heads`={self.num_attention_heads} does not divide `hidden_size`={self.hidden_size}."
            )
        if self.num_attention_heads % self.num_key_value_heads != 0:
            raise ValueError(
                f"`num_key_value_heads`={self.num_key_value_heads} does not divide "
                f"`num_attention_heads`={self.num_attention_heads}."
            )


def is_our_fp8(quantization: Any) -> TypeGuard[dict[str, Any]]:
    """Whether `quantization`, a `quantization_config` as files have it, is the FP8 with one scale for each matrix."""
    if not isinstance(quantization, dict) or quantization.get("weight_block_size"):
        return False
    return quantization.get("quant_method") in ("fp8", FP8_METHOD)


def _as_in_files(config_dict: dict[str, Any]) -> dict[str, Any]:
    config_dict.pop("_asked_for_fused", None)
    quantization = config_dict.get("quantization_config")
    if isinstance(quantization, dict) and quantization.get("quant_method") == FP8_METHOD:
        config_dict["quantization_config"] = {**quantization, "quant_method": "fp8"}
    return config_dict


def _check_rope(rope: dict[str, Any]) -> None:
    known = {"default", "ntk", *ROPE_INIT_FUNCTIONS}
    rope_type, factor = rope["rope_type"], rope.get("factor")
    if rope_type not in known:
        raise ValueError(f"`rope_type`={rope_type!r} is unknown; expected one of {', '.join(sorted(known))}.")
    if rope_type in ("linear", "dynamic", "ntk") and not (isinstance(factor, int | float) and factor >= 1):
        raise ValueError(f"`factor`={factor!r} of rope type {rope_type!r}: expected a number of at least 1.")


@strict
class SkyworkConfig(_SkyworkConfigMixin, LlamaConfig):
    """Configuration of Skywork-13B and its kin: Llama in everything but the name (tech report, section 3).

    Defaults are those of Skywork-13B-Base. Reads the released form: `rope_scaling` with `type` (`linear`, `dynamic`,
    or Skywork's own `ntk`), `pretraining_tp`, `torch_dtype`, `auto_map`.

    Raises:
        ValueError: a value that would compute something else than the checkpoint was trained for; names the field.
    """

    model_type = "skywork"

    vocab_size: int = 65519
    hidden_size: int = 4608
    intermediate_size: int = 12288
    num_hidden_layers: int = 52
    num_attention_heads: int = 36
    max_position_embeddings: int = 4096
    pad_token_id: int | None = 0

    def __post_init__(self, **kwargs: Any) -> None:
        self.pretraining_tp = 1
        kwargs = {key: value for key, value in kwargs.items() if key not in _EXPERT_COUNTS and key[:4] != "moe_"}
        super().__post_init__(**kwargs)


@strict
class SkyworkMoeConfig(_SkyworkConfigMixin, MixtralConfig):
    """Configuration of Skywork-MoE; defaults are those of Skywork-MoE-Base.

    Reads the released form: `num_experts` as a list, an int or `num_local_experts`, a missing `num_experts_per_tok`,
    either `model_type`, the dense family's architecture string.

    Args:
        num_local_experts: experts in each MoE layer (`num_experts` is the same field).
        num_experts_per_tok: experts chosen for each token, the top_k.
        router_aux_loss_coef: weight of the load-balancing loss (tech report of Skywork-MoE, eq. 4); where it adapts,
            what each layer begins with.
        router_aux_loss_xi: times a layer's drop rate this is what its adapting weight goes to (eq. 7).
        router_aux_loss_alpha_max: the most that it goes to (eq. 7).
        router_aux_loss_beta: how much of it stays in each step (eq. 9).
        router_capacity_factor: with it the drop rate is counted: an expert would take this many times its even share
            of the tokens, and drop the rest. Nothing is ever dropped.
        moe_expert_interval: layer N is a MoE layer where (N + 1) % interval == 0; other layers are dense.
        moe_2layer_gate: the gate is hidden to 8 x experts, tanh, to experts, instead of one matrix.
        moe_use_logits_norm: divide the gate's logits by their standard deviation over the experts (eq. 6).
        moe_gate_norm_std: the standard deviation that normalised logits have, lambda of eq. 6.
        moe_use_mixtral_gating: changes nothing in the gate; see `multiplies_input_by_top_k`.
        moe_feature_no_mul_topk: false multiplies the experts' input by top_k; see `multiplies_input_by_top_k`.
        experts_layout: "modular", one module per expert under the Hub's own names, or "fused", 3-D parameters for
            torch.compile, grouped kernels and expert parallelism. Both read and write the same files.

    Raises:
        ValueError: a value that would compute something else than the checkpoint was trained for; names the field.
    """

    model_type = "skywork_moe"
    _family = "SkyworkMoe"
    # What the Trainer would otherwise gather from all batches of an evaluation.
    keys_to_ignore_at_inference = [CACHE, "aux_loss", "router_logits"]

    vocab_size: int = 65519
    hidden_size: int = 4608
    intermediate_size: int = 12288
    num_hidden_layers: int = 52
    num_attention_heads: int = 36
    num_key_value_heads: int | None = None  # type: ignore[assignment]
    max_position_embeddings: int = 8192
    rms_norm_eps: float = 1e-6
    pad_token_id: int | None = 0
    num_local_experts: int = 16
    router_aux_loss_coef: float = 0.01
    router_aux_loss_xi: float = 0.2
    router_aux_loss_alpha_max: float = 0.01
    router_aux_loss_beta: float = 0.99
    router_capacity_factor: float | int = 1.0
    moe_expert_interval: int = 1
    moe_2layer_gate: bool = False
    moe_use_logits_norm: bool = True
    moe_gate_norm_std: float | int = 1.0
    moe_use_mixtral_gating: bool = False
    moe_feature_no_mul_topk: bool = True
    experts_layout: str = "modular"

    def __post_init__(self, **kwargs: Any) -> None:
        experts = experts_of({"num_experts": kwargs.pop("num_experts", None)})
        self.num_local_experts = self.num_local_experts if experts is None else experts
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads  # dynamic rope wants a number
        super().__post_init__(**kwargs)

    @property
    def multiplies_input_by_top_k(self) -> bool:
        """Whether the experts' input (not the gate's) is multiplied by top_k, as the training code does by default."""
        return not (self.moe_feature_no_mul_topk or self.moe_use_mixtral_gating)

    @property
    def base_model_tp_plan(self) -> dict[str, str]:
        """Tensor parallelism: attention and dense layers as in Llama, experts as their layout has them."""
        dense = self.moe_expert_interval > 1
        plan = {key: style for key, style in LlamaConfig.base_model_tp_plan.items() if dense or ".mlp." not in key}
        tied = {"embed_tokens": "embedding_rowwise"} if self.tie_word_embeddings else {}
        return plan | (_MODULAR_TP_PLAN if self.experts_layout == "modular" else _FUSED_TP_PLAN) | tied

    @base_model_tp_plan.setter
    def base_model_tp_plan(self, plan: dict[str, str]) -> None:
        """transformers 5.19 sets it, with the tied embeddings, which it has."""
        if plan != self.base_model_tp_plan:
            raise AttributeError("`base_model_tp_plan` follows from `experts_layout`, and cannot be set.")

    @property
    def base_model_ep_plan(self) -> dict[str, str] | None:  # type: ignore[override]
        """Expert parallelism, which transformers has for 3-D parameters only."""
        return _FUSED_EP_PLAN if self.experts_layout == "fused" else None

    def is_moe_layer(self, layer_idx: int) -> bool:
        """Whether layer `layer_idx` (from 0) has experts, rather than a dense feed-forward part."""
        return (layer_idx + 1) % self.moe_expert_interval == 0

    def _check(self) -> None:
        super()._check()
        experts = self.num_local_experts
        if experts < 2:
            raise ValueError(f"`num_experts`={experts}: expected at least 2; SkyworkConfig is for a dense model.")
        if experts * self.num_hidden_layers > _MOST_EXPERTS:
            raise ValueError(
                f"`num_experts`={experts} in {self.num_hidden_layers} layers: expected at most {_MOST_EXPERTS:,} "
                "experts in all."
            )
        expected = {
            "num_experts_per_tok": (1 <= self.num_experts_per_tok <= experts, f"1 to `num_experts`={experts}"),
            "moe_gate_norm_std": (self.moe_gate_norm_std > 0, "a number above 0"),
            "moe_expert_interval": (self.moe_expert_interval >= 1, "an integer of at least 1"),
            "router_aux_loss_beta": (0 <= self.router_aux_loss_beta < 1, "0 to below 1"),
            "router_aux_loss_xi": (self.router_aux_loss_xi >= 0, "0 or more"),
            "router_aux_loss_alpha_max": (self.router_aux_loss_alpha_max >= 0, "0 or more"),
            "router_capacity_factor": (self.router_capacity_factor > 0, "a number above 0"),
        }
        for field, (fits, values) in expected.items():
            if not fits:
                raise ValueError(f"`{field}`={getattr(self, field)}: expected {values}.")
        if self.router_jitter_noise:
            raise ValueError(f"`router_jitter_noise`={self.router_jitter_noise}: Skywork-MoE's gate has no noise.")
        if self.experts_layout not in EXPERTS_LAYOUTS:
            raise ValueError(
                f"`experts_layout`={self.experts_layout!r}: expected one of {', '.join(EXPERTS_LAYOUTS)}."
            )


__all__ = ["SkyworkConfig", "SkyworkMoeConfig"]
