"""Undoing what bitsandbytes does to 4-bit weights in the first forward pass on a CPU with AVX512-BF16: it packs them
for a kernel that has no backward pass, and reads them as if it had not where they are saved, merged or dequantised."""

from __future__ import annotations

from typing import Any

from torch import nn


def unpack(model: nn.Module, *_: Any) -> None:
    """Give 4-bit weights back the form that they were loaded in; their blocks' scales stay rounded to bfloat16. Also a
    hook of `state_dict`."""
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


def unpack_in_time(model: nn.Module) -> None:
    """Have every layer unpack its weight before it is saved, be it alone, and before gradients pass it, whatever is
    trained: what is below packed weights would learn from wrong ones, in silence."""
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.register_state_dict_pre_hook(unpack)
            module.register_forward_pre_hook(_unpack_for_gradients)


def keep_unpacked(model: nn.Module) -> None:
    """Pack no weights from now on: adapters read them or are merged into them at any time, without asking."""
    unpack(model)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def _unpack_for_gradients(layer: nn.Module, inputs: Any) -> None:
    if layer.training or inputs[0].requires_grad:  # where bitsandbytes does not pack
        unpack(layer)
