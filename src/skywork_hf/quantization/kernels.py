"""Quantising, and the matmuls on quantised weights: which of torch's kernels runs where.

No kernel keeps a 16-bit copy of a weight: where one has to be made, it is made in blocks that are gone when the matmul
is. `benchmarks/int8_kernels.py` measures the choices; `docs/quantization.md` holds the figures.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch

FP8 = torch.float8_e4m3fn
FP8_MAX = torch.finfo(FP8).max
INT8_MAX = 127

# Up to this many rows torch's weight-only kernel beats unpacking blocks on CPUs, and with more rows it does not
# (measured on AVX2, where the crossing lies between 24 and 64). With AVX512-VNNI torch's integer matmul takes over.
CPU_WEIGHT_ONLY_ROWS = 32
# That kernel crashes the process where the rows of a weight are no whole number of vectors long (seen on AVX2 with 5
# and 33; AVX512 has the longest vectors, 32 of bfloat16).
CPU_WEIGHT_ONLY_MULTIPLE = 32
# It also crashes on inputs, and from so many rows on weights, that begin elsewhere in memory than at multiples of so
# many bytes (seen on AVX512). Weights mapped from a safetensors file begin at multiples of 8.
CPU_WEIGHT_ONLY_INPUT_ALIGNMENT, CPU_WEIGHT_ONLY_ALIGNED_ROWS, CPU_WEIGHT_ONLY_ALIGNMENT = 32, 4, 16
# torch's integer matmul on CUDA takes no fewer rows, and only multiples of 8 in the two other directions.
CUDA_INT_MM_ROWS = 17
CUDA_INT_MM_MULTIPLE = 8
SCALED_MM_MULTIPLE = 16
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
    for rows in _row_blocks(weight):
        block = weight[rows].float() if scale is None else _real(weight, scale, rows)
        row_largest = block.abs().amax(dim=1) if largest is None else largest[rows]
        row_scale = (row_largest / INT8_MAX).clamp_min(torch.finfo(torch.bfloat16).tiny).bfloat16()
        scales[rows] = row_scale
        quantized[rows] = _to_int8(block, row_scale.float().unsqueeze(1))
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
    for rows in _row_blocks(weight):
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
    for rows in _row_blocks(weight):
        restored[rows] = _real(weight, scale, rows).to(dtype)
    return restored


def weight_only_linear(inputs: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """`inputs @ real(weight).T`, the weight unpacked block by block.

    Args:
        inputs: [rows, in_features].
        weight: int8 or float8_e4m3fn [out_features, in_features].
        scale: one scale, or [out_features].

    Returns:
        [rows, out_features] in the dtype of `inputs`.
    """
    outputs = torch.empty(inputs.shape[0], weight.shape[0], dtype=inputs.dtype, device=inputs.device)
    if not len(inputs):
        return outputs
    compute = _compute_dtype(inputs)
    inputs_there = inputs.to(compute)
    for rows in _row_blocks(weight):
        values, factor = _block(weight, scale, rows, compute)
        outputs[:, rows] = (inputs_there @ values.t()).float().mul_(factor.t())
    return outputs


def weight_only_backward(grad: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """`grad @ real(weight)`: the gradient of a linear's inputs.

    Args:
        grad: [rows, out_features].

    Returns:
        [rows, in_features] in the dtype of `grad`; summed in float32.
    """
    total = torch.zeros(grad.shape[0], weight.shape[1], device=grad.device)
    if not len(grad):
        return total.to(grad.dtype)
    compute = _compute_dtype(grad)
    for rows in _row_blocks(weight):
        values, factor = _block(weight, scale, rows, compute)
        total += (grad[:, rows].float() * factor.t()).to(compute) @ values
    return total.to(grad.dtype)


def int8_linear(
    inputs: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, quantize_activations: bool
) -> torch.Tensor:
    """A linear on int8 weights.

    Args:
        inputs: [rows, in_features], a float dtype.
        weight: int8 [out_features, in_features].
        scale: [out_features], a float dtype; bfloat16 unless somebody cast it.
        quantize_activations: whether many rows may run with int8 activations.

    Returns:
        [rows, out_features] in the dtype of `inputs`.
    """
    kernel = int8_kernel(inputs.device.type, inputs.dtype, len(inputs), weight.shape, quantize_activations)
    if kernel == "weight_int8pack_mm":
        if len(inputs) >= CPU_WEIGHT_ONLY_ALIGNED_ROWS:
            weight = _aligned(weight, CPU_WEIGHT_ONLY_ALIGNMENT)
        inputs = _aligned(inputs, CPU_WEIGHT_ONLY_INPUT_ALIGNMENT)
        return torch._weight_int8pack_mm(inputs, weight, scale.to(inputs.dtype))  # as it takes no other
    if kernel == "int_mm":
        return int8_activations_linear(inputs, weight, scale)
    return weight_only_linear(inputs, weight, scale)


def _aligned(tensor: torch.Tensor, multiple: int) -> torch.Tensor:
    """A tensor that begins at a multiple of so many bytes: itself, or a copy that is gone after the matmul."""
    if torch.compiler.is_compiling() or tensor.data_ptr() % multiple == 0:  # while compiling nobody knows
        return tensor
    return tensor.clone()


def int8_kernel(
    device_type: str, dtype: torch.dtype, rows: int, shape: tuple[int, ...], quantize_activations: bool
) -> str:
    """The name of what `int8_linear` runs for `rows` inputs of `dtype` and a weight of `shape`: "weight_int8pack_mm",
    "int_mm" or "blocks"."""
    if quantize_activations and has_fast_int_mm(device_type, rows, shape):
        return "int_mm"
    return "weight_int8pack_mm" if has_fast_weight_only(device_type, dtype, rows, shape) else "blocks"


def has_fast_weight_only(device_type: str, dtype: torch.dtype, rows: int, shape: tuple[int, ...]) -> bool:
    """Whether torch's weight-only kernel takes this and is the fastest for it: few rows of bfloat16 on a CPU. (For
    other dtypes it is slower than blocks on CPUs without AVX512.)"""
    fits = device_type == "cpu" and dtype == torch.bfloat16
    return fits and 0 < rows <= CPU_WEIGHT_ONLY_ROWS and shape[1] % CPU_WEIGHT_ONLY_MULTIPLE == 0


def has_fast_int_mm(device_type: str, rows: int, shape: tuple[int, ...]) -> bool:
    """Whether torch's integer matmul takes this and is the fastest for it."""
    if device_type == "cuda":
        return rows >= CUDA_INT_MM_ROWS and all(size % CUDA_INT_MM_MULTIPLE == 0 for size in shape)
    # With a single column torch's product is wrong (seen on AVX512).
    fits = device_type == "cpu" and rows > CPU_WEIGHT_ONLY_ROWS and shape[1] > 1
    return fits and torch.cpu._is_vnni_supported()


