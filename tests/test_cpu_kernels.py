"""The CPU kernels, against float64 arithmetic on the same values, and wherever they may be called."""

from __future__ import annotations

import builtins
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny import forked, tiny_moe_config, tokens
from transformers import AutoModelForCausalLM
from transformers.testing_utils import CaptureLogger
from transformers.utils import logging

from skywork_hf.modeling_skywork_moe import SkyworkMoeExpert, SkyworkMoeForCausalLM
from skywork_hf.placement import placement_report
from skywork_hf.quantization import cpu_kernels, matmul
from skywork_hf.quantization.experts import SkyworkCpuExpert, use_cpu_kernels
from skywork_hf.quantization.formats import FP8, quantize_fp8, quantize_int8, unpack
from skywork_hf.quantization.linear import SkyworkFp8Linear, SkyworkInt8Linear, SkyworkLinear
from skywork_hf.quantization.matmul import dequantized_linear

KINDS = ["int8", "fp8", "bf16"]
Matrix = tuple[torch.Tensor, torch.Tensor | None]
examples = settings(max_examples=60, deadline=None)


def matrix(kind: str, out_features: int, in_features: int) -> Matrix:
    """Any codes: for FP8 subnormals and both of NaN's among them, and with int8 a row of zeros."""
    codes = torch.randint(-128, 128, (out_features, in_features), dtype=torch.int8)
    if kind == "fp8":
        return codes.view(FP8), torch.rand(())
    if kind == "int8":
        codes[-1] = 0
        return codes, torch.rand(out_features).bfloat16()
    return codes.bfloat16() / 100, None


