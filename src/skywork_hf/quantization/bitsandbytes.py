"""Undoing what bitsandbytes does to 4-bit weights in the first forward pass on a CPU with AVX512-BF16: it packs them
for a kernel that has no backward pass, and reads them as if it had not where they are saved, merged or dequantised."""

from __future__ import annotations

from typing import Any

from torch import nn


def unpack(model: nn.Module) -> None:
    """Give 4-bit weights back the form that they were loaded in; their blocks' scales stay rounded to bfloat16."""
    for module in model.modules():
        weight: Any = getattr(module, "weight", None)
        if not getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False):
            continue
        from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse  # an extra

        scales = weight.quant_state.absmax
        weight.data, state = _convert_weight_packed_for_cpu_inverse(weight.data, weight.quant_state)
        if not state.nested:  # bitsandbytes leaves them one column a block
            state.absmax = scales.t().reshape(-1).float()
        weight.quant_state = state


def keep_trainable(model: nn.Module) -> None:
    """Let gradients pass 4-bit weights, whatever runs before: adapters below packed ones would learn nothing, in
    silence."""
    unpack(model)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
