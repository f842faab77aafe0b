"""Skywork-MoE: transformers' Mixtral with Skywork's gate, experts and auxiliary loss.

Attention, norms, rotary embedding, caches and outputs are Mixtral's. Written here is what differs: the gate
(tech report of Skywork-MoE, eq. 5-6), the two layouts that experts can have, dense layers between MoE layers, and the
load-balancing loss (eq. 4).
"""

# No `from __future__ import annotations`: transformers' common tests read the types in `forward`'s signature.
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any, Unpack

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
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


def routing_probabilities(router_logits: torch.Tensor, config: SkyworkMoeConfig) -> torch.Tensor:
    """The softmax over all experts of the gate's logits, normalised first if the config says so (eq. 5-6).

    Eq. 6 also subtracts the mean, which a softmax does not see. A row whose logits are all equal (the standard
    deviation is 0) is left as it is: all experts equally likely, where the formula says 0 / 0.

    Args:
        router_logits: [tokens, experts], as the gate's projection gives them, any dtype.

    Returns:
        float32 [tokens, experts]; each row sums to 1.
    """
    logits = router_logits.float()
    if config.moe_use_logits_norm:
        # The variance, as the standard deviation has no finite gradient at 0.
        variance = logits.var(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).eps ** 2)
        logits = logits * (config.moe_gate_norm_std * torch.rsqrt(variance))
    return torch.softmax(logits, dim=-1)


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
        self.config = config

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
        weights, indices = routing_probabilities(router_logits, self.config).topk(self.top_k, dim=-1)
        return router_logits, weights / weights.sum(dim=-1, keepdim=True), indices


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
        self.config = config
        self.top_k = config.num_experts_per_tok
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


class SkyworkMoeExperts(nn.ModuleList):
    """The modular layout: one module per expert, each on whatever device it was put, and computed there.

    The fused layout is transformers' own `MixtralExperts`; both have the same `forward`.
    """

    # From how many rows on an expert that lives on the CPU is copied to its layer's GPU and computed there, in
    # inference; None: never. Where the weights are read once for many rows, a bus can beat a CPU.
    stream_from_rows: int | None = None
    # Told which experts will run, as soon as that is known; for those whose weights are on a disk.
    before_run: Callable[[list[nn.Module]], None] | None = None

    def __init__(self, config: SkyworkMoeConfig) -> None:
        super().__init__(SkyworkMoeExpert(config) for _ in range(config.num_local_experts))
        self.overflow = OverflowWatch()

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """The weighted sum of the chosen experts' outputs.

        Pairs of a token and an expert are sorted by expert once, so that each expert is called once, on its own
        consecutive rows; the sizes of these runs are the only thing that the host waits for.

        Args:
            hidden_states: [tokens, hidden_size].
            top_k_index: int64 [tokens, top_k].
            top_k_weights: float32 [tokens, top_k].

        Returns:
            [tokens, hidden_size], dtype and device of `hidden_states`; summed in float32.
        """
        tokens, top_k = top_k_index.shape
        expert_of_pair, pair = top_k_index.flatten().sort(stable=True)
        rows = hidden_states[pair // top_k]
        # On its way before the wait below, and there after it.
        rows_on_cpu = rows.to("cpu", non_blocking=True) if self._needs_cpu_rows(rows) else rows
        starts = torch.arange(len(self) + 1, device=expert_of_pair.device)
        bounds = self.overflow.read_with(torch.searchsorted(expert_of_pair, starts))

        outputs = self._outputs(rows, rows_on_cpu, bounds)
        weighted = torch.cat(outputs or [rows]) * top_k_weights.flatten()[pair].unsqueeze(-1)
        by_token = weighted[pair.argsort()].view(tokens, top_k, rows.shape[-1])
        return by_token.sum(dim=1).to(hidden_states.dtype)

    def _outputs(self, rows: torch.Tensor, rows_on_cpu: torch.Tensor, bounds: list[int]) -> list[torch.Tensor]:
        """Each expert's outputs on its rows, on the device of `rows`. Other devices are given their work before the
        CPU begins its own, so that all compute at the same time."""
        # Asked once, as a decoded token skips most experts.
        may_idle = torch.is_grad_enabled() or (_has_processes() and is_sharded(self))
        runs = [
            (number, slice(*run))
            for number, run in enumerate(pairwise(bounds))
            if run[0] < run[1] or (may_idle and _runs_idle(self[number]))
        ]
        if self.before_run is not None:
            self.before_run([self[number] for number, run in runs if run.start < run.stop])
        outputs: dict[int, torch.Tensor] = {}
        for number, run in sorted(runs, key=lambda run: _device_of(self[run[0]]).type == "cpu"):
            expert = self[number]
            device = _device_of(expert)
            if device.type != "cpu" or rows.device.type == "cpu":
                result = expert(rows[run] if device.type == "meta" else rows[run].to(device, non_blocking=True))
            elif self._streams(run.stop - run.start):
                result = compute_on(rows.device, expert, rows[run])
            else:
                result = expert(rows_on_cpu[run])
            # A CPU must not read what is still on its way.
            outputs[number] = result.to(rows.device, non_blocking=rows.device.type != "cpu")
        return [outputs[number] for number, _ in runs]

    def _needs_cpu_rows(self, rows: torch.Tensor) -> bool:
        return rows.device.type != "cpu" and any(_device_of(expert).type == "cpu" for expert in self)

    def _streams(self, rows: int) -> bool:
        return self.stream_from_rows is not None and rows >= self.stream_from_rows and not torch.is_grad_enabled()


def _device_of(expert: Any) -> torch.device:
    """Where an expert lives; "meta" where accelerate brings its weights when they are needed."""
    # Not as `w1.weight`: ZeRO-3 gathers what is asked for so, on this process alone, and quantised layers wrap it.
    weight = expert.w1._parameters.get("weight")
    return (next(expert.parameters()) if weight is None else weight).device  # None: below an adapter


def _has_processes() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _runs_idle(expert: nn.Module) -> bool:
    """Whether an expert runs though no token chose it: where it is trained, so that it has a gradient, of zeros, on
    every process; and where its weights are sharded, since all processes have to call what puts them together."""
    # Weights that accelerate would have to bring, from a disk or the CPU, are not trained there.
    trains = torch.is_grad_enabled() and _device_of(expert).type != "meta"
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


def compute_on(device: torch.device, expert: nn.Module, rows: torch.Tensor) -> torch.Tensor:
    """The output of an expert on `rows`, with copies of its weights on `device` that are gone afterwards."""
    tensors = {**dict(expert.named_parameters()), **dict(expert.named_buffers())}
    copies = {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}
    return functional_call(expert, copies, (rows,))


class SkyworkMoeBlock(nn.Module):
    """The sparse feed-forward part of a layer: the gate and its experts."""

    def __init__(self, config: SkyworkMoeConfig) -> None:
        super().__init__()
        self.gate = SkyworkMoeTwoLayerGate(config) if config.moe_2layer_gate else SkyworkMoeGate(config)
        self.experts = SkyworkMoeExperts(config) if config.experts_layout == "modular" else MixtralExperts(config)
        self.overflow = getattr(self.experts, "overflow", None) or OverflowWatch()
        self.input_scale = config.num_experts_per_tok if config.multiplies_input_by_top_k else None

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[batch, tokens, hidden_size] to the same shape."""
        rows = hidden_states.reshape(-1, hidden_states.shape[-1])
        _, top_k_weights, top_k_index = self.gate(rows)
        scaled = rows if self.input_scale is None else rows * self.input_scale
        outputs = self.experts(scaled, top_k_index, top_k_weights)
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
