"""The matmuls on quantised weights: which kernel runs where, and why.

No kernel keeps a 16-bit copy of a weight: where one has to be made, "dequantize" makes it in blocks that are gone when
the matmul is. `benchmarks/int8_kernels.py` measures the choices; `docs/quantization.md` holds the figures.
"""

from __future__ import annotations

from functools import cache

import torch

from .formats import (
    FP8,
    INT8_MAX,
    block_elements,
    column,
    fp8_scale,
    real_rows,
    row_blocks,
    to_fp8,
    to_int8,
    unpack,
)

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


def dequantized_linear(inputs: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
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
    compute = _compute_dtype(inputs.device.type, inputs.dtype)
    inputs_there = inputs.to(compute)
    for rows in row_blocks(weight):
        values, factor = _block(weight, scale, rows, compute)
        outputs[:, rows] = (inputs_there @ values.t()).float().mul_(factor.t())
        del values  # before the next block is unpacked
    return outputs


def dequantized_backward(grad: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """`grad @ real(weight)`: the gradient of a linear's inputs.

    Args:
        grad: [rows, out_features].

    Returns:
        [rows, in_features] in the dtype of `grad`; summed in float32.
    """
    total = torch.zeros(grad.shape[0], weight.shape[1], device=grad.device)
    if not len(grad):
        return total.to(grad.dtype)
    compute = _compute_dtype(grad.device.type, grad.dtype)
    for rows in row_blocks(weight):
        values, factor = _block(weight, scale, rows, compute)
        total += (grad[:, rows].float() * factor.t()).to(compute) @ values
        del values  # as above
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
    return dequantized_linear(inputs, weight, scale)


def _aligned(tensor: torch.Tensor, multiple: int) -> torch.Tensor:
    """A tensor that begins at a multiple of so many bytes: itself, or a copy that is gone after the matmul."""
    if torch.compiler.is_compiling() or tensor.data_ptr() % multiple == 0:  # while compiling nobody knows
        return tensor
    return tensor.clone()


def int8_kernel(
    device_type: str, dtype: torch.dtype, rows: int, shape: tuple[int, ...], quantize_activations: bool
) -> str:
    """The name of what `int8_linear` runs for `rows` inputs of `dtype` and a weight of `shape`: "weight_int8pack_mm",
    "int_mm" or "dequantize"."""
    if quantize_activations and has_fast_int_mm(device_type, rows, shape):
        return "int_mm"
    return "weight_int8pack_mm" if has_fast_weight_only(device_type, dtype, rows, shape) else "dequantize"


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
    outputs = torch._int_mm(to_int8(rows, token_scale), weight.t()).float()
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
    if not len(inputs) or fp8_kernel(has_fp8_unit(inputs.device), weight.shape, scheme) == "dequantize":
        return dequantized_linear(inputs, weight, scale)
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
    """The name of what `fp8_linear` runs for a weight of `shape`: "scaled_mm" or "dequantize"."""
    fits = all(size % SCALED_MM_MULTIPLE == 0 for size in shape)
    return "scaled_mm" if has_unit and fits and scheme != "none" else "dequantize"


@cache
def has_fp8_unit(device: torch.device) -> bool:
    """Whether `device` multiplies FP8: an NVIDIA GPU of compute capability 8.9 or later."""
    return (
        device.type == "cuda"
        and torch.version.hip is None
        and torch.cuda.is_available()
        and torch.cuda.get_device_capability(device) >= (8, 9)
    )


def unpacking_bytes(elements: int, weight_dtype: torch.dtype, inputs: torch.dtype, device_type: str) -> int:
    """The most bytes that `dequantized_linear` takes at a time beside its inputs and outputs.

    Args:
        elements: of the weight.
        weight_dtype: int8 or float8_e4m3fn.
        inputs: their dtype.
        device_type: "cpu", or a GPU's.
    """
    compute = _compute_dtype(device_type, inputs)
    # See `_block`: float16 is made from real values in 32 bit, and a CPU takes FP8's bits through 16 bit.
    beside = 4 if compute == torch.float16 else 2 if (weight_dtype, device_type) == (FP8, "cpu") else 0
    return min(elements, block_elements(device_type)) * (compute.itemsize + beside)


def _compute_dtype(device_type: str, inputs: torch.dtype) -> torch.dtype:
    """What a block is multiplied in: 16 bit only where that is faster."""
    if device_type != "cpu" or (inputs == torch.bfloat16 and torch.cpu._is_avx512_bf16_supported()):
        return inputs
    return torch.float32


def _block(
    weight: torch.Tensor, scale: torch.Tensor, rows: slice, compute: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """These rows in `compute`, and the float32 factors [rows, 1] or [1, 1] that make them real."""
    if compute == torch.float16:  # whose sums would overflow without the scale
        return real_rows(weight, scale, rows).to(compute), torch.ones(1, 1, device=weight.device)
    values, factor = unpack(weight[rows], compute)
    return values, column(scale, rows) * factor
