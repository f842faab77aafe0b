"""What a model runs where it lies on a CPU: its linears by the CPU kernels, and each expert as one piece of work."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2FN

from ..modeling_skywork_moe import SkyworkMoeExpert
from . import matmul
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
