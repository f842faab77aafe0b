"""What a model runs where it lies. On a CPU linears run by the CPU kernels, and each expert as one piece of work; on a
GPU linears, gates and a layer's experts run by the Triton kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2FN

from ..modeling_skywork_moe import SkyworkMoeExpert, SkyworkMoeExperts, SkyworkMoeGate, SkyworkMoeTwoLayerGate
from . import gpu_kernels, matmul
from .cards import MAX_EXPERTS
from .expert_table import ExpertTables, is_cast
from .linear import (
    SkyworkFp8Linear,
    SkyworkInt8Linear,
    SkyworkLinear,
    SkyworkQuantizedLinear,
    is_on_cpu,
    runs_elsewhere,
)

_SILU = type(ACT2FN["silu"])


class SkyworkCpuExpert(SkyworkMoeExpert):
    """An expert whose three linears are computed together where they lie on a CPU, in inference: w1 and w3 share what
    is made of their inputs. Otherwise, as with adapters or hooks on a linear, it is `SkyworkMoeExpert`."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        outputs = None
        if is_on_cpu(hidden_states) and hidden_states.dim() == 2 and not runs_elsewhere():
            outputs = self._together(hidden_states)
        return super().forward(hidden_states) if outputs is None else outputs

    def _together(self, rows: torch.Tensor) -> torch.Tensor | None:
        linears: list[Any] = [self._modules[name] for name in ("w1", "w3", "w2")]
        kind = type(linears[0])
        if not all(type(linear) is kind and _is_bare(linear) for linear in linears):
            return None
        weights = [linear._parameters["weight"] for linear in linears]
        if not all(is_on_cpu(weight) for weight in weights):
            return None
        if kind is SkyworkLinear:
            if not all(weight.dtype == rows.dtype == torch.bfloat16 for weight in weights):
                return None
            return matmul.cpu_expert(rows, weights, [None, None, None], False)
        scales = [linear._parameters["weight_scale"] for linear in linears]
        may_quantize = kind is SkyworkInt8Linear and all(linear.quantize_activations for linear in linears)
        return matmul.cpu_expert(rows, weights, scales, may_quantize)


def _is_bare(linear: Any) -> bool:
    """Whether a call of one of our linears is its own forward pass and nothing more."""
    return type(linear) in (SkyworkInt8Linear, SkyworkFp8Linear, SkyworkLinear) and not (
        linear._forward_hooks
        or linear._forward_pre_hooks
        or "forward" in linear.__dict__  # accelerate's
        or linear._parameters["bias"] is not None
    )


class SkyworkTritonExperts(SkyworkMoeExperts):
    """Experts that a few tokens, in inference, meet in two launches where all of them are on one GPU. Otherwise, as
    with adapters or hooks, it is `SkyworkMoeExperts`."""

    tables: ExpertTables

    def read_tables(self) -> None:
        self.tables = ExpertTables(self)

    def _apply(self, *args: Any, **kwargs: Any) -> SkyworkTritonExperts:
        super()._apply(*args, **kwargs)  # somebody moves them
        self.read_tables()
        return self

    def are_here(self, hidden_states: torch.Tensor) -> bool:
        """Whether the kernels compute this where it is, and no expert is elsewhere."""
        tables = self.tables
        return tables.takes(hidden_states) and tables.is_on_one_gpu and hidden_states.device in tables.addresses

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        if self.are_here(hidden_states):
            return self.tables(hidden_states, top_k_index, top_k_weights)
        return super().forward(hidden_states, top_k_index, top_k_weights)


class SkyworkTritonGate(SkyworkMoeGate):
    """A gate that is one launch for a few tokens on a GPU, in inference, and for more one after its projection."""

    # Whether the kernels run where its weights are; not asked in each forward.
    has_triton = False

    def find_kernels(self) -> None:
        *_, last = self.parameters()
        self.has_triton = gpu_kernels.has_triton(last.device) and len(last) <= MAX_EXPERTS

    def _apply(self, *args: Any, **kwargs: Any) -> SkyworkTritonGate:
        super()._apply(*args, **kwargs)
        self.find_kernels()
        return self

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if not self.has_triton or torch.is_grad_enabled() or hidden_states.is_cpu:
            return super().forward(hidden_states)
        how = (self.top_k, self.normalisation)
        weight: Any = self._parameters.get("weight")  # None of the two-layer gate
        is_few = weight is not None and matmul.takes_triton(True, weight.dtype, len(hidden_states))
        if is_few and weight.dtype == hidden_states.dtype and not is_cast(hidden_states):
            return gpu_kernels.kernels.gate(hidden_states, weight.contiguous(), *how)
        router_logits = self.project(hidden_states)
        return router_logits, *gpu_kernels.kernels.route(router_logits, *how)


class SkyworkTritonTwoLayerGate(SkyworkTritonGate, SkyworkMoeTwoLayerGate):
    """The same of the gate of two layers."""


def use_gpu_kernels(model: Any) -> None:
    """After loading, and after `use_cpu_kernels`: have what is on a GPU run there by the Triton kernels, and what is
    moved to one later.

    Gates and containers of experts become subclasses of what they are; parameters, names and hooks stay. Where a GPU
    does not run the kernels, one log line says why.
    """
    gates: dict[type, type] = {
        SkyworkMoeGate: SkyworkTritonGate,
        SkyworkMoeTwoLayerGate: SkyworkTritonTwoLayerGate,
    }
    layers = []
    for module in model.modules():
        if type(module) is SkyworkMoeExperts:
            module.__class__ = SkyworkTritonExperts
        if isinstance(module, SkyworkTritonExperts):
            module.read_tables()
            layers.append(module.tables)
        elif type(module) in gates:
            module.__class__ = gates[type(module)]
        if isinstance(module, SkyworkQuantizedLinear | SkyworkTritonGate):
            module.find_kernels()
    if layers:  # where the host asks nothing, a forward compiles whole
        model._can_compile_fullgraph = all(tables.is_on_one_gpu for tables in layers)


def use_cpu_kernels(model: nn.Module) -> None:
    """After loading: have what lies on the CPU run there by the CPU kernels, and these compiled.

    16-bit linears and experts become subclasses of what they are; parameters, names and hooks stay. Where numba is
    missing, one log line says what that costs.
    """
    dtypes = set()
    for module in model.modules():
        _drop_own_forward(module)
        if type(module) is nn.Linear and _is_16_bit(module):
            module.__class__ = SkyworkLinear
        if isinstance(module, SkyworkLinear | SkyworkQuantizedLinear):
            weight: Any = module._parameters["weight"]
            dtypes |= {weight.dtype} if weight.is_cpu else set()
        elif type(module) is SkyworkMoeExpert and type(module.act_fn) is _SILU:
            module.__class__ = SkyworkCpuExpert
    if dtypes:
        matmul.ready_cpu_kernels(dtypes)


def _is_16_bit(linear: nn.Linear) -> bool:
    """Whether it lies on the CPU, in bfloat16, and whole, which it does not in tensor parallelism."""
    return type(linear.weight) is nn.Parameter and linear.weight.is_cpu and linear.weight.dtype == torch.bfloat16


def _drop_own_forward(module: nn.Module) -> None:
    """accelerate leaves a module from which it takes a hook the forward pass of its class as its own."""
    if getattr(module.__dict__.get("forward"), "__func__", None) is type(module).forward:
        del module.__dict__["forward"]
