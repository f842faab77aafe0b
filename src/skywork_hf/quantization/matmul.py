"""The matmuls on quantised weights, and on 16-bit ones on a CPU: which kernel runs where, and why.

No kernel keeps a 16-bit copy of a weight: where one has to be made, "dequantize" makes it in blocks that are gone when
the matmul is. On a GPU "triton" (`triton_kernels`, where it runs) takes few rows, and what torch has takes more. On a
CPU "numba" (`cpu_kernels`, where the extra `cpu` is installed) takes few rows, and what torch has
instructions for takes more. Which is which follows from a table by what the CPU has, and not from a measurement, so
that a plan runs the same kernels each time; `benchmarks/cpu_kernels.py` checks the table, `docs/quantization.md` holds
the figures.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from transformers.utils import logging

from . import gpu_kernels
from .cards import MAX_TOKENS, has_fp8_unit
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

logger = logging.get_logger(__name__)

# Up to so many rows numba's kernels are the fastest on a CPU: with AVX512-VNNI where activations may be int8; with
# AVX512-BF16 where weights are bfloat16, and where they have to be unpacked to it; where torch has none of these.
NUMBA_ROWS, NUMBA_BFLOAT16_ROWS, NUMBA_UNPACKING_ROWS, NUMBA_ROWS_ALONE = 4, 8, 24, 64
# Up to so many rows torch's weight-only kernel beats unpacking blocks on CPUs, and with more rows it does not
# (measured on AVX2, where the crossing lies between 24 and 64). With AVX512-VNNI torch's integer matmul takes over.
CPU_WEIGHT_ONLY_ROWS = 32
# That kernel crashes the process where the rows of a weight are no whole number of vectors long (seen on AVX2 with 5
# and 33; AVX512 has the longest vectors, 32 of bfloat16).
CPU_WEIGHT_ONLY_MULTIPLE = 32
# It also crashes on inputs, and from so many rows on weights, that begin elsewhere in memory than at multiples of so
# many bytes (seen on AVX512). Weights mapped from a safetensors file begin at multiples of 8.
CPU_WEIGHT_ONLY_INPUT_ALIGNMENT, CPU_WEIGHT_ONLY_ALIGNED_ROWS, CPU_WEIGHT_ONLY_ALIGNMENT = 32, 4, 16
# From so many rows on its integer matmul is faster with VNNI; float32, taken for its precision, is rounded later.
CPU_INT_MM_ROWS, CPU_INT_MM_FLOAT32_ROWS = NUMBA_ROWS + 1, NUMBA_ROWS_ALONE + 1
# torch's integer matmul on CUDA takes no fewer rows, and only multiples of 8 in the two other directions.
CUDA_INT_MM_ROWS = 17
CUDA_INT_MM_MULTIPLE = 8
SCALED_MM_MULTIPLE = 16
# What the Triton kernels take inputs in.
KERNEL_INPUTS = (torch.bfloat16, torch.float16)


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
    for rows, values, factor in _blocks(weight, scale, compute):
        outputs[:, rows] = (inputs_there @ values.t()).float().mul_(factor.t())
        del values  # before the next block is unpacked
    return outputs


def reference_linear(inputs: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """What every kernel is compared with: `dequantized_linear`, or torch's linear for a weight without scale."""
    return F.linear(inputs, weight) if scale is None else dequantized_linear(inputs, weight, scale)


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
    for rows, values, factor in _blocks(weight, scale, compute):
        total += (grad[:, rows].float() * factor.t()).to(compute) @ values
        del values  # as above
    return total.to(grad.dtype)


