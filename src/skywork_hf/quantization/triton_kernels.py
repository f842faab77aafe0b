"""Triton kernels for a few rows on a GPU: each weight is read once, as it is stored, and few things are launched.

* `experts`: a layer's experts of one device, for up to 16 tokens, in two launches; `linear`: one matrix, in one.
* `gate`: the router with its projection, `route`: from its logits, in one launch each.
* `quantize_int8`, `rescale`, `quantize_fp8`: what torch's matmuls of many rows need around them.

Weights are int8 with a scale for each row, FP8 (e4m3) with one scale, or in the 16 bit of the inputs. Their codes are
multiplied as they are, summed in float32, and the scale comes last, so that nothing is rounded between.

One token is multiplied row by row of the weight, without tensor cores: reading is all that takes time. Several are a
small matrix beside a tile of the weight. Which experts were chosen is read on the device, from a table of addresses
(see `expert_table.py`); an expert whose address is 0 lives elsewhere, and costs a program that ends at once.

The functions are torch operators, so that torch.compile sees through them; called with ordinary tensors, they launch
past torch's dispatcher, which would take longer than some of the kernels. `TRITON_INTERPRET=1` runs them on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from typing import Any

import torch
import triton
from torch.library import triton_op, wrap_triton

from .cards import FP8_CAPABILITY, MAX_TOKENS, capability
from .formats import FP8
from .triton_blocks import Blocks, blocks_of, tune  # noqa: F401  # for who takes this module where it runs
from .triton_programs import (
    down_kernel,
    gate_up_kernel,
    largest_kernel,
    linear_kernel,
    quantize_fp8_kernel,
    quantize_int8_kernel,
    rescale_kernel,
    route_kernel,
)

# Up to so many tokens each has its own programs, also where two chose the same expert: the second finds its weights in
# the card's cache.
ALONE_TOKENS = 4

_IS_INTERPRETED = triton.knobs.runtime.interpret


def _operator(body: Callable[..., Any]) -> Callable[..., Any]:
    """A torch operator of the body's name; what is returned goes past it where nobody would see it."""
    triton_op(f"skywork_hf::{body.__name__}", body, mutates_args=())
    operator = getattr(torch.ops.skywork_hf, body.__name__).default

    @wraps(body)
    def call(inputs: torch.Tensor, *args: Any) -> Any:
        if not _is_plain(inputs):
            return operator(inputs, *args)
        with torch.cuda.device_of(inputs):  # Triton launches on the current one
            return body(inputs, *args)

    return call


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether nobody traces, counts or simulates: an ordinary tensor in an eager forward."""
    return (
        type(tensor) is torch.Tensor and not torch.compiler.is_compiling() and not torch._C._len_torch_dispatch_stack()
    )


def _launch(kernel: Any, inputs: torch.Tensor, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    if _IS_INTERPRETED and type(inputs) is not torch.Tensor:
        return  # of a fake tensor only the shape is wanted; real kernels see to that themselves
    if _is_plain(inputs):
        options["enable_fp_fusion"] = True  # which torch.compile passes by itself, and no longer is Triton's default
    kernel[grid](*args, **options)


@_operator
def experts(
    inputs: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    table: torch.Tensor,
    intermediate_size: int,
    weight_dtype: torch.dtype,
    scale_dtype: torch.dtype,
    is_aligned: bool,
    is_partial: bool,
) -> torch.Tensor:
    """The weighted sum of the chosen experts' outputs, of those that are on this device: two launches.

    Args:
        inputs: [tokens, hidden_size], float16 or bfloat16, at most `MAX_TOKENS`.
        top_k_index: int32 or int64 [tokens, top_k].
        top_k_weights: float32 [tokens, top_k].
        table: int64 [experts, 6], addresses on the device of `inputs`: of the weight and the scale of w1, w3 and w2;
            zeros for an expert that is elsewhere.
        intermediate_size: the rows of w1.
        weight_dtype: int8, float8_e4m3fn, or that of `inputs`.
        scale_dtype: int8's scales are one for each row, FP8's is one; without scales any.
        is_aligned: whether all weights begin at multiples of 16 bytes.
        is_partial: whether the sums of other devices are added to these.

    Returns:
        [tokens, hidden_size]: float32 if partial, else in the dtype of `inputs`; summed in float32.
    """
    gate_up = gate_up_kernel if _is_plain(inputs) else wrap_triton(gate_up_kernel)
    down = down_kernel if _is_plain(inputs) else wrap_triton(down_kernel)
    inputs, top_k_index, top_k_weights = inputs.contiguous(), top_k_index.contiguous(), top_k_weights.contiguous()
    tokens, hidden_size = inputs.shape
    top_k, device = top_k_index.shape[1], inputs.device
    dtype = torch.float32 if is_partial else inputs.dtype
    hidden = inputs.new_empty(tokens * top_k, intermediate_size, dtype=_stored(inputs.dtype))
    outputs = inputs.new_empty(tokens, hidden_size, dtype=_stored(dtype))
    if not tokens:
        return outputs.to(dtype)
    tile = _tile(inputs, ALONE_TOKENS)
    is_alone = tile == 1
    of_table = {
        "KIND": _kind(weight_dtype),
        "SCALE_KIND": _kind(scale_dtype),
        "IS_ALIGNED": is_aligned,
        "TOP_K": _power_of_2(top_k),
    }
    of_gate_up, of_down = blocks_of("gate_up", is_alone, device), blocks_of("down", is_alone, device)
    programs = tokens * top_k if is_alone else table.shape[0]
    _launch(
        gate_up,
        inputs,
        (programs, _pieces(intermediate_size, of_gate_up.rows)),
        *(inputs, top_k_index, table, hidden, tokens, top_k, intermediate_size),
        WIDTH=hidden_size,
        **of_table,
        **_options(inputs, weight_dtype, tile, of_gate_up),
    )
    _launch(
        down,
        inputs,
        (tokens if is_alone else 1, _pieces(hidden_size, of_down.rows)),
        *(hidden.to(inputs.dtype), top_k_index, top_k_weights, table, outputs, tokens, top_k, hidden_size),
        STEPS=top_k if is_alone else table.shape[0],
        WIDTH=intermediate_size,
        **of_table,
        **_options(inputs, weight_dtype, tile, of_down),
    )
    return outputs.to(dtype)


@_operator
def linear(inputs: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """`inputs @ real(weight).T` in one launch.

    Args:
        inputs: [tokens, in_features], float16 or bfloat16, at most `MAX_TOKENS`.
        weight: int8, float8_e4m3fn, or in the dtype of `inputs`, [out_features, in_features], contiguous.
        scale: a float dtype: [out_features] of int8, one element of FP8.

    Returns:
        [tokens, out_features] in the dtype of `inputs`; summed in float32.
    """
    kernel = linear_kernel if _is_plain(inputs) else wrap_triton(linear_kernel)
    inputs = inputs.contiguous()
    (tokens, width), features = inputs.shape, weight.shape[0]
    outputs = inputs.new_empty(tokens, features, dtype=_stored(inputs.dtype))
    if not tokens:
        return outputs.to(inputs.dtype)
    tile = _tile(inputs, 1)
    blocks = blocks_of("down", tile == 1, inputs.device)
    _launch(
        kernel,
        inputs,
        (_pieces(features, blocks.rows), tokens if tile == 1 else 1),
        inputs,
        weight.view(torch.int8) if weight.dtype == FP8 else weight,
        weight if scale is None else scale,
        *(outputs, tokens, features),
        WIDTH=width,
        **_options(inputs, weight.dtype, tile, blocks),
    )
    return outputs.to(inputs.dtype)


@_operator
def gate(
    inputs: torch.Tensor, weight: torch.Tensor, top_k: int, factor: float | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The router and `route`, in one launch.

    Args:
        inputs: [tokens, hidden_size], few of them.
        weight: [experts, hidden_size] in the same dtype, at most `MAX_EXPERTS` experts.
        top_k, factor: as of `route`.

    Returns:
        The logits [tokens, experts] in the dtype of `inputs`, and what `route` returns.
    """
    logits = inputs.new_empty(inputs.shape[0], weight.shape[0], dtype=_stored(inputs.dtype))
    kernel = route_kernel if _is_plain(inputs) else wrap_triton(route_kernel)
    weights, index = _routed(kernel, logits, top_k, factor, inputs.contiguous(), weight)
    return logits.to(inputs.dtype), weights, index


