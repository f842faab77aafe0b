"""Quantising and the matmuls on quantised weights, against float arithmetic on the same values."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import peak_bytes
from torch import nn

from skywork_hf.quantization import formats, matmul
from skywork_hf.quantization.linear import SkyworkFp8Linear, SkyworkInt8Linear

sizes = st.integers(1, 70)
shapes = settings(max_examples=40, deadline=None)


def quantized(kind: str, out_features: int, in_features: int) -> tuple[torch.Tensor, torch.Tensor]:
    weight = torch.randn(out_features, in_features)
    return formats.quantize_int8(weight) if kind == "int8" else formats.quantize_fp8(weight)


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got.float() - expected.float()).norm() / expected.float().norm()).item()


@given(out_features=sizes, in_features=sizes, magnitude=st.sampled_from([1e-30, 1e-4, 1.0, 1e4]))
@shapes
def test_int8_is_off_by_at_most_half_a_step(out_features, in_features, magnitude):
    weight = torch.randn(out_features, in_features) * magnitude
    values, scale = formats.quantize_int8(weight)
    assert (values.dtype, scale.dtype, scale.shape) == (torch.int8, torch.bfloat16, (out_features,))
    step = scale.float().unsqueeze(1)
    # Half a step, and what rounding the scale down to bfloat16 cuts off the largest value of a row.
    assert ((values * step - weight).abs() <= step * 0.5 + weight.abs() * 2**-8).all()


@given(out_features=sizes, in_features=sizes, magnitude=st.sampled_from([1e-30, 1e-4, 1.0, 1e4]))
@shapes
def test_fp8_is_off_by_at_most_half_a_step(out_features, in_features, magnitude):
    weight = torch.randn(out_features, in_features) * magnitude
    values, scale = formats.quantize_fp8(weight)
    assert (values.dtype, scale.dtype, scale.shape) == (torch.float8_e4m3fn, torch.float32, ())
    # 3 bits of mantissa; below 2^-6 the steps are 2^-9 wide.
    assert ((values.float() * scale - weight).abs() <= weight.abs() * 2**-4 + scale * 2**-10).all()


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_zeros_stay_zeros(kind):
    quantize = formats.quantize_int8 if kind == "int8" else formats.quantize_fp8
    weight, scale = quantize(torch.zeros(3, 5))
    assert torch.equal(formats.dequantize(weight, scale, torch.float32), torch.zeros(3, 5))


def test_every_e4m3_value_is_unpacked_as_torch_does():
    values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).unsqueeze(0)
    expected = values.float()
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        unpacked, factor = formats.unpack(values, dtype)
        assert unpacked.dtype == dtype
        finite = expected.isfinite()
        assert finite.sum() == 254
        assert torch.equal((unpacked.float() * factor)[finite], expected[finite])


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@given(rows=sizes, out_features=sizes, in_features=sizes)
@shapes
def test_weight_only_matmul_and_its_gradient_are_those_of_the_real_values(kind, rows, out_features, in_features):
    weight, scale = quantized(kind, out_features, in_features)
    real = weight.float() * (scale.float().unsqueeze(1) if kind == "int8" else scale)
    assert torch.equal(formats.dequantize(weight, scale, torch.float32), real)
    inputs, grad = torch.randn(rows, in_features), torch.randn(rows, out_features)
    torch.testing.assert_close(matmul.dequantized_linear(inputs, weight, scale), inputs @ real.t())
    torch.testing.assert_close(matmul.dequantized_backward(grad, weight, scale), grad @ real)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_many_blocks_and_16_bit_inputs(kind, dtype, monkeypatch):
    weight, scale = quantized(kind, 67, 32)
    inputs = torch.randn(9, 32).to(dtype)
    whole = matmul.dequantized_linear(inputs, weight, scale)
    assert whole.dtype == dtype
    monkeypatch.setattr(formats, "CPU_BLOCK", 100)  # three rows at a time
    torch.testing.assert_close(matmul.dequantized_linear(inputs, weight, scale), whole)
    monkeypatch.setattr(matmul, "_compute_dtype", lambda _, inputs: inputs)  # as on a GPU
    torch.testing.assert_close(matmul.dequantized_linear(inputs, weight, scale), whole, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_what_unpacking_takes(device, kind, dtype, monkeypatch):
    weight, scale = quantized(kind, 3000, 512)  # two blocks of a CPU, one of a GPU
    if device == "cuda":  # what runs there, here
        monkeypatch.setattr(formats, "CPU_BLOCK", formats.GPU_BLOCK)
        monkeypatch.setattr(matmul, "_compute_dtype", lambda _, inputs: inputs)
        for module in (formats, matmul):
            monkeypatch.setattr(module, "unpack", lambda values, dtype: (values.to(dtype), 1.0))
    inputs = torch.randn(1, 512).to(dtype)
    planned = matmul.unpacking_bytes(weight.numel(), weight.dtype, dtype, device)
    peak = peak_bytes(lambda: matmul.dequantized_linear(inputs, weight, scale))
    assert 0.98 * planned <= peak <= 1.05 * planned  # inputs, outputs and scales beside it


@given(
    rows=st.integers(0, 40),
    out_features=sizes,
    in_features=st.sampled_from([1, 5, 32, 33, 64, 96]),  # torch's kernel crashes with 5 and 33
    has_int_mm=st.booleans(),
    has_numba=st.booleans(),
)
@shapes
def test_int8_linear_whatever_kernel_it_takes(rows, out_features, in_features, has_int_mm, has_numba):
    weight, scale = quantized("int8", out_features, in_features)
    inputs = torch.randn(rows, in_features).bfloat16()
    expected = inputs.float() @ formats.dequantize(weight, scale, torch.float32).t()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matmul, "_has_vnni", lambda: has_int_mm)
        patch.setattr(matmul, "_has_bfloat16", lambda: has_int_mm)
        if not has_numba:
            patch.setattr(matmul, "_numba", lambda: None)
        call = ("cpu", inputs.dtype, rows, weight.shape)
        kernel = matmul.int8_kernel(*call, quantize_activations=True)
        torchs = "dequantize" if in_features % 32 or not 0 < rows <= 32 else "weight_int8pack_mm"
        if has_numba and 0 < rows <= (4 if has_int_mm else 64):
            assert kernel == "numba"
        else:
            assert kernel == ("int_mm" if has_int_mm and rows > 4 and in_features > 1 else torchs)
        assert matmul.int8_kernel(*call, quantize_activations=False) != "int_mm"
        outputs = matmul.int8_linear(inputs, weight, scale, quantize_activations=True)
    assert outputs.dtype == torch.bfloat16
    bound = inputs.float().norm(dim=1, keepdim=True) * formats.dequantize(weight, scale, torch.float32).norm(dim=1)
    assert ((outputs.float() - expected).abs() <= 0.03 * bound + 1e-6).all()


# The shapes of one row of the real layer's matrices: an output's error depends on the length of its row alone.
@pytest.mark.parametrize("in_features", [4608, 12288])
@pytest.mark.parametrize(
    ("name", "bound"), [("int8 weights", 0.012), ("int8 weights and activations", 0.02), ("fp8", 0.04)]
)
def test_error_on_gaussian_data_of_the_real_row_lengths(name, bound, in_features):
    weight, inputs = torch.randn(512, in_features) * 0.02, torch.randn(64, in_features)
    exact = inputs @ weight.t()
    if name == "fp8":
        values, scale = formats.quantize_fp8(weight)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(matmul, "has_fp8_unit", lambda device: True)
            outputs = matmul.fp8_linear(inputs, values, scale, "dynamic", None)
    else:
        run = matmul.dequantized_linear if name == "int8 weights" else matmul.int8_activations_linear
        outputs = run(inputs, *formats.quantize_int8(weight))
    assert 0 < relative_error(outputs, exact) <= bound


@pytest.mark.parametrize("static", [True, False])
def test_fp8_activations_are_rounded_by_their_scale(static, monkeypatch):
    weight, scale = quantized("fp8", 32, 48)
    inputs = torch.randn(5, 48)
    input_scale = torch.tensor(0.02) if static else inputs.abs().max() / 448
    rounded = (inputs / input_scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * input_scale
    expected = rounded @ (weight.float() * scale).t()
    monkeypatch.setattr(matmul, "has_fp8_unit", lambda device: True)
    outputs = matmul.fp8_linear(inputs, weight, scale, "dynamic", input_scale if static else None)
    torch.testing.assert_close(outputs, expected)
    assert relative_error(outputs, inputs @ (weight.float() * scale).t()) > 1e-3


@pytest.mark.parametrize("kind", [SkyworkFp8Linear, SkyworkInt8Linear])
def test_moving_never_casts_a_quantised_weight(kind):
    layer = kind(16, 8, bias=True)
    dtypes = {name: parameter.dtype for name, parameter in layer.named_parameters()}
    before = torch.randn(8, 16).to(layer.weight.dtype)
    layer.weight = nn.Parameter(before, requires_grad=False)
    layer.to(torch.float16).half().to("cpu", torch.bfloat16)
    assert {name: parameter.dtype for name, parameter in layer.named_parameters()} == dtypes
    assert torch.equal(layer.weight.view(torch.uint8), before.view(torch.uint8))
    assert layer.to("meta").weight.is_meta


@pytest.mark.parametrize("kind", [SkyworkFp8Linear, SkyworkInt8Linear])
def test_a_layer_is_the_linear_that_it_dequantises_to(kind):
    layer = kind(16, 8, bias=True)
    weight, scale = quantized("fp8" if kind is SkyworkFp8Linear else "int8", 8, 16)
    layer.load_state_dict({"weight": weight, "weight_scale": scale, "bias": torch.randn(8)})
    inputs = torch.randn(2, 2, 16, requires_grad=True)  # more rows may be rounded to int8
    outputs = layer(inputs)
    (gradient,) = torch.autograd.grad(outputs.square().sum(), inputs)
    linear = layer.dequantize(torch.float32)
    expected = F.linear(inputs, linear.weight, linear.bias)
    torch.testing.assert_close(outputs, expected)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.square().sum(), inputs)[0])
    assert not any(parameter.requires_grad for parameter in layer.parameters())


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 16, 64])
def test_on_a_gpu_as_on_the_cpu(rows):
    inputs = torch.randn(rows, 256).bfloat16()
    int8, fp8 = quantized("int8", 128, 256), quantized("fp8", 128, 256)
    on_gpu = inputs.cuda()
    moved = matmul.int8_linear(on_gpu, *(tensor.cuda() for tensor in int8), quantize_activations=True)
    assert relative_error(moved.cpu(), matmul.dequantized_linear(inputs, *int8)) <= 0.02
    for scheme in ("none", "dynamic"):
        moved = matmul.fp8_linear(on_gpu, *(tensor.cuda() for tensor in fp8), scheme, None)
        assert relative_error(moved.cpu(), matmul.dequantized_linear(inputs, *fp8)) <= 0.04


@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_runs_a_layer_in_its_dtype(dtype, kind, rows):
    """As any linear; and no matmul inside in another: codes times inputs overflow float16 before they are scaled."""
    layer = layer_of(kind, 64, 64)
    inputs = 300 * torch.rand(rows, 64, requires_grad=True)
    wanted = layer(inputs.to(dtype))
    with torch.autocast("cpu", dtype):
        got = layer(inputs)
    assert got.dtype == dtype
    assert got.isfinite().all()
    assert torch.equal(got, wanted)
    (gradient,) = torch.autograd.grad(got.float().sum(), inputs)
    assert gradient.dtype == torch.float32


@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("kind", ["int8", "fp8"])
@torch.no_grad()
def test_a_scale_in_another_dtype_is_the_same_scale(kind, rows):
    layer, inputs = layer_of(kind, 64, 64), torch.randn(rows, 64, dtype=torch.bfloat16)
    wanted = layer(inputs)
    layer.weight_scale.data = layer.weight_scale.data.double()
    assert torch.equal(layer(inputs), wanted)


@pytest.mark.parametrize("rows", [1, 3, 4, 32])
@pytest.mark.parametrize("offset", [0, 2, 8, 16])
@torch.no_grad()
def test_tensors_may_begin_anywhere_in_memory(offset, rows):
    """As weights that are mapped from a file do, and inputs that are views."""

    def moved(tensor: torch.Tensor) -> torch.Tensor:
        buffer = torch.empty(tensor.nbytes + offset, dtype=torch.uint8)
        there = buffer[offset:].view(tensor.dtype).view(tensor.shape)
        return there.copy_(tensor)

    weight, scale = formats.quantize_int8(torch.randn(48, 64))
    inputs = torch.randn(rows, 64, dtype=torch.bfloat16)
    wanted = F.linear(inputs.float(), formats.dequantize(weight, scale, torch.float32))
    got = matmul.int8_linear(moved(inputs), moved(weight), moved(scale), quantize_activations=False)
    assert relative_error(got, wanted) < 0.01


def layer_of(kind: str, out_features: int, in_features: int) -> SkyworkInt8Linear | SkyworkFp8Linear:
    layer = (SkyworkInt8Linear if kind == "int8" else SkyworkFp8Linear)(in_features, out_features)
    weight, scale = quantized(kind, out_features, in_features)
    layer.weight, layer.weight_scale = (nn.Parameter(tensor, requires_grad=False) for tensor in (weight, scale))
    return layer