def int8_linear(
    inputs: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    quantize_activations: bool,
    has_triton: bool = False,
) -> torch.Tensor:
    """A linear on int8 weights.

    Args:
        inputs: [rows, in_features], a float dtype.
        weight: int8 [out_features, in_features].
        scale: [out_features], a float dtype; bfloat16 unless somebody cast it.
        quantize_activations: whether many rows may run with int8 activations.
        has_triton: what `has_kernels_for` says.

    Returns:
        [rows, out_features] in the dtype of `inputs`.
    """
    if inputs.device.type == "cpu" and _is_recorded(inputs):
        return _compiled_linear(inputs, weight, scale, quantize_activations)
    rows, device = len(inputs), inputs.device.type
    kernel = int8_kernel(device, inputs.dtype, rows, weight.shape, quantize_activations, has_triton)
    if kernel == "triton":
        return gpu_kernels.kernels.linear(inputs, weight.contiguous(), scale)
    if kernel == "numba":
        return _numba().linear(inputs, weight.contiguous(), scale)
    if kernel == "weight_int8pack_mm":
        if rows >= CPU_WEIGHT_ONLY_ALIGNED_ROWS:
            weight = _aligned(weight, CPU_WEIGHT_ONLY_ALIGNMENT)
        inputs = _aligned(inputs, CPU_WEIGHT_ONLY_INPUT_ALIGNMENT)
        return torch._weight_int8pack_mm(inputs, weight, scale.to(inputs.dtype))  # as it takes no other
    if kernel == "int_mm" and has_triton:
        codes, token_scale = gpu_kernels.kernels.quantize_int8(inputs)
        return gpu_kernels.kernels.rescale(torch._int_mm(codes, weight.t()), token_scale, scale, inputs.dtype)
    if kernel == "int_mm":
        return int8_activations_linear(inputs, weight, scale)
    return dequantized_linear(inputs, weight, scale)


def _aligned(tensor: torch.Tensor, multiple: int) -> torch.Tensor:
    """A tensor that begins at a multiple of so many bytes: itself, or a copy that is gone after the matmul."""
    return tensor if tensor.data_ptr() % multiple == 0 else tensor.clone()


def has_kernels_for(weight: torch.Tensor, scale: torch.Tensor) -> bool:
    """Whether the Triton kernels run on a weight's device, and compute for its format what the reference path does:
    compared on first use."""
    device = weight.device
    if isinstance(weight, DTensor) or not gpu_kernels.has_triton(device):
        return False

    def differs(tokens: int) -> str | None:
        inputs = gpu_kernels.sample(tokens, weight.shape[1], KERNEL_INPUTS[0], device)
        return gpu_kernels.difference(
            ("linear", weight.dtype, scale.dtype, tokens),
            device,
            lambda: gpu_kernels.kernels.linear(inputs, weight.contiguous(), scale),
            lambda: reference_linear(inputs, weight, scale),
        )

    with torch.no_grad():
        return not any(map(differs, (1, MAX_TOKENS)))


def takes_triton(has_triton: bool, dtype: torch.dtype, rows: int) -> bool:
    """Whether the Triton kernels, where they are, take so many inputs of `dtype`."""
    return has_triton and 0 < rows <= MAX_TOKENS and dtype in KERNEL_INPUTS


def int8_kernel(
    device_type: str,
    dtype: torch.dtype,
    rows: int,
    shape: tuple[int, ...],
    quantize_activations: bool,
    has_triton: bool = False,
) -> str:
    """The name of what `int8_linear` runs for `rows` inputs of `dtype` and a weight of `shape`: "triton", "numba",
    "weight_int8pack_mm", "int_mm" or "dequantize"."""
    if takes_triton(has_triton, dtype, rows):
        return "triton"
    if device_type == "cpu" and has_fast_numba(torch.int8, dtype, rows, quantize_activations):
        return "numba"
    if quantize_activations and has_fast_int_mm(device_type, dtype, rows, shape):
        return "int_mm"
    return "weight_int8pack_mm" if has_fast_weight_only(device_type, dtype, rows, shape) else "dequantize"


def has_fast_numba(weight_dtype: torch.dtype, dtype: torch.dtype, rows: int, int8_activations: bool = False) -> bool:
    """Whether the CPU kernels are there, take inputs of `dtype`, and are the fastest for so many rows."""
    if not 0 < rows <= NUMBA_ROWS_ALONE or dtype not in (torch.bfloat16, torch.float32) or _numba() is None:
        return False
    if rows <= NUMBA_ROWS or dtype == torch.float32:
        return True
    if int8_activations and _has_vnni():
        return False
    few = NUMBA_BFLOAT16_ROWS if weight_dtype == torch.bfloat16 else NUMBA_UNPACKING_ROWS
    return rows <= few or not _has_bfloat16()


