"""The CPU kernels, against float64 arithmetic on the same values, and wherever they may be called."""

from __future__ import annotations

import multiprocessing
import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st

from skywork_hf.quantization import cpu_kernels
from skywork_hf.quantization.formats import FP8, quantize_fp8, quantize_int8, unpack
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


@pytest.mark.parametrize("kind", KINDS)
def test_threads_compute_what_one_does(kind, two_threads):
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


def _in_a_child(results: multiprocessing.Queue) -> None:
    results.put(torch.equal(*experts_work("int8")))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_computes_with_a_pool_of_its_own(two_threads):
    assert torch.equal(*experts_work("int8"))  # so that there are threads, which the child has not
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    child = context.Process(target=_in_a_child, args=(results,))
    child.start()
    try:
        assert results.get(timeout=60)
    finally:
        child.kill()
        child.join()


def test_where_nothing_can_be_cached_kernels_are_compiled_all_the_same(monkeypatch):
    njit, asked = cpu_kernels.njit, []

    def without_cache(*args, cache=False, **options):
        asked.append(cache)
        if cache:
            raise RuntimeError("cannot cache function '_int8_kernel': no locator available for file")
        return njit(*args, **options)

    monkeypatch.setattr(cpu_kernels, "njit", without_cache)
    monkeypatch.setattr(cpu_kernels, "_kernels", {})
    monkeypatch.setitem(cpu_kernels._SOURCES, torch.int8, lambda job, waits: waits)  # quick to compile
    kernel = cpu_kernels._compiled(torch.int8)
    assert asked == [True, False]
    assert kernel(torch.zeros(1, dtype=torch.int64).numpy(), True)
