"""The Triton kernels against float64: on a GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_moe_config
from torch import nn

pytest.importorskip("triton")

from skywork_hf.modeling_skywork_moe import SkyworkMoeGate
from skywork_hf.quantization import cards, formats, gpu_kernels, triton_blocks, triton_kernels

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROOT = Path(__file__).parent.parent
KINDS = ("int8", "fp8", "fp8 by bits", "plain")
DTYPES = (torch.bfloat16, torch.float16)
quick = settings(max_examples=12, deadline=None)
kinds, dtypes, tokens = st.sampled_from(KINDS), st.sampled_from(DTYPES), st.integers(1, 16)


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def stored(kind: str, weight: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A weight as a kind stores it, and its scale."""
    if kind == "plain":
        return weight.to(dtype), None
    return formats.quantize_int8(weight) if kind == "int8" else formats.quantize_fp8(weight)


def real(weight: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    return weight.double() if scale is None else formats.dequantize(weight, scale, torch.float32).double()


def as_on_cards_of(kind: str) -> pytest.MonkeyPatch:
    """A patch under which FP8 is read by the card's instruction, or by bits."""
    patch = pytest.MonkeyPatch()
    if DEVICE.type == "cpu":
        patch.setattr(triton_kernels, "capability", lambda device: (8, 9) if kind == "fp8" else (8, 0))
    return patch


def rounding(dtype: torch.dtype, *magnitudes: torch.Tensor) -> torch.Tensor:
    """The largest error of rounding numbers of these magnitudes to nearest, and of float32 on the way."""
    relative, least = torch.finfo(dtype).eps / 2 + 1e-5, torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    return sum(relative * magnitude.abs() + least for magnitude in magnitudes)


@given(kind=kinds, dtype=dtypes, tokens=tokens, features=st.integers(1, 70), width=st.integers(1, 70))
@quick
def test_a_linear_is_rounded_once(kind, dtype, tokens, features, width):
    weight, scale = stored(kind, torch.randn(features, width, device=DEVICE), dtype)
    inputs = torch.randn(tokens, width, device=DEVICE).to(dtype)
    with as_on_cards_of(kind).context():
        outputs = triton_kernels.linear(inputs, weight, scale)
    expected = inputs.double() @ real(weight, scale).t()
    summed = inputs.double().abs() @ real(weight, scale).abs().t()
    assert outputs.dtype == dtype
    assert ((outputs.double() - expected).abs() <= rounding(dtype, expected) + 1e-6 * summed).all()


class Layer:
    """Random experts of one kind, spread over devices, and tokens that chose some of them."""

    def __init__(self, kind, dtype, tokens, experts, top_k, hidden, intermediate, devices):
        shapes = ((intermediate, hidden), (intermediate, hidden), (hidden, intermediate))
        self.weights = [
            [stored(kind, torch.randn(shape, device=DEVICE) / shape[1] ** 0.5, dtype) for shape in shapes]
            for _ in range(experts)
        ]
        self.inputs = torch.randn(tokens, hidden, device=DEVICE).to(dtype)
        self.index = torch.stack([torch.randperm(experts, device=DEVICE)[:top_k] for _ in range(tokens)])
        self.shares = torch.rand(tokens, top_k, device=DEVICE)
        addresses = torch.tensor([[0 if t is None else t.data_ptr() for w in e for t in w] for e in self.weights])
        place = torch.randint(devices, (experts, 1))
        self.tables = [torch.where(place == device, addresses, 0).to(DEVICE) for device in range(devices)]
        weight, scale = self.weights[0][0]
        self.facts = (intermediate, weight.dtype, weight.dtype if scale is None else scale.dtype, False)

    def partial_sums(self, inputs: torch.Tensor | None = None) -> list[torch.Tensor]:
        inputs = self.inputs if inputs is None else inputs
        is_partial = len(self.tables) > 1
        arguments = (inputs, self.index, self.shares)
        return [triton_kernels.experts(*arguments, table, *self.facts, is_partial) for table in self.tables]

    def expected(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The outputs, and the sums of magnitudes of what they were added up from."""
        outputs = torch.zeros(self.inputs.shape, dtype=torch.float64, device=DEVICE)
        magnitudes = torch.zeros_like(outputs)
        for token, (chosen, shares) in enumerate(zip(self.index.tolist(), self.shares.double(), strict=True)):
            for expert, share in zip(chosen, shares, strict=True):
                w1, w3, w2 = (real(*weight) for weight in self.weights[expert])
                x = self.inputs[token].double()
                hidden = F.silu(w1 @ x) * (w3 @ x)
                outputs[token] += share * (w2 @ hidden)
                magnitudes[token] += share * (w2.abs() @ hidden.abs())
        return outputs, magnitudes


@given(
    kind=kinds,
    dtype=dtypes,
    tokens=tokens,
    experts=st.integers(1, 6),
    top_k=st.integers(1, 3),
    hidden=st.integers(1, 40),
    intermediate=st.integers(1, 40),
    devices=st.integers(1, 3),
)
@quick
def test_partial_sums_of_experts_add_up(kind, dtype, tokens, experts, top_k, hidden, intermediate, devices):
    layer = Layer(kind, dtype, tokens, experts, min(top_k, experts), hidden, intermediate, devices)
    with as_on_cards_of(kind).context():
        parts = layer.partial_sums()
    assert {part.dtype for part in parts} == {torch.float32 if devices > 1 else dtype}
    expected, magnitudes = layer.expected()
    outputs = sum(part.double() for part in parts).to(dtype)
    # What is hidden is rounded too, as the input of the last matrix.
    assert ((outputs.double() - expected).abs() <= rounding(dtype, expected, 1.1 * magnitudes)).all()


@pytest.mark.parametrize("tokens", [2, 16])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_error_is_no_larger_than_the_reference_paths(kind, dtype, tokens):
    layer = Layer(kind, dtype, tokens, 4, 2, 64, 80, 1)
    with as_on_cards_of(kind).context():
        (outputs,) = layer.partial_sums()
    reference = torch.zeros_like(layer.inputs, dtype=torch.float32)
    for place, expert in enumerate(layer.index.t()):
        for token, number in enumerate(expert.tolist()):
            w1, w3, w2 = (
                weight if scale is None else formats.dequantize(weight, scale, dtype)
                for weight, scale in layer.weights[number]
            )
            x = layer.inputs[token]
            reference[token] += layer.shares[token, place] * (w2 @ (F.silu(w1 @ x) * (w3 @ x))).float()
    expected, _ = layer.expected()
    assert (outputs.double() - expected).norm() <= (reference.to(dtype).double() - expected).norm()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("tokens", [3, 7])  # each by itself, and together
def test_what_is_not_finite_stays_with_its_token(tokens, value):
    layer = Layer("int8", torch.bfloat16, tokens, 4, 2, 24, 40, 1)
    (finite,) = layer.partial_sums()
    inputs = layer.inputs.clone()
    inputs[1, 5] = value
    (outputs,) = layer.partial_sums(inputs)
    others = torch.arange(tokens) != 1
    assert outputs[1].isnan().all() or not outputs[1].isfinite().any()
    assert torch.equal(outputs[others], finite[others])
    weight, scale = layer.weights[0][0]
    linear = triton_kernels.linear(inputs, weight, scale)
    assert torch.equal(linear[others], triton_kernels.linear(layer.inputs, weight, scale)[others])
    expected = inputs[1].double() @ real(weight, scale).t()
    assert torch.equal(linear[1].isfinite(), expected.isfinite())


def test_no_token():
    layer = Layer("int8", torch.bfloat16, 1, 2, 1, 8, 8, 1)
    empty = layer.inputs[:0]
    assert triton_kernels.experts(
        empty, layer.index[:0], layer.shares[:0], layer.tables[0], *layer.facts, False
    ).shape == (0, 8)
    assert triton_kernels.linear(empty, *layer.weights[0][0]).shape == (0, 8)


@given(
    tokens=st.integers(1, 20),
    experts=st.integers(2, 20),
    top_k=st.integers(1, 4),
    width=st.integers(1, 35).map(lambda half: 2 * half),
    std=st.sampled_from([None, 1.0, 2.5]),
)
@quick
def test_the_gate_is_the_models(tokens, experts, top_k, width, std):
    config = tiny_moe_config(
        hidden_size=width,
        num_attention_heads=1,
        num_experts=[experts],
        num_experts_per_tok=min(top_k, experts),
        moe_use_logits_norm=std is not None,
        moe_gate_norm_std=std or 1.0,
    )
    layer = SkyworkMoeGate(config)
    nn.init.normal_(layer.weight)
    layer = layer.to(DEVICE, torch.float16)
    rows = torch.randn(tokens, width, device=DEVICE).half()
    logits, weights, index = triton_kernels.gate(rows, layer.weight, layer.top_k, layer.normalisation)
    torch.testing.assert_close(logits, layer(rows)[0], rtol=2e-3, atol=2e-3)
    # Which of two that are all but equal is chosen may differ: so from the same logits.
    layer.project = lambda _: logits.float()
    _, expected, expected_index = layer(rows)
    torch.testing.assert_close(weights, expected, rtol=1e-4, atol=1e-5)
    chosen = logits.float().gather(1, index), logits.float().gather(1, expected_index)
    assert torch.equal(*chosen)
    assert (index.sort().values.diff() > 0).all()
    again, again_index = triton_kernels.route(logits, layer.top_k, layer.normalisation)
    assert torch.equal(again_index, index)
    torch.testing.assert_close(again, weights)


def test_equal_logits_and_those_that_are_not_finite():
    logits = torch.zeros(4, 6, device=DEVICE)
    logits[1, 4] = float("nan")
    logits[2, 3] = float("inf")
    logits[3] = -float("inf")
    weights, index = triton_kernels.route(logits, 3, 1.0)
    assert weights[0].tolist() == pytest.approx([1 / 3] * 3)
    assert index[0].tolist() == [0, 1, 2]
    plain_weights, plain_index = triton_kernels.route(logits, 3, None)
    assert plain_index[:, 0].tolist() == [0, 4, 3, 0]
    for of_weights, of_index in ((weights, index), (plain_weights, plain_index)):
        assert of_weights[1:].isnan().all()
        assert all(len(set(row)) == 3 and set(row) <= set(range(6)) for row in of_index.tolist())


@given(tokens=st.integers(1, 20), width=st.integers(1, 70), dtype=st.sampled_from([*DTYPES, torch.float32]))
@quick
def test_int8_activations(tokens, width, dtype):
    inputs = torch.randn(tokens, width, device=DEVICE).to(dtype)
    inputs[0] = 0
    codes, scale = triton_kernels.quantize_int8(inputs)
    largest = inputs.float().abs().amax(dim=1, keepdim=True)
    torch.testing.assert_close(scale, (largest / 127).clamp_min(torch.finfo(torch.float32).tiny))
    assert ((codes.float() - inputs.float() / scale).abs() <= 0.5 + 1e-4).all()
    weight, weight_scale = formats.quantize_int8(torch.randn(9, width, device=DEVICE))
    sums = (codes.double() @ weight.double().t()).to(torch.int32)
    outputs = triton_kernels.rescale(sums, scale, weight_scale, dtype)
    expected = codes.double() * scale.double() @ real(weight, weight_scale).t()
    assert outputs.dtype == dtype
    assert ((outputs.double() - expected).abs() <= rounding(dtype, expected)).all()


def test_a_token_with_nan_or_infinity_has_no_finite_scale():
    inputs = torch.randn(3, 40, device=DEVICE)
    inputs[0, 3], inputs[1, 7] = float("nan"), float("inf")
    codes, scale = triton_kernels.quantize_int8(inputs)
    assert scale[0].isnan()
    assert scale[1].isinf()
    assert torch.equal(codes[2], formats.to_int8(inputs[2], scale[2]))


@given(tokens=st.integers(1, 5), width=st.integers(1, 3000), magnitude=st.sampled_from([1e-30, 1e-3, 1.0, 1e4]))
@quick
def test_fp8_activations(tokens, width, magnitude):
    inputs = torch.randn(tokens, width, device=DEVICE) * magnitude
    codes, scale = triton_kernels.quantize_fp8(inputs, None)
    torch.testing.assert_close(scale, formats.fp8_scale(inputs))
    torch.testing.assert_close(codes.float(), formats.to_fp8(inputs, scale).float(), rtol=0.13, atol=2**-9)
    given_scale = torch.tensor([0.01], device=DEVICE, dtype=torch.bfloat16)
    static, same = triton_kernels.quantize_fp8(inputs, given_scale)
    assert same.item() == given_scale.item()
    assert static.float().abs().max() <= 448


def test_every_fp8_value_and_all_between_are_rounded_as_torch_does():
    codes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    between = (codes[1:] + codes[:-1]) / 2  # to the even one
    near = torch.cat([between.nextafter(codes[1:]), between.nextafter(codes[:-1])])
    values = torch.cat([codes, between, near, torch.tensor([1e9, float("inf"), 1e-30])])
    values = torch.cat([values, -values, torch.tensor([float("nan")])]).view(1, -1).to(DEVICE)
    quantized, _ = triton_kernels.quantize_fp8(values, torch.ones((), device=DEVICE))
    expected = values.clamp(-448, 448).to(torch.float8_e4m3fn)
    assert torch.equal(quantized.view(torch.uint8), expected.view(torch.uint8))
    _, scale = triton_kernels.quantize_fp8(values, None)
    assert scale.isnan()


@pytest.mark.parametrize("tokens", [1, 9])
def test_torch_compile_takes_them_whole(tokens):
    layer = Layer("fp8", torch.bfloat16, tokens, 4, 2, 24, 40, 1)
    router = torch.randn(4, 24, device=DEVICE).bfloat16()
    weight, scale = layer.weights[0][0]

    def block(rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        _, shares, index = triton_kernels.gate(rows, router, 2, 1.0)
        outputs = triton_kernels.experts(rows, index, shares, layer.tables[0], *layer.facts, False)
        codes, token_scale = triton_kernels.quantize_int8(outputs)
        return outputs, triton_kernels.linear(outputs, weight, scale), codes, token_scale

    compiled = torch.compile(block, fullgraph=True, backend="inductor" if DEVICE.type == "cuda" else "eager")
    for got, expected in zip(compiled(layer.inputs), block(layer.inputs), strict=True):
        torch.testing.assert_close(got, expected)


def test_shapes_and_dtypes_are_known_without_values():
    layer = Layer("int8", torch.bfloat16, 5, 4, 2, 24, 40, 1)
    weight, scale = layer.weights[0][0]
    operators = torch.ops.skywork_hf
    checks = ("test_schema", "test_faketensor")
    experts = (layer.inputs, layer.index, layer.shares, layer.tables[0], *layer.facts, True)
    torch.library.opcheck(operators.experts, experts, test_utils=checks)
    torch.library.opcheck(operators.linear, (layer.inputs, weight, scale), test_utils=checks)
    torch.library.opcheck(operators.gate, (layer.inputs, torch.randn_like(layer.inputs), 2, 1.0), test_utils=checks)
    torch.library.opcheck(operators.route, (layer.inputs, 2, None), test_utils=checks)
    torch.library.opcheck(operators.quantize_int8, (layer.inputs,), test_utils=checks)
    torch.library.opcheck(operators.quantize_fp8, (layer.inputs, None), test_utils=checks)


def test_block_sizes_of_an_unknown_card_are_measured_once(tmp_path, monkeypatch):
    fastest = {True: triton_blocks.CANDIDATES[True][2], False: triton_blocks.CANDIDATES[False][1]}
    device, ran = torch.device("cuda", 7), []

    def seconds(run):
        run()
        is_alone, blocks = ran[-1]
        return 3.0 - blocks.count(fastest[is_alone])

    def run(is_alone):
        ran.append((is_alone, [triton_blocks.blocks_of(name, is_alone, device) for name in ("gate_up", "down")]))

    monkeypatch.setattr(triton_blocks, "do_bench", seconds)
    monkeypatch.setattr(triton_blocks.triton.knobs.cache, "dir", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA New")
    for broken in ("", "[1]", '{"NVIDIA New": 3}'):
        triton_blocks._blocks_on.cache_clear()
        (tmp_path / "skywork_hf_blocks.json").write_text(broken)
        assert triton_blocks.blocks_of("down", True, device) == triton_blocks.CANDIDATES[True][0]
        ran.clear()
        triton_blocks.tune(device, run)
        assert ran
        assert [triton_blocks.blocks_of(*kind, device) for kind in triton_blocks.KINDS] == [
            fastest[is_alone] for _, is_alone in triton_blocks.KINDS
        ]
    triton_blocks._blocks_on.cache_clear()
    ran.clear()
    triton_blocks.tune(device, run)
    assert not ran
    assert triton_blocks.blocks_of("gate_up", False, device) == fastest[False]
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    triton_blocks._blocks_on.cache_clear()
    triton_blocks.tune(device, run)
    assert not ran
    triton_blocks._blocks_on.cache_clear()


BUILT = """
import sys
sys.path.insert(0, "scripts")
import build_triton_kernels as script
kernel, args, options = list(script.launches(86))[1]
script.launches = lambda _: [(kernel, args, options), (kernel, args, {**options, "IS_ALIGNED": False})]
print(script.problems(86))
"""

# With a driver that is none: of a card, only its name and what it can do are asked for.
TRACED = """
import re
import torch
import triton
from torch._functorch.aot_autograd import aot_export_joint_simple
from torch._subclasses import FakeTensorMode
from triton.backends.compiler import GPUTarget

from skywork_hf.quantization import triton_kernels

class Driver:
    def get_current_target(self):
        return GPUTarget("cuda", 86, 32)

def block(rows, router, table, weight, scale):
    _, shares, index = triton_kernels.gate(rows, router, 2, 1.0)
    facts = (48, torch.float8_e4m3fn, torch.float32, True, False)
    outputs = triton_kernels.experts(rows, index, shares, table, *facts)
    return triton_kernels.linear(outputs, weight, scale), *triton_kernels.quantize_fp8(outputs, None)

triton.runtime.driver.set_active(Driver())
torch.cuda.get_device_capability = lambda device: (8, 6)
torch.cuda.get_device_name = lambda device: "RTX 3090"
for tokens in (1, 9):
    with FakeTensorMode(), torch.no_grad(), torch.device("cuda"):
        rows, router = torch.empty(tokens, 32, dtype=torch.bfloat16), torch.empty(4, 32, dtype=torch.bfloat16)
        table, weight = torch.empty(4, 6, dtype=torch.int64), torch.empty(32, 32, dtype=torch.float8_e4m3fn)
        inputs = (rows, router, table, weight, torch.empty(()))
        graph = aot_export_joint_simple(block, inputs, trace_joint=False)
    print(re.findall(r"tensors_to_clone = \\[(.*?)\\]", graph.code))
"""


def printed(program: str) -> str:
    """What another Python prints, in which kernels are compiled and not interpreted."""
    paths = os.pathsep.join([str(ROOT / "src"), *sys.path])
    environment = {**os.environ, "PYTHONPATH": paths, "TRITON_INTERPRET": "0"}
    arguments = [sys.executable, "-c", program]
    run = subprocess.run(arguments, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_building_without_a_card_notices_narrow_reads():
    pytest.importorskip("triton.backends.nvidia")
    output = printed(BUILT)
    assert output.count("reads weights in pieces of less than 16 bytes") == 1, output
    assert "2 kernels" in output


def test_torch_compile_sees_each_launch_and_what_it_writes():
    pytest.importorskip("triton.backends.nvidia")
    written = ("logits top_k_weights top_k_index", "hidden", "outputs", "outputs", "largest", "codes scale")
    for line in printed(TRACED).splitlines():
        assert tuple(names.replace("'", "").replace(",", "") for names in ast.literal_eval(line)) == written


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"get_device_capability": (6, 1)}, "Tesla P40 has compute capability 6.1, and the kernels need 7.5"),
        ({"hip": "6.0"}, "is not NVIDIA's"),
        ({"linear": RuntimeError("ptxas\n is of another time")}, "(ptxas is of another time)"),
        ({"import": ModuleNotFoundError("No module named 'triton'", name="triton")}, "pip install triton"),
    ],
)
def test_a_gpu_without_the_kernels_runs_the_reference_path_and_says_why(changes, reason, monkeypatch):
    def fail(error):
        raise error

    assert not gpu_kernels.has_triton(torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    cards.capability.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla P40")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda d: changes.get("get_device_capability", (8, 6)))
    monkeypatch.setattr(torch.version, "hip", changes.get("hip"))
    monkeypatch.setattr(torch, "ones", lambda *shape, **_: torch.zeros(shape))
    if "linear" in changes:
        monkeypatch.setattr(triton_kernels, "linear", lambda *_: fail(changes["linear"]))
    if "import" in changes:
        monkeypatch.setattr(gpu_kernels, "_check_card", lambda _: fail(changes["import"]))
    gpu_kernels.has_triton.cache_clear()
    said = []
    monkeypatch.setattr(gpu_kernels.logger, "warning_once", said.append)
    for _ in range(2):
        assert not gpu_kernels.has_triton(torch.device("cuda", 3))
    (sentence,) = said
    assert "The Triton kernels do not run on cuda:3" in sentence
    assert reason in sentence
    gpu_kernels.has_triton.cache_clear()
    cards.capability.cache_clear()