def int8_activations_linear(inputs: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """A linear whose inputs are int8 too, one scale for each token, by torch's integer matmul; shapes as in
    `int8_linear`."""
    rows = inputs.float()
    token_scale = (rows.abs().amax(dim=1, keepdim=True) / INT8_MAX).clamp_min(torch.finfo(torch.float32).tiny)
    outputs = torch._int_mm(_to_int8(rows, token_scale), weight.t()).float()
    return outputs.mul_(token_scale).mul_(scale.float()).to(inputs.dtype)


def fp8_linear(
    inputs: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, scheme: str, input_scale: torch.Tensor | None
) -> torch.Tensor:
    """A linear on FP8 weights: by the device's FP8 unit, or weight-only where there is none or `scheme` is "none".

    Args:
        inputs: [rows, in_features], a float dtype.
        weight: float8_e4m3fn [out_features, in_features].
        scale: one element, a float dtype.
        scheme: "static", "dynamic" or "none".
        input_scale: the same: the activations' scale, for "static".

    Returns:
        [rows, out_features] in the dtype of `inputs`.
    """
    if not len(inputs) or fp8_kernel(has_fp8_unit(inputs.device), weight.shape, scheme) == "blocks":
        return weight_only_linear(inputs, weight, scale)
    if input_scale is None:
        input_scale = fp8_scale(inputs)
    return torch._scaled_mm(
        to_fp8(inputs, input_scale),
        weight.t(),
        scale_a=input_scale.float().reshape(()),
        scale_b=scale.float().reshape(()),
        out_dtype=inputs.dtype,
    )


def fp8_kernel(has_unit: bool, shape: tuple[int, ...], scheme: str) -> str:
    """The name of what `fp8_linear` runs for a weight of `shape`: "scaled_mm" or "blocks"."""
    fits = all(size % SCALED_MM_MULTIPLE == 0 for size in shape)
    return "scaled_mm" if has_unit and fits and scheme != "none" else "blocks"


@cache
def has_fp8_unit(device: torch.device) -> bool:
    """Whether `device` multiplies FP8: an NVIDIA GPU of compute capability 8.9 or later."""
    return (
        device.type == "cuda"
        and torch.version.hip is None
        and torch.cuda.is_available()
        and torch.cuda.get_device_capability(device) >= (8, 9)
    )


def _compute_dtype(inputs: torch.Tensor) -> torch.dtype:
    """What a block is multiplied in: 16 bit only where that is faster."""
    if inputs.device.type != "cpu" or (inputs.dtype == torch.bfloat16 and torch.cpu._is_avx512_bf16_supported()):
        return inputs.dtype
    return torch.float32


def _to_int8(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (values / scale).round_().clamp_(-INT8_MAX, INT8_MAX).to(torch.int8)


def _block(
    weight: torch.Tensor, scale: torch.Tensor, rows: slice, compute: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """These rows in `compute`, and the float32 factors [rows, 1] or [1, 1] that make them real."""
    if compute == torch.float16:  # whose sums would overflow without the scale
        return _real(weight, scale, rows).to(compute), torch.ones(1, 1, device=weight.device)
    values, factor = unpack(weight[rows], compute)
    return values, _column(scale, rows) * factor


def _real(weight: torch.Tensor, scale: torch.Tensor, rows: slice) -> torch.Tensor:
    values, factor = unpack(weight[rows], torch.float32)
    return values * (_column(scale, rows) * factor)


def _column(scale: torch.Tensor, rows: slice) -> torch.Tensor:
    """Scales of these rows as float32 [rows, 1], or [1, 1] where the matrix has one."""
    return scale.float().reshape(-1, 1) if scale.numel() == 1 else scale[rows].float().unsqueeze(1)


def _row_blocks(weight: torch.Tensor) -> Iterator[slice]:
    elements = CPU_BLOCK if weight.device.type == "cpu" else GPU_BLOCK
    step = max(1, elements // weight.shape[1])
    return (slice(start, min(start + step, weight.shape[0])) for start in range(0, weight.shape[0], step))