def has_fast_weight_only(device_type: str, dtype: torch.dtype, rows: int, shape: tuple[int, ...]) -> bool:
    """Whether torch's weight-only kernel takes this and is the fastest for it: few rows of bfloat16 on a CPU without
    numba. (For other dtypes it is slower than blocks on CPUs without AVX512.)"""
    fits = device_type == "cpu" and dtype == torch.bfloat16 and _numba() is None
    return fits and 0 < rows <= CPU_WEIGHT_ONLY_ROWS and shape[1] % CPU_WEIGHT_ONLY_MULTIPLE == 0


def has_fast_int_mm(device_type: str, dtype: torch.dtype, rows: int, shape: tuple[int, ...]) -> bool:
    """Whether torch's integer matmul takes this and is the fastest for it."""
    if device_type == "cuda":
        return rows >= CUDA_INT_MM_ROWS and all(size % CUDA_INT_MM_MULTIPLE == 0 for size in shape)
    few = CPU_INT_MM_ROWS if dtype == torch.bfloat16 else CPU_INT_MM_FLOAT32_ROWS
    # With a single column torch's product is wrong (seen on AVX512).
    return device_type == "cpu" and rows >= few and shape[1] > 1 and _has_vnni()


def int8_activations_linear(inputs: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """A linear whose inputs are int8 too, one scale for each token, by torch's integer matmul; shapes as in
    `int8_linear`."""
    return _int_mm(*_int8_rows(inputs), weight, scale).to(inputs.dtype)


def _int8_rows(inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    rows = inputs.float()
    token_scale = (rows.abs().amax(dim=1, keepdim=True) / INT8_MAX).clamp_min(torch.finfo(torch.float32).tiny)
    return to_int8(rows, token_scale), token_scale


def _int_mm(rows: torch.Tensor, token_scale: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    if rows.is_cpu and weight.shape[0] < weight.shape[1]:
        # A CPU takes 0.6 to 0.9 of the time of the other order, measured for 5 to 256 rows.
        products = torch._int_mm(weight, rows.t()).t().contiguous()
    else:
        products = torch._int_mm(rows, weight.t())
    return products.float().mul_(token_scale).mul_(scale.float())


def cpu_expert(
    inputs: torch.Tensor, weights: list[torch.Tensor], scales: list[Any], int8_activations: bool
) -> torch.Tensor | None:
    """`w2(silu(w1(inputs)) * w3(inputs))` in fewer steps than its three linears take, on a CPU.

    Args:
        inputs: [rows, hidden_size].
        weights: of w1, w3 (both [intermediate_size, hidden_size]) and w2, of one dtype: int8, FP8 or bfloat16.
        scales: theirs; of bfloat16 None.
        int8_activations: as `quantize_activations` of `int8_linear`.

    Returns:
        [rows, hidden_size] in the dtype of `inputs`; None where the linears themselves are the fastest.
    """
    dtype, rows = weights[0].dtype, len(inputs)
    if dtype == FP8 and has_fp8_unit(inputs.device):
        return None
    if has_fast_numba(dtype, inputs.dtype, rows, int8_activations):
        return _numba().expert(inputs, weights, scales)
    if dtype != torch.int8 or not int8_activations:
        return None
    if not all(has_fast_int_mm("cpu", inputs.dtype, rows, weight.shape) for weight in weights):
        return None
    (w1, w3, w2), (scale1, scale3, scale2) = weights, scales
    shared = _int8_rows(inputs)
    hidden = F.silu(_int_mm(*shared, w1, scale1)).mul_(_int_mm(*shared, w3, scale3))
    return _int_mm(*_int8_rows(hidden), w2, scale2).to(inputs.dtype)


def bfloat16_linear(inputs: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """What "numba" of `linear_kernel` runs: `inputs @ weight.T`; shapes as in `int8_linear`."""
    return _numba().linear(inputs, weight, None)


def linear_kernel(device_type: str, dtype: torch.dtype, rows: int, has_triton: bool = False) -> str:
    """The name of what an expert's 16-bit linears run for `rows` inputs of `dtype`: "triton", "numba" (as a
    `SkyworkLinear` does), or "linear", torch's own."""
    if takes_triton(has_triton, dtype, rows):
        return "triton"
    fits = device_type == "cpu" and dtype == torch.bfloat16
    return "numba" if fits and has_fast_numba(dtype, dtype, rows) else "linear"


def fp8_linear(
    inputs: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    scheme: str,
    input_scale: torch.Tensor | None,
    has_triton: bool = False,
) -> torch.Tensor:
    """A linear on FP8 weights: by the device's FP8 unit, or weight-only where there is none or `scheme` is "none".

    Args:
        inputs: [rows, in_features], a float dtype.
        weight: float8_e4m3fn [out_features, in_features].
        scale: one element, a float dtype.
        scheme: "static", "dynamic" or "none".
        input_scale: the same: the activations' scale, for "static".
        has_triton: what `has_kernels_for` says.

    Returns:
        [rows, out_features] in the dtype of `inputs`.
    """
    device = inputs.device
    if device.type == "cpu" and _is_recorded(inputs):
        return _compiled_linear(inputs, weight, scale, False)
    has_unit, rows = has_fp8_unit(device), len(inputs)
    kernel = fp8_kernel(device.type, has_unit, inputs.dtype, rows, weight.shape, scheme, has_triton)
    if kernel == "triton":
        return gpu_kernels.kernels.linear(inputs, weight.contiguous(), scale)
    if kernel == "numba":
        return _numba().linear(inputs, weight.contiguous(), scale)
    if kernel == "dequantize":
        return dequantized_linear(inputs, weight, scale)
    if has_triton:
        codes, input_scale = gpu_kernels.kernels.quantize_fp8(inputs, input_scale)
    else:
        input_scale = fp8_scale(inputs) if input_scale is None else input_scale
        codes = to_fp8(inputs, input_scale)
    return torch._scaled_mm(
        codes,
        weight.t(),
        scale_a=input_scale.float().reshape(()),
        scale_b=scale.float().reshape(()),
        out_dtype=inputs.dtype,
    )


def fp8_kernel(
    device_type: str,
    has_unit: bool,
    dtype: torch.dtype,
    rows: int,
    shape: tuple[int, ...],
    scheme: str,
    has_triton: bool = False,
) -> str:
    """The name of what `fp8_linear` runs for `rows` inputs of `dtype` and a weight of `shape`: "triton", "scaled_mm",
    "numba" or "dequantize"."""
    if takes_triton(has_triton, dtype, rows):
        return "triton"
    fits = rows > 0 and all(size % SCALED_MM_MULTIPLE == 0 for size in shape)
    if has_unit and fits and scheme != "none":
        return "scaled_mm"
    return "numba" if device_type == "cpu" and has_fast_numba(FP8, dtype, rows) else "dequantize"


def _is_recorded(inputs: torch.Tensor) -> bool:
    """Whether torch's operations are noted, or run on tensors without memory: there the kernels are one of them."""
    is_plain = type(inputs) in (torch.Tensor, torch.nn.Parameter)
    return torch.compiler.is_compiling() or torch.jit.is_tracing() or not is_plain


@torch.library.custom_op("skywork_hf::cpu_linear", mutates_args=())
def _compiled_linear(
    inputs: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, quantize_activations: bool
) -> torch.Tensor:
    """What torch.compile and torch.jit.trace see of a quantised linear on a CPU: which kernel may run depends on where
    tensors begin, and what kernels compute without torch would not be seen."""
    if weight.dtype == FP8:
        return fp8_linear(inputs, weight, scale, "none", None)
    return int8_linear(inputs, weight, scale, quantize_activations)


@_compiled_linear.register_fake
def _(inputs: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, quantize_activations: bool) -> torch.Tensor:
    return inputs.new_empty(inputs.shape[0], weight.shape[0])


@cache
def _numba() -> Any:
    """The CPU kernels, where numba is and works."""
    if _numba_error:
        return None
    try:
        from . import cpu_kernels
    except Exception as error:
        _numba_error.append(error)
        return None
    return cpu_kernels


_numba_error: list[Exception] = []


def ready_cpu_kernels(dtypes: Iterable[torch.dtype]) -> None:
    """Compile the CPU kernels for weights of these dtypes before they are needed; or say what is lost without them."""
    kernels = _numba()
    if kernels is not None:
        try:
            kernels.compile_for(dtypes)
            return
        except Exception as failure:  # as of LLVM
            _numba_error.append(failure)
            _numba.cache_clear()
    error = _numba_error[0]
    is_missing = isinstance(error, ModuleNotFoundError) and error.name == "numba"
    reason = "is not installed" if is_missing else f"fails ({error})"
    logger.warning_once(
        f"numba {reason}, so torch's kernels run on the CPU: a decoded token takes about twice as long with int8 and "
        "bfloat16 weights, and many times as long with FP8. `pip install skywork-hf[cpu]` brings it."
    )


def _has_vnni() -> bool:
    """Whether torch's integer matmul has instructions of its own. (The environment may keep torch from using them.)"""
    return torch.cpu._is_vnni_supported() and torch.backends.cpu.get_cpu_capability() == "AVX512"


def _has_bfloat16() -> bool:
    return torch.cpu._is_avx512_bf16_supported() and torch.backends.cpu.get_cpu_capability() == "AVX512"


def unpacking_bytes(elements: int, weight_dtype: torch.dtype, inputs: torch.dtype, device_type: str) -> int:
    """The most bytes that `dequantized_linear` takes at a time beside its inputs and outputs.

    Args:
        elements: of the weight.
        weight_dtype: int8 or float8_e4m3fn.
        inputs: their dtype.
        device_type: "cpu", or a GPU's.
    """
    compute = _compute_dtype(device_type, inputs)
    # See `_blocks`: float16 is made from real values in 32 bit, and torch takes FP8's bits on a CPU through 16 bit.
    through_16_bit = (weight_dtype, device_type) == (FP8, "cpu") and _numba() is None
    beside = 4 if compute == torch.float16 else 2 if through_16_bit else 0
    return min(elements, block_elements(device_type)) * (compute.itemsize + beside)


def _compute_dtype(device_type: str, inputs: torch.dtype) -> torch.dtype:
    """What a block is multiplied in: 16 bit only where that is faster."""
    if device_type != "cpu" or (inputs == torch.bfloat16 and _has_bfloat16()):
        return inputs
    return torch.float32


def _blocks(
    weight: torch.Tensor, scale: torch.Tensor, compute: torch.dtype
) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
    """Block by block its rows, their values in `compute`, and the float32 factors [rows, 1] or [1, 1] that make them
    real. A block's values are gone, or others, when the next one is asked for."""
    is_seen = torch.compiler.is_compiling()  # of what numba does, nothing would be
    by_numba = weight.device.type == "cpu" and compute != torch.float16 and not is_seen and _numba() is not None
    buffer = weight.new_empty(0, dtype=compute)
    for rows in row_blocks(weight):
        if by_numba:  # into the same memory: that of a new tensor would be the kernel's, page by page
            block = weight[rows].contiguous()
            buffer = buffer if len(buffer) else block.new_empty(block.shape, dtype=compute)
            _numba().unpack(block, buffer[: len(block)])
            yield rows, buffer[: len(block)], column(scale, rows)
        elif compute == torch.float16:  # whose sums would overflow without the scale
            yield rows, real_rows(weight, scale, rows).to(compute), torch.ones(1, 1, device=weight.device)
        else:
            values, factor = unpack(weight[rows], compute)
            yield rows, values, column(scale, rows) * factor
            del values