def real(weight: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    values, factor = unpack(weight, torch.float32)
    column = 1.0 if scale is None else scale.double().reshape(-1, 1)
    return values.double() * factor * column


def moved(tensor: torch.Tensor, offset: int) -> torch.Tensor:
    """The same values, beginning so many bytes after a place where tensors begin."""
    values = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return torch.frombuffer(bytearray(offset) + values, dtype=tensor.dtype, offset=offset).view(tensor.shape)


@pytest.mark.parametrize("kind", KINDS)
@given(
    rows=st.integers(1, 64),
    out_features=st.integers(1, 70),
    in_features=st.integers(1, 300),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    offset=st.sampled_from([0, 1, 2, 8, 13]),
    magnitude=st.sampled_from([0.0, 1e-38, 1e-20, 1.0, 1e30]),
)
@example(rows=3, out_features=4, in_features=300, dtype=torch.float32, offset=1, magnitude=1.0)
@examples
def test_a_matmul_is_that_of_the_real_values(kind, rows, out_features, in_features, dtype, offset, magnitude):
    weight, scale = matrix(kind, out_features, in_features)
    inputs = (torch.randn(rows, in_features) * magnitude).to(dtype)
    outputs = cpu_kernels.linear(inputs, moved(weight, offset), None if scale is None else moved(scale, offset))
    assert (outputs.dtype, outputs.shape) == (dtype, (rows, out_features))
    exact = inputs.double() @ real(weight, scale).t()
    # Sums of so many float32 values, which may be subnormal; and one rounding of the result.
    bound = (in_features + 8) * 2**-24 * (inputs.double().abs() @ real(weight, scale).abs().t())
    bound += in_features * 2.0**-134 + (exact.abs() * 2**-8 if dtype == torch.bfloat16 else 0)
    assert ((outputs.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("kind", KINDS)
@given(rows=st.integers(1, 9), hidden=st.integers(1, 200), features=st.integers(1, 100), tiny=st.booleans())
@examples
def test_an_expert_is_its_three_matmuls(kind, rows, hidden, features, tiny):
    matrices = [matrix(kind, hidden, features), matrix(kind, hidden, features), matrix(kind, features, hidden)]
    inputs = torch.randn(rows, features) * (1e-25 if tiny else 1e-3)
    outputs = cpu_kernels.expert(inputs, *map(list, zip(*matrices, strict=True)))
    w1, w3, w2 = (real(*of) for of in matrices)
    exact = (F.silu(inputs.double() @ w1.t()) * (inputs.double() @ w3.t())) @ w2.t()
    magnitude = (inputs.double().abs() @ w1.abs().t()) * (inputs.double().abs() @ w3.abs().t()) @ w2.abs().t()
    assert ((outputs.double() - exact).abs() <= 1e-5 * magnitude + 2.0**-120).all()


@pytest.mark.parametrize("in_features", [4608, 12288])
@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_the_error_is_no_larger_than_the_reference_paths(kind, in_features):
    weight, scale = (quantize_int8 if kind == "int8" else quantize_fp8)(torch.randn(64, in_features) * 0.02)
    for dtype in (torch.float32, torch.bfloat16):
        inputs = torch.randn(4, in_features).to(dtype)
        exact = inputs.double() @ real(weight, scale).t()
        ours, reference = (
            (linear(inputs, weight, scale).double() - exact).norm()
            for linear in (cpu_kernels.linear, dequantized_linear)
        )
        assert ours <= 1.1 * reference + 1e-7 * exact.norm()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_finite_stays_so(kind, value):
    weight, scale = matrix(kind, 8, 40)
    inputs = torch.randn(2, 40)
    inputs[0, 3] = value
    outputs = cpu_kernels.linear(inputs.bfloat16(), weight, scale)
    assert not outputs[0, weight.float()[:, 3] != 0].isfinite().any()
    assert outputs[1].isfinite().all()


@pytest.fixture
def two_threads(monkeypatch):
    """A pool that helps with any work, however small, in many chunks."""
    monkeypatch.setattr(cpu_kernels, "ALONE_BYTES", 0)
    monkeypatch.setattr(cpu_kernels, "CHUNK_BYTES", 1000)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


def experts_work(kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """What an expert gives on one thread, and with a pool's help."""
    torch.manual_seed(0)
    matrices = [matrix(kind, 200, 64), matrix(kind, 200, 64), matrix(kind, 64, 200)]
    call = (torch.randn(3, 64) * 1e-3, *map(list, zip(*matrices, strict=True)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_kernels, "ALONE_BYTES", 2**40)
        alone = cpu_kernels.expert(*call)
    return alone, cpu_kernels.expert(*call)


@pytest.mark.parametrize("has_openmp", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_threads_compute_what_one_does(kind, has_openmp, two_threads, monkeypatch):
    if not has_openmp:
        monkeypatch.setattr(cpu_kernels, "_openmp", lambda: None)
    for _ in range(50):
        alone, together = experts_work(kind)
        assert torch.equal(alone, together)


def test_32_callers_at_once(two_threads):
    def calls(number: int) -> bool:
        torch.set_num_threads(2)
        return all(torch.equal(*experts_work(KINDS[number % 3])) for _ in range(10))

    with ThreadPoolExecutor(32) as callers:
        # A seed is the process's, so that the threads disturb each other's numbers, but not the comparison.
        assert all(callers.map(calls, range(32)))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_computes_with_a_pool_of_its_own(two_threads):
    assert torch.equal(*experts_work("int8"))  # so that there are threads, which the child has not

    def compute() -> None:
        assert torch.equal(*experts_work("int8"))
        assert cpu_kernels._openmp() is None
        assert cpu_kernels._pool()._threads

    assert os.waitpid(forked(compute), 0)[1] == 0


def test_where_nothing_can_be_cached_kernels_are_compiled_all_the_same(monkeypatch):
    cfunc, asked = cpu_kernels.cfunc, []

    def without_cache(*args, cache=False, **options):
        asked.append(cache)
        if cache:
            raise RuntimeError("cannot cache function '_int8_kernel': no locator available for file")
        return cfunc(*args, **options)

    monkeypatch.setattr(cpu_kernels, "cfunc", without_cache)
    monkeypatch.setattr(cpu_kernels, "_kernels", {})
    monkeypatch.setitem(cpu_kernels._SOURCES, torch.int8, lambda job: job > 1)  # quick to compile
    kernel = cpu_kernels._compiled(torch.int8)
    assert asked == [True, False]
    assert kernel(2)
    assert not kernel(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_unpacked_codes_are_exact(kind, dtype):
    weight, _ = matrix(kind, 301, 1)
    values, factor = unpack(weight, torch.float32)
    unpacked = torch.empty(weight.shape, dtype=dtype)
    cpu_kernels.unpack(weight, unpacked)
    assert torch.equal(unpacked.float(), values * factor)


def layer(kind: str, out_features: int, in_features: int) -> torch.nn.Linear:
    """Ours, as it is after loading; weights begin at an odd multiple of 8, as many do that are mapped from a file."""
    classes = {"int8": SkyworkInt8Linear, "fp8": SkyworkFp8Linear, "bf16": torch.nn.Linear}
    made = classes[kind](in_features, out_features, bias=False)
    weight, scale = matrix(kind, out_features, in_features)
    made.weight = torch.nn.Parameter(moved(weight, 8), requires_grad=False)
    if scale is not None:
        made.weight_scale = torch.nn.Parameter(scale, requires_grad=False)
    use_cpu_kernels(made)
    return made


@pytest.mark.parametrize("rows", [1, 4, 5, 40, 100])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("has_numba", [True, False])
@torch.no_grad()
def test_layers_compile_whole_and_compute_what_they_do_uncompiled(has_numba, kind, rows, monkeypatch):
    """Also where torch's weight-only kernel runs, which crashed on weights that begin where these do."""
    made, inputs = layer(kind, 64, 96), torch.randn(rows, 96).bfloat16()
    if not has_numba:
        monkeypatch.setattr(matmul, "_numba", lambda: None)
        monkeypatch.setattr(matmul, "_has_vnni", lambda: False)
    torch.compiler.reset()
    compiled = torch.compile(made.forward, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(inputs), made(inputs), rtol=2e-2, atol=2e-2)


def expert_of(kind: str) -> SkyworkCpuExpert:
    made = SkyworkMoeExpert(tiny_moe_config(hidden_size=96, intermediate_size=64))
    made.w1, made.w3, made.w2 = layer(kind, 64, 96), layer(kind, 64, 96), layer(kind, 96, 64)
    use_cpu_kernels(made)
    assert type(made) is SkyworkCpuExpert
    return made


@pytest.mark.parametrize("has_vnni", [True, False])
@pytest.mark.parametrize("rows", [1, 3, 20])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_an_expert_computes_together_what_its_linears_do(kind, rows, has_vnni, monkeypatch):
    monkeypatch.setattr(matmul, "_has_vnni", lambda: has_vnni)
    expert, inputs = expert_of(kind), torch.randn(rows, 96).bfloat16() / 100
    together, wanted = expert._together(inputs), SkyworkMoeExpert.forward(expert, inputs)
    assert torch.equal(expert(inputs), wanted if together is None else together)
    assert together is not None or rows == 20
    assert (expert(inputs) - wanted).float().norm() <= 0.02 * wanted.float().norm()


def test_linears_that_are_more_than_themselves_are_called():
    expert, inputs, seen = expert_of("bf16"), torch.randn(2, 96).bfloat16(), []
    with torch.no_grad():
        assert expert._together(inputs) is not None
        handle = expert.w3.register_forward_hook(lambda *call: seen.append(call))
        expert(inputs)
        handle.remove()
        assert len(seen) == 1
        expert.w2 = torch.nn.Sequential(expert.w2)  # as adapters wrap it
        assert expert._together(inputs) is None
        expert(inputs)
    expert.w1.weight.requires_grad_()
    expert(inputs).sum().backward()
    assert expert.w1.weight.grad.any()


def test_a_16_bit_model_runs_by_them_and_stays_what_it_was(tmp_path):
    config = tiny_moe_config(tie_word_embeddings=True, dtype="bfloat16")
    made = SkyworkMoeForCausalLM(config).bfloat16().eval()
    made.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    linears = [module for module in loaded.modules() if isinstance(module, torch.nn.Linear)]
    assert {type(linear) for linear in linears} == {SkyworkLinear}
    assert type(loaded.model.layers[0].block_sparse_moe.experts[0]) is SkyworkCpuExpert
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
    assert list(loaded.state_dict()) == list(made.state_dict())
    ids = tokens(1, 3)
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, made(ids).logits, rtol=0.05, atol=0.05)
    assert "numba" in str(placement_report(loaded))
    assert placement_report(made.float()).experts  # what is not loaded is as before


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ModuleNotFoundError("No module named 'numba'", name="numba"), "numba is not installed"),
        (ImportError("Numba needs NumPy 2.4 or less"), "numba fails (Numba needs NumPy 2.4 or less)"),
    ],
)
def test_without_numba_torchs_kernels_run_and_one_line_says_so(error, reason, monkeypatch):
    def refuse(name: str, *args: Any) -> Any:
        if name == "cpu_kernels" or (args[2:3] and "cpu_kernels" in (args[2] or ())):
            raise error
        return real_import(name, *args)

    real_import = builtins.__import__
    matmul._numba.cache_clear()
    monkeypatch.setattr(matmul, "_numba_error", [])
    logging.get_logger("x").warning_once.cache_clear()
    with monkeypatch.context() as patch, CaptureLogger(matmul.logger) as said:
        patch.setattr(builtins, "__import__", refuse)
        made = layer("int8", 8, 32)
        use_cpu_kernels(made)
    assert matmul.int8_kernel("cpu", torch.bfloat16, 1, (8, 32), True) == "weight_int8pack_mm"
    inputs = torch.randn(1, 32).bfloat16()
    assert made(inputs).isfinite().all()
    assert said.out.count("skywork-hf[cpu]") == 1
    assert said.out.startswith(reason)
    matmul._numba.cache_clear()


def int8_layer(out_features: int = 6, in_features: int = 40) -> SkyworkInt8Linear:
    layer = SkyworkInt8Linear(in_features, out_features)
    codes, scale = quantize_int8(torch.randn(out_features, in_features))
    layer._parameters["weight"].data, layer.weight_scale.data = codes, scale
    return layer


@torch.no_grad()
def test_a_default_device_is_of_no_matter():
    layer, inputs = int8_layer(), torch.randn(2, 40).bfloat16()
    expected = layer(inputs)
    with torch.device("meta"):
        outputs = layer(inputs), dequantized_linear(inputs.repeat(64, 1), layer.codes, layer.weight_scale)[:2]
    for output in outputs:
        torch.testing.assert_close(output, expected, rtol=2e-2, atol=2e-2)


@torch.no_grad()
def test_a_trace_computes_and_does_not_keep_what_was_there():
    layer = int8_layer()
    traced = torch.jit.trace(layer, torch.randn(1, 40).bfloat16(), check_trace=False)
    inputs = torch.randn(1, 40).bfloat16()
    assert torch.equal(traced(inputs), layer(inputs))


def test_scales_in_any_form():
    inputs = torch.randn(2, 40)
    codes, scale = quantize_fp8(torch.randn(6, 40))
    one = scale.reshape(1).bfloat16()
    torch.testing.assert_close(cpu_kernels.linear(inputs, codes, one), dequantized_linear(inputs, codes, one))
    codes, scale = quantize_int8(torch.randn(6, 40))
    strided = scale.repeat_interleave(2)[::2]
    assert torch.equal(cpu_kernels.linear(inputs, codes, strided), cpu_kernels.linear(inputs, codes, scale))


def test_numba_that_cannot_compile_is_one_line_too(monkeypatch):
    def fail(dtypes: Any) -> None:
        raise ValueError("no such target")

    monkeypatch.setattr(cpu_kernels, "compile_for", fail)
    monkeypatch.setattr(matmul, "_numba_error", [])
    logger = logging.get_logger("skywork_hf.quantization.matmul")
    try:
        with CaptureLogger(logger) as said:
            matmul.ready_cpu_kernels({torch.int8})
        assert "numba fails (no such target)" in said.out
        assert matmul.linear_kernel("cpu", torch.bfloat16, 1) == "linear"
    finally:
        matmul._numba.cache_clear()


def test_what_torch_does_to_functions_works_on_layers():
    linear = SkyworkLinear(40, 6, bias=False, dtype=torch.bfloat16)
    inputs = torch.randn(3, 1, 40).bfloat16()
    with torch.no_grad():
        torch.testing.assert_close(torch.vmap(linear)(inputs), linear(inputs), rtol=2e-2, atol=2e-2)
    layer, trained = int8_layer(), torch.randn(2, 40, requires_grad=True)
    torch.compile(layer, fullgraph=True, backend="aot_eager")(trained).sum().backward()
    real_weight = layer.dequantize()
    torch.testing.assert_close(trained.grad, real_weight.sum(dim=0).expand(2, -1), rtol=2e-2, atol=2e-2)
