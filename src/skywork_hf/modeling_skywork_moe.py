"""Skywork-MoE: transformers' Mixtral with Skywork's gate, experts and auxiliary loss.

Attention, norms, rotary embedding, caches and outputs are Mixtral's. Written here is what differs: the gate
(tech report of Skywork-MoE, eq. 5-6), the two layouts that experts can have, dense layers between MoE layers, and the
load-balancing loss (eq. 4).
"""

# No `from __future__ import annotations`: transformers' common tests read the types in `forward`'s signature.
from functools import partial
from itertools import pairwise
from typing import Any, Unpack

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MoeCausalLMOutputWithPast
from transformers.models.mistral.modeling_mistral import MistralMLP
from transformers.models.mixtral.modeling_mixtral import (
    MixtralAttention,
    MixtralDecoderLayer,
    MixtralExperts,
    MixtralForCausalLM,
    MixtralModel,
    MixtralPreTrainedModel,
    MixtralRMSNorm,
    MixtralRotaryEmbedding,
    MixtralTopKRouter,
)
from transformers.utils import TransformersKwargs, can_return_tuple, logging
from transformers.utils.output_capturing import OutputRecorder

from .compat import CACHE, cache_argument, slice_logits_to_keep, warns_of_the_old_cache_name
from .configuration_skywork import SkyworkMoeConfig
from .loading import SkyworkLoadingMixin
from .losses import SkyworkLossMixin, at_least_one, learns_in_context, target_count
from .overflow import OverflowWatch

logger = logging.get_logger(__name__)

# So little that it only keeps logits that are all equal from being divided by 0.
_NO_VARIANCE = torch.finfo(torch.float32).eps ** 2


def normalisation(config: SkyworkMoeConfig) -> float | None:
    """By what `normalised` multiplies the gate's logits; None where the config has them as they are."""
    if not config.moe_use_logits_norm:
        return None
    # `layer_norm` divides the sum of squares by n, and eq. 6 by n - 1.
    return config.moe_gate_norm_std * (1 - 1 / config.num_local_experts) ** 0.5


def normalised(router_logits: torch.Tensor, factor: float | None) -> torch.Tensor:
    """The gate's logits as its softmax takes them (eq. 6): less their mean, over their standard deviation, times
    `moe_gate_norm_std`. A row whose logits are all equal (the standard deviation is 0) has all experts equally likely
    afterwards, where the formula says 0 / 0.

    Args:
        router_logits: [tokens, experts], as the gate's projection gives them, any dtype.
        factor: the `normalisation` of the config.

    Returns:
        float32 [tokens, experts].
    """
    logits = router_logits.float()
    if factor is None:
        return logits
    return F.layer_norm(logits, logits.shape[-1:], eps=_NO_VARIANCE) * factor


def routing_probabilities(router_logits: torch.Tensor, config: SkyworkMoeConfig) -> torch.Tensor:
    """The softmax over all experts of the `normalised` logits (eq. 5-6): float32 [tokens, experts]."""
    return torch.softmax(normalised(router_logits, normalisation(config)), dim=-1)