@_operator
def route(logits: torch.Tensor, top_k: int, factor: float | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The chosen experts and their weights, as `SkyworkMoeGate` defines them, in one launch.

    Args:
        logits: [tokens, experts], at most `MAX_EXPERTS` experts.
        top_k: how many are chosen.
        factor: the `normalisation` of modeling_skywork_moe; None leaves the logits as they are.

    Returns:
        Weights float32 [tokens, top_k], each row of which sums to 1, from the largest on, and indices int64
        [tokens, top_k]; of equal logits the first ones.
    """
    kernel = route_kernel if _is_plain(logits) else wrap_triton(route_kernel)
    return _routed(kernel, logits.contiguous(), top_k, factor, None, None)


def _routed(
    kernel: Any,
    logits: torch.Tensor,
    top_k: int,
    factor: float | None,
    inputs: torch.Tensor | None,
    weight: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    tokens, experts = logits.shape
    weights = logits.new_empty(tokens, top_k, dtype=torch.float32)
    index = logits.new_empty(tokens, top_k, dtype=torch.int64)
    if tokens:
        _launch(
            kernel,
            logits,
            (tokens,),
            logits if inputs is None else inputs,
            logits if weight is None else weight,
            *(logits, weights, index, experts, top_k),
            factor or 0.0,
            WIDTH=0 if inputs is None else inputs.shape[1],
            PROJECTS=inputs is not None,
            NORMALISES=factor is not None,
            EXPERTS=_power_of_2(experts),
            TOP_K=_power_of_2(top_k),
            COLUMNS=max(16, 4096 // _power_of_2(experts)),
            num_warps=1 if inputs is None else 8,
        )
    return weights, index


@_operator
def quantize_int8(inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric int8 with a scale for each token, in one launch.

    Args:
        inputs: [tokens, features], a float dtype.

    Returns:
        int8 [tokens, features] and float32 [tokens, 1]; the scale of a token with a NaN is NaN.
    """
    kernel = quantize_int8_kernel if _is_plain(inputs) else wrap_triton(quantize_int8_kernel)
    inputs = inputs.contiguous()
    tokens, width = inputs.shape
    codes = torch.empty(inputs.shape, dtype=torch.int8, device=inputs.device)
    scales = torch.empty(tokens, 1, dtype=torch.float32, device=inputs.device)
    if tokens:
        columns = min(4096, _power_of_2(width))
        _launch(kernel, inputs, (tokens,), inputs, codes, scales, WIDTH=width, COLUMNS=columns, num_warps=8)
    return codes, scales


@_operator
def rescale(sums: torch.Tensor, token_scale: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What an integer matmul's sums stand for, in one launch.

    Args:
        sums: int32 [tokens, out_features].
        token_scale: float32 [tokens, 1].
        scale: [out_features], a float dtype.

    Returns:
        [tokens, out_features] in `dtype`.
    """
    kernel = rescale_kernel if _is_plain(sums) else wrap_triton(rescale_kernel)
    outputs = sums.new_empty(sums.shape, dtype=_stored(dtype))
    tokens, features = sums.shape
    if tokens:
        grid = (tokens, _pieces(features, 1024))
        _launch(kernel, sums, grid, sums.contiguous(), token_scale, scale, outputs, features, COLUMNS=1024)
    return outputs.to(dtype)


@_operator
def quantize_fp8(inputs: torch.Tensor, input_scale: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """FP8 (e4m3) with one scale: in one launch where that is given, in two where it is to be found.

    Args:
        inputs: [tokens, features], a float dtype.
        input_scale: one element, a float dtype; None: what puts the largest at e4m3's largest.

    Returns:
        float8_e4m3fn [tokens, features] and the scale, float32 of no dimensions; values beyond the range are at its
        ends.
    """
    find = largest_kernel if _is_plain(inputs) else wrap_triton(largest_kernel)
    quantize = quantize_fp8_kernel if _is_plain(inputs) else wrap_triton(quantize_fp8_kernel)
    inputs = inputs.contiguous()
    codes = torch.empty(inputs.shape, dtype=FP8, device=inputs.device)
    scale = torch.empty((), dtype=torch.float32, device=inputs.device)
    count = inputs.numel()
    if not count:
        return codes, scale.fill_(1)
    parts, columns = min(1024, _pieces(count, 4096)), min(4096, _power_of_2(count))
    source = inputs.new_empty(parts, dtype=torch.float32) if input_scale is None else input_scale
    if input_scale is None:
        _launch(find, inputs, (parts,), inputs, source, count, COLUMNS=columns, num_warps=8)
    _launch(
        quantize,
        inputs,
        (_pieces(count, columns),),
        *(inputs, source, codes.view(torch.int8), scale, count, parts),
        IS_STATIC=input_scale is not None,
        PARTS=_power_of_2(parts),
        COLUMNS=columns,
        num_warps=8,
    )
    return codes, scale


def _pieces(count: int, size: int) -> int:
    return -(-count // size)  # some 2 us faster than Triton's own


def _power_of_2(least: int) -> int:
    return 1 << (least - 1).bit_length()


def _stored(dtype: torch.dtype) -> torch.dtype:
    """What kernels store for it: Triton's interpreter cuts off where GPUs round."""
    return torch.float32 if _IS_INTERPRETED and dtype == torch.bfloat16 else dtype


@cache
def _kind(dtype: torch.dtype) -> str:
    return "int8" if dtype == FP8 else str(dtype).removeprefix("torch.")


def _tile(inputs: torch.Tensor, alone: int) -> int:
    """How many tokens are multiplied at a time: one while there are no more than `alone`, and of bfloat16 before
    compute capability 8, whose tensor cores do not take it."""
    tokens = len(inputs)
    if tokens <= alone or (inputs.dtype == torch.bfloat16 and (0, 0) < capability(inputs.device) < (8, 0)):
        return 1
    return 8 if tokens <= 8 else MAX_TOKENS


def _options(inputs: torch.Tensor, weight_dtype: torch.dtype, tile: int, blocks: Blocks) -> dict[str, Any]:
    """What a kernel is compiled for."""
    has_fp8 = capability(inputs.device) >= FP8_CAPABILITY
    return _options_for(inputs.dtype, weight_dtype, has_fp8, tile, blocks)


@cache
def _options_for(
    dtype: torch.dtype, weight_dtype: torch.dtype, has_fp8: bool, tile: int, blocks: Blocks
) -> dict[str, Any]:
    # Several tokens are multiplied in their own dtype, which holds all codes exactly; Triton's interpreter has no
    # bfloat16 for that.
    is_float32 = tile == 1 or (_IS_INTERPRETED and dtype == torch.bfloat16)
    fp8 = "e4m3" if has_fp8 else "e4m3 bits"
    return {
        "FORMAT": fp8 if weight_dtype == FP8 else "int8" if weight_dtype == torch.int8 else "plain",
        "COMPUTE": "float32" if is_float32 else _kind(dtype),
        "TOKENS": tile,
        "ROWS": blocks.rows,
        "COLUMNS": blocks.nbytes // weight_dtype.itemsize,
        "STAGES": blocks.stages,
        "num_warps": blocks.warps,
    }
