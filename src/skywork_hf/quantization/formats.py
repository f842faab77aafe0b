"""int8 and FP8 (e4m3): real values to codes and scales, and back. Stateless, and block by block, so that no whole
matrix is ever there in 32 bit."""

from __future__ import annotations

from collections.abc import Iterator

import torch

FP8 = torch.float8_e4m3fn
FP8_MAX = torch.finfo(FP8).max
INT8_MAX = 127
# Elements of a weight unpacked at a time: 4 MiB of float32 stay in a CPU's cache; a GPU wants few launches.
CPU_BLOCK, GPU_BLOCK = 2**20, 2**26
# e4m3 bits moved into float16's places are 2^8 too small, the difference of the two exponent biases.
_E4M3_IN_FLOAT16 = 2.0**8


def quantize_int8(
    weight: torch.Tensor, scale: torch.Tensor | None = None, largest: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric int8, one scale for each row.

    Args:
        weight: [out_features, in_features], any float dtype, finite; or float8_e4m3fn.
        scale: that of an FP8 `weight`, one element.
        largest: float32 [out_features], the largest magnitude of each row; None: `weight` has the whole rows.

    Returns:
        int8 [out_features, in_features] and bfloat16 scales [out_features]; real = int8 * scale. Scales are rounded
        to bfloat16 before they are used, as torch's kernel takes them so.
    """
    quantized = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scales = torch.empty(weight.shape[0], dtype=torch.bfloat16, device=weight.device)
    for rows in row_blocks(weight):
        block = weight[rows].float() if scale is None else real_rows(weight, scale, rows)
        row_largest = block.abs().amax(dim=1) if largest is None else largest[rows]
        row_scale = (row_largest / INT8_MAX).clamp_min(torch.finfo(torch.bfloat16).tiny).bfloat16()
        scales[rows] = row_scale
        quantized[rows] = to_int8(block, row_scale.float().unsqueeze(1))
    return quantized, scales


def quantize_fp8(weight: torch.Tensor, scale: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """FP8 (e4m3) with one scale.

    Args:
        weight: [out_features, in_features], any float dtype, finite.
        scale: what to quantise with; None: the `fp8_scale` of `weight`.

    Returns:
        float8_e4m3fn [out_features, in_features] and a float32 scale of no dimensions; real = fp8 * scale.
    """
    scale = fp8_scale(weight) if scale is None else scale
    quantized = torch.empty(weight.shape, dtype=FP8, device=weight.device)
    for rows in row_blocks(weight):
        quantized[rows] = to_fp8(weight[rows], scale)
    return quantized, scale


def fp8_scale(values: torch.Tensor) -> torch.Tensor:
    """The float32 scale, of no dimensions, that puts the largest of `values` at e4m3's largest."""
    low, high = values.aminmax()
    return (torch.maximum(-low, high).float() / FP8_MAX).clamp_min(torch.finfo(torch.float32).tiny)


def to_fp8(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """`values / scale` in e4m3, those beyond its range at its ends."""
    return (values.float() / scale).clamp_(-FP8_MAX, FP8_MAX).to(FP8)


def unpack(weight: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, float]:
    """Quantised values in `dtype`, and the factor that is still to be multiplied in beside the scale.

    torch converts e4m3 on a CPU one by one; moving the bits into float16's places is many times faster and exact,
    subnormals included. (A NaN, which no quantiser writes, becomes 480.)
    """
    if weight.dtype == FP8 and weight.device.type == "cpu":
        bits = weight.view(torch.int8).to(torch.int16)
        bits <<= 7
        bits &= ~(1 << 14)
        return bits.view(torch.float16).to(dtype), _E4M3_IN_FLOAT16
    return weight.to(dtype), 1.0


def dequantize(weight: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The whole matrix in `dtype`.

    Args:
        weight: int8 or float8_e4m3fn [out_features, in_features].
        scale: one scale, or [out_features].
    """
    restored = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    for rows in row_blocks(weight):
        restored[rows] = real_rows(weight, scale, rows).to(dtype)
    return restored


def to_int8(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (values / scale).round_().clamp_(-INT8_MAX, INT8_MAX).to(torch.int8)


def real_rows(weight: torch.Tensor, scale: torch.Tensor, rows: slice) -> torch.Tensor:
    values, factor = unpack(weight[rows], torch.float32)
    return values.mul_(column(scale, rows) * factor)


def column(scale: torch.Tensor, rows: slice) -> torch.Tensor:
    """Scales of these rows as float32 [rows, 1], or [1, 1] where the matrix has one."""
    return scale.float().reshape(-1, 1) if scale.numel() == 1 else scale[rows].float().unsqueeze(1)


def row_blocks(weight: torch.Tensor) -> Iterator[slice]:
    step = max(1, block_elements(weight.device.type) // weight.shape[1])
    return (slice(start, min(start + step, weight.shape[0])) for start in range(0, weight.shape[0], step))


def block_elements(device_type: str) -> int:
    return CPU_BLOCK if device_type == "cpu" else GPU_BLOCK