def load_balancing_loss(
    router_logits: tuple[torch.Tensor, ...], config: SkyworkMoeConfig, attention_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """The auxiliary loss of each MoE layer (tech report of Skywork-MoE, eq. 4): the sum over experts of
    (1/n - mean over tokens of g)^2, with g the full softmax of the (normalised) gate.

    Args:
        router_logits: one [batch * tokens, experts] for each MoE layer, before normalisation.
        attention_mask: [batch, tokens], 0 where a token is padding and does not count; may be longer than the tokens
            on the left, by those in the cache. Of flex attention's `BlockMask`, a token is padding that does not see
            itself. None, and a mask of four dimensions, count all.

    Returns:
        float32 [MoE layers], on the device of the first layer's logits.
    """
    device = router_logits[0].device
    weight = token_weights(router_logits[0], attention_mask)
    weight = weight / weight.sum().clamp_min(1)
    load = torch.stack(
        [weighted_sum(weight, routing_probabilities(logits.to(device), config)) for logits in router_logits]
    )
    return (1 / config.num_local_experts - load).square().sum(dim=-1)


def token_weights(router_logits: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """float32 [batch * tokens]: 1 for each row of `router_logits`, 0 where it is padding; see
    `load_balancing_loss` for the mask."""
    tokens = router_logits.shape[0]
    if hasattr(attention_mask, "mask_mod"):
        attention_mask = _sees_itself(attention_mask, tokens, router_logits.device)
    if attention_mask is None or attention_mask.dim() != 2:
        return torch.ones(tokens, device=router_logits.device)
    mask = attention_mask[:, -(tokens // attention_mask.shape[0]) :]
    return mask.reshape(-1).to(router_logits.device, torch.float32)


def _sees_itself(block_mask: Any, tokens: int, device: torch.device) -> torch.Tensor:
    """Of a `BlockMask`: bool [batch, queries], of `tokens` in all. A causal mask hides a token from itself only where
    it is padding; in packed rows, every token sees itself. The tokens are the last of the keys."""
    batch, _, queries, keys = block_mask.shape  # a batch of 1 holds for all rows

    def sees_itself(row: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
        return block_mask.mask_mod(row, torch.zeros_like(row), query, query + keys - queries)

    over_tokens = torch.vmap(sees_itself, in_dims=(None, 0))
    indices = (torch.arange(size, device=device) for size in (batch, queries))
    return torch.vmap(over_tokens, in_dims=(0, None))(*indices).expand(tokens // queries, -1)


def weighted_sum(weight: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """The sum over rows of `values` [rows, columns], each times its `weight` [rows]: [columns]. No matmul, which
    autocast would round to 16 bit."""
    return (weight.unsqueeze(-1) * values).sum(dim=0)


class SkyworkMoeGate(MixtralTopKRouter):
    """Scores the experts and picks top_k of them for each token."""

    def __init__(self, config: SkyworkMoeConfig) -> None:
        super().__init__(config)
        self.normalisation = normalisation(config)

    def project(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[tokens, hidden_size] to the logits [tokens, experts]."""
        return F.linear(hidden_states, self.weight)

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Route tokens.

        Args:
            hidden_states: [tokens, hidden_size].

        Returns:
            The logits before normalisation [tokens, experts], the weights of the chosen experts [tokens, top_k]
            (float32, each row sums to 1) and their indices [tokens, top_k].
        """
        router_logits = self.project(hidden_states)
        # A softmax over the chosen is the softmax over all with the chosen's sum made 1.
        chosen, indices = normalised(router_logits, self.normalisation).topk(self.top_k, dim=-1)
        return router_logits, torch.softmax(chosen, dim=-1), indices


class SkyworkMoeGateProjection(nn.Module):
    """A bias-free matrix of the two-layer gate. Not an nn.Linear, so that quantisers and adapters that look for linear
    layers leave it alone, as they do the one-layer gate."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return F.linear(hidden_states, self.weight)


class SkyworkMoeTwoLayerGate(SkyworkMoeGate):
    """The gate of `moe_2layer_gate`: hidden to 8 x experts, tanh, to experts. Its matrices are named `0` and `2`, as
    in the nn.Sequential of the training code."""

    def __init__(self, config: SkyworkMoeConfig) -> None:
        nn.Module.__init__(self)
        self.top_k = config.num_experts_per_tok
        self.normalisation = normalisation(config)
        width = 8 * config.num_local_experts
        self.add_module("0", SkyworkMoeGateProjection(config.hidden_size, width))
        self.add_module("2", SkyworkMoeGateProjection(width, config.num_local_experts))

    def project(self, hidden_states: torch.Tensor) -> torch.Tensor:
        first, second = self.children()
        return second(torch.tanh(first(hidden_states)))


class SkyworkMoeExpert(nn.Module):
    """One SwiGLU feed-forward network, with the Hub's names: w1 gate, w3 up, w2 down."""

    def __init__(self, config: SkyworkMoeConfig) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.w2 = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.w3 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.w2(self.act_fn(self.w1(hidden_states)) * self.w3(hidden_states))


class Pairs:
    """The pairs of a token and an expert that it chose, sorted by expert, so that each expert is called once, on
    consecutive rows. One token's need no sorting.

    Args:
        hidden_states: [tokens, hidden_size].
        top_k_index: int64 [tokens, top_k].
        in_order: whether experts have to be called in the order of their numbers, whatever it costs.
    """

    def __init__(self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, in_order: bool) -> None:
        self.tokens, self.top_k = top_k_index.shape
        self.order: torch.Tensor | None = None
        if self.tokens == 1 and not in_order:
            self.experts = top_k_index[0]
            self.rows = hidden_states
        else:
            self.experts, self.order = top_k_index.flatten().sort(stable=True)
            self.rows = hidden_states[self.order // self.top_k]

    def runs(self, experts: int, overflow: OverflowWatch) -> list[tuple[int, slice]]:
        """The number of each chosen expert, of so many, with the slice of its rows: what the host waits for."""
        if self.order is None:
            return [(number, slice(row, row + 1)) for row, number in enumerate(overflow.read_with(self.experts))]
        starts = torch.arange(experts + 1, device=self.experts.device)
        bounds = overflow.read_with(torch.searchsorted(self.experts, starts))
        return [(number, slice(*run)) for number, run in enumerate(pairwise(bounds)) if run[0] < run[1]]

    def rows_of(self, run: slice, rows: torch.Tensor) -> torch.Tensor:
        """Those of a run, in `self.rows` or a copy of them elsewhere. All runs of one token have its row."""
        return rows if self.order is None else rows[run]

    def weighted_sum(self, outputs: list[torch.Tensor], top_k_weights: torch.Tensor) -> torch.Tensor:
        """[tokens, hidden_size] of the outputs of each run, in the order of the rows; summed in float32."""
        by_pair = torch.cat(outputs or [self.rows])
        if self.order is not None:
            by_pair = by_pair[self.order.argsort()]
        by_token = by_pair.view(self.tokens, self.top_k, by_pair.shape[-1])
        return (by_token * top_k_weights.unsqueeze(-1)).sum(dim=1).to(self.rows.dtype)


class SkyworkMoeExperts(nn.ModuleList):
    """The modular layout: one module per expert, each on whatever device it was put, and computed there.

    The fused layout is transformers' own `MixtralExperts`; both have the same `forward`. Models loaded by a device map
    of several devices have `placement.experts.PlacedExperts`, where all devices compute at the same time.
    """

    def __init__(self, config: SkyworkMoeConfig) -> None:
        super().__init__(SkyworkMoeExpert(config) for _ in range(config.num_local_experts))
        self.overflow = OverflowWatch()
        self._others_are_sharded: bool | None = None

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """The weighted sum of the chosen experts' outputs.

        Args:
            hidden_states: [tokens, hidden_size].
            top_k_index: int64 [tokens, top_k].
            top_k_weights: float32 [tokens, top_k].

        Returns:
            [tokens, hidden_size], dtype and device of `hidden_states`; summed in float32.
        """
        may_idle = self._may_run_idle()
        pairs = Pairs(hidden_states, top_k_index, in_order=may_idle)
        experts = list(self)
        runs = pairs.runs(len(experts), self.overflow)
        if may_idle:
            runs = with_idle(runs, experts)
        outputs = []
        for number, run in runs:
            expert, rows = experts[number], pairs.rows_of(run, pairs.rows)
            device = device_of(expert)
            output = expert(rows if device.type == "meta" else rows.to(device))
            outputs.append(output.to(hidden_states.device))
        return pairs.weighted_sum(outputs, top_k_weights)

    def _may_run_idle(self) -> bool:
        """Whether there may be experts that run without a token; see `_runs_idle`. To look at all of them takes longer
        than to decode with some, so that in inference it is done once: FSDP, ZeRO-3 and tensor parallelism, in which a
        model may be wrapped later on, treat experts alike, and the first is looked at each time."""
        if torch.is_grad_enabled():
            self._others_are_sharded = None
            return True
        if not _has_processes():
            return False
        if self._others_are_sharded is None:
            self._others_are_sharded = is_sharded(self)
        return self._others_are_sharded or is_sharded(self[0])


def device_of(expert: Any) -> torch.device:
    """Where an expert lives; "meta" where accelerate brings its weights when they are needed."""
    # Not as `w1.weight`: ZeRO-3 gathers what is asked for so, on this process alone, and quantised layers wrap it.
    weight = expert.w1._parameters.get("weight")
    return (next(expert.parameters()) if weight is None else weight).device  # None: below an adapter


def with_idle(runs: list[tuple[int, slice]], experts: list[nn.Module]) -> list[tuple[int, slice]]:
    """`runs` in the order of experts, with those that run though no token chose them, on no rows."""
    chosen = dict(runs)
    return [
        (number, chosen.get(number, slice(0, 0)))
        for number, expert in enumerate(experts)
        if number in chosen or _runs_idle(expert)
    ]


def _has_processes() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _runs_idle(expert: nn.Module) -> bool:
    """Whether an expert runs though no token chose it: where it is trained, so that it has a gradient, of zeros, on
    every process; and where its weights are sharded, since all processes have to call what puts them together."""
    # Weights that accelerate would have to bring, from a disk or the CPU, are not trained there.
    trains = torch.is_grad_enabled() and device_of(expert).type != "meta"
    if trains and any(parameter.requires_grad for parameter in expert.parameters()):
        return True
    return _has_processes() and is_sharded(expert)


def is_sharded(module: nn.Module) -> bool:
    """Whether processes share the parameters of a module, by FSDP2, tensor parallelism, ZeRO-3 or FSDP1."""
    from torch.distributed.tensor import DTensor  # not in every build of torch

    return any(
        "_fsdp_wrapped_module" in part._modules
        or any(isinstance(own, DTensor) or hasattr(own, "ds_id") for own in part._parameters.values())
        for part in module.modules()
    )


class SkyworkMoeBlock(nn.Module):
    """The sparse feed-forward part of a layer: the gate and its experts."""

    def __init__(self, config: SkyworkMoeConfig) -> None:
        super().__init__()
        self.gate = SkyworkMoeTwoLayerGate(config) if config.moe_2layer_gate else SkyworkMoeGate(config)
        self.experts = SkyworkMoeExperts(config) if config.experts_layout == "modular" else MixtralExperts(config)
        self.overflow = getattr(self.experts, "overflow", None) or OverflowWatch()
        # The input of the experts, not that of the gate, is multiplied by top_k.
        self.input_multiplier = config.num_experts_per_tok if config.multiplies_input_by_top_k else None

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[batch, tokens, hidden_size] to the same shape."""
        rows = hidden_states.reshape(-1, hidden_states.shape[-1])
        _, top_k_weights, top_k_index = self.gate(rows)
        inputs = rows if self.input_multiplier is None else rows * self.input_multiplier
        outputs = self.experts(inputs, top_k_index, top_k_weights)
        self.overflow.look(rows, outputs)
        return outputs.view(hidden_states.shape)


class SkyworkMoeDecoderLayer(MixtralDecoderLayer):
    """A Mixtral layer without its feed-forward part, which the two subclasses add under the Hub's names."""

    def __init__(self, config: SkyworkMoeConfig, layer_idx: int) -> None:
        # Past MixtralDecoderLayer's own, which would build experts of its own under another name.
        GradientCheckpointingLayer.__init__(self)
        self.hidden_size = config.hidden_size
        self.self_attn = MixtralAttention(config, layer_idx)
        self.input_layernorm = MixtralRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = MixtralRMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class SkyworkMoeDenseLayer(SkyworkMoeDecoderLayer):
    """A layer without experts, where `moe_expert_interval` is above 1."""

    def __init__(self, config: SkyworkMoeConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.mlp = MistralMLP(config)  # type: ignore[assignment]


class SkyworkMoeSparseLayer(SkyworkMoeDecoderLayer):
    """A layer with experts."""

    def __init__(self, config: SkyworkMoeConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.block_sparse_moe = SkyworkMoeBlock(config)

    @property
    def mlp(self) -> nn.Module:  # type: ignore[override]
        """What Mixtral's forward calls the feed-forward part."""
        return self.block_sparse_moe


def _layer_class(config: SkyworkMoeConfig, idx: int) -> type[SkyworkMoeDecoderLayer]:
    return SkyworkMoeSparseLayer if config.is_moe_layer(idx) else SkyworkMoeDenseLayer


class SkyworkMoePreTrainedModel(SkyworkLoadingMixin, SkyworkLossMixin, MixtralPreTrainedModel):
    config: SkyworkMoeConfig
    config_class = SkyworkMoeConfig
    _can_compile_fullgraph = False  # of the class; a model of the fused layout says otherwise
    _can_record_outputs = {
        "router_logits": OutputRecorder(SkyworkMoeGate, index=0),
        "hidden_states": SkyworkMoeDecoderLayer,
        "attentions": MixtralAttention,
    }

    def __init__(self, config: SkyworkMoeConfig, *args: Any, **kwargs: Any) -> None:
        fused = getattr(config, "experts_layout", None) == "fused"
        if fused and getattr(config, "quantization_config", None) is not None:
            _use_modular_layout(config)
        # Not super(): in our subclasses that is MixtralModel or MixtralForCausalLM, which would build Mixtral first.
        MixtralPreTrainedModel.__init__(self, config, *args, **kwargs)
        # The modular layout asks the host which experts were chosen, once a layer.
        self._can_compile_fullgraph = config.experts_layout == "fused"
        # Those that are there: accelerate's and PEFT's FSDP refuse a name of which they find none.
        layers = {_layer_class(config, idx).__name__ for idx in range(config.num_hidden_layers)}
        self._no_split_modules = sorted(layers)

    def is_custom_code(self) -> bool:  # type: ignore[override]
        """Whether transformers leaves the names of the weights alone, in files and in adapters of PEFT: it does so for
        what it takes for custom code, and merges the experts of the fused layout."""
        return self.config.experts_layout == "modular"

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Any = checkpoint, *args: Any, **kwargs: Any
    ) -> None:
        """transformers' own; not reentrant unless that is asked for, also where PEFT passes an empty dict: the
        reentrant kind runs layers without gradients, so that what their gates gave has none."""
        if "use_reentrant" not in getattr(gradient_checkpointing_func, "keywords", {}):
            gradient_checkpointing_func = partial(gradient_checkpointing_func, use_reentrant=False)
        super()._set_gradient_checkpointing(enable, gradient_checkpointing_func, *args, **kwargs)

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True  # `MixtralExperts` carries `@use_experts_implementation`; transformers looks for it in this file

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, SkyworkMoeTwoLayerGate):
            return  # nothing of its own: its two projections come by themselves
        super()._init_weights(module)
        if isinstance(module, SkyworkMoeGateProjection):
            init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)


def _use_modular_layout(config: SkyworkMoeConfig) -> None:
    reason = "quantisation works on linear layers, and would leave the 3-D parameters of fused experts in 16 bit"
    if getattr(config, "_asked_for_fused", False):
        raise ValueError(
            f'experts_layout="fused" cannot be quantised: {reason}. Leave `experts_layout` away, or do not quantise.'
        )
    logger.info(f"The experts layout becomes modular: {reason}.")
    config.experts_layout = "modular"


class SkyworkMoeModel(SkyworkMoePreTrainedModel, MixtralModel):
    """The MoE decoder: `input_ids` [batch, tokens] to `last_hidden_state` [batch, tokens, hidden_size], and on request
    `router_logits`, one [batch * tokens, experts] for each MoE layer, before normalisation."""

    def __init__(self, config: SkyworkMoeConfig) -> None:
        # Past MixtralModel's own, which would build Mixtral layers.
        SkyworkMoePreTrainedModel.__init__(self, config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(_layer_class(config, idx)(config, idx) for idx in range(config.num_hidden_layers))
        self.norm = MixtralRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = MixtralRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()


class SkyworkMoeForCausalLM(SkyworkMoePreTrainedModel, MixtralForCausalLM):
    """Skywork-MoE with its language-model head: `logits` [batch, tokens, vocab_size]."""

    # float32 [MoE layers], one coefficient of the auxiliary loss for each layer while these adapt to the drop rates;
    # None: `config.router_aux_loss_coef` for all.
    aux_loss_coefficients: torch.Tensor | None = None

    def __init__(self, config: SkyworkMoeConfig) -> None:
        # Past MixtralForCausalLM's own, which would build a MixtralModel.
        SkyworkMoePreTrainedModel.__init__(self, config)
        self.model = SkyworkMoeModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @learns_in_context
    @can_return_tuple
    @warns_of_the_old_cache_name
    def forward(  # type: ignore[misc]  # names that TransformersKwargs has too, as Mixtral's own forward
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MoeCausalLMOutputWithPast:
        """As `MixtralForCausalLM.forward`, but for the auxiliary loss: `aux_loss`, given where router logits are asked
        for, is the sum over the MoE layers of `load_balancing_loss`, and `loss` then contains each layer's times
        `config.router_aux_loss_coef` or its own of `aux_loss_coefficients`. `cache` is the newer name of
        `past_key_values`; either is taken.

        Where a batch is a part of a step, and the Trainer says by `num_items_in_batch` how many target tokens the
        step has, the batch's auxiliary loss counts by its share of these, so that a step has the mean over its
        batches, and not the sum."""
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_router_logits=output_router_logits,
            **cache_argument(past_key_values, cache),
            **kwargs,
        )
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))

        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.vocab_size, **kwargs)
        aux_loss = None
        if output_router_logits:
            layer_losses = load_balancing_loss(outputs.router_logits, self.config, attention_mask)
            aux_loss = layer_losses.sum()
            if loss is not None and labels is not None:
                share = share_of_step(labels, **kwargs)
                loss = loss + (share * self._weighted(layer_losses)).to(loss.device)

        return MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=aux_loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
            **{CACHE: getattr(outputs, CACHE)},
        )

    def _valid_auto_compile_criteria(self, *args: Any) -> bool:
        """Whether `generate` compiles the forward pass: not one that would break at each layer, and be compiled anew
        for every choice of experts."""
        return self._can_compile_fullgraph and super()._valid_auto_compile_criteria(*args)  # type: ignore[misc]

    def _weighted(self, layer_losses: torch.Tensor) -> torch.Tensor:
        if self.aux_loss_coefficients is None:
            return self.config.router_aux_loss_coef * layer_losses.sum()
        return (self.aux_loss_coefficients.to(layer_losses.device) * layer_losses).sum()


def share_of_step(
    labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None, **kwargs: Any
) -> torch.Tensor | float:
    """How much of the target tokens of an optimiser's step, of which there are `num_items_in_batch`, a batch has."""
    if num_items_in_batch is None:
        return 1.0
    here, items = target_count(labels, **kwargs), at_least_one(num_items_in_batch)
    return here / (items.to(here.device) if isinstance(items, torch.Tensor) else items)


__all__ = ["SkyworkMoeForCausalLM", "SkyworkMoeModel", "SkyworkMoePreTrainedModel"]
