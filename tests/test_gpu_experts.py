"""Models on GPUs that run the Triton kernels: simulated GPUs, and kernels in Triton's interpreter."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from simulated_device import SimulatedDevices
from test_placement_dispatch import expert_map
from tiny import checkpoint, golden, tiny_moe_config
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("kernels are compiled there, and simulated GPUs have none", allow_module_level=True)

from skywork_hf import SkyworkFp8Config, SkyworkInt8Config, SkyworkMoeForCausalLM, placement_report
from skywork_hf.compat import CACHE
from skywork_hf.modeling_skywork_moe import SkyworkMoeBlock, SkyworkMoeExperts
from skywork_hf.quantization import expert_table, formats, gpu_kernels, triton_kernels
from skywork_hf.quantization.expert_table import ExpertTables
from skywork_hf.quantization.experts import use_gpu_kernels
from skywork_hf.quantization.linear import SkyworkFp8Linear, SkyworkInt8Linear

GPUS = [f"lazy:{index}" for index in range(4)]
CONFIGS = {"int8": SkyworkInt8Config(), "fp8": SkyworkFp8Config("none"), "plain": None}
SHAPE = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1, "vocab_size": 67}
# How many kernels an operator of ours launches; of all others it is one.
LAUNCHES = {"skywork_hf::experts": 2}


@pytest.fixture(autouse=True)
def simulated(monkeypatch):
    """Simulated GPUs that run the kernels."""
    monkeypatch.setattr(gpu_kernels, "has_triton", lambda device: device.type == "lazy")
    monkeypatch.setattr(gpu_kernels, "kernels", triton_kernels)
    with SimulatedDevices() as devices, torch.no_grad():
        yield devices


class Launches(TorchDispatchMode):
    """Counts what is launched, and the bytes that kernels of ours read and write beside chosen experts' weights."""

    def __init__(self) -> None:
        super().__init__()
        self.by_name: Counter[str] = Counter()
        self.nbytes = 0

    @property
    def total(self) -> int:
        return sum(self.by_name.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            with self:
                return func.decompose(*args, **(kwargs or {}))
        outputs = func(*args, **(kwargs or {}))
        if not func.is_view and not func.name().startswith("aten::empty"):
            self.by_name[func.name()] += LAUNCHES.get(func.name(), 1)
        if func.name().startswith("skywork_hf"):
            given = outputs if isinstance(outputs, tuple) else (outputs,)
            self.nbytes += sum(tensor.nbytes for tensor in (*args, *given) if isinstance(tensor, torch.Tensor))
        return outputs


@pytest.fixture
def no_kernels(monkeypatch):
    """Launches are counted, and compute nothing."""
    monkeypatch.setattr(triton_kernels, "_launch", lambda *args, **options: None)
    monkeypatch.setattr(gpu_kernels, "difference", lambda *args: None)


def saved(folder, **changes):
    torch.manual_seed(0)
    config = tiny_moe_config(**{**SHAPE, **changes})
    SkyworkMoeForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def load(folder: Any, kind: str, devices: list[str], experts: int = 4) -> Any:
    """A model whose experts are dealt to devices in turn; all else is on the first."""
    layers = SHAPE["num_hidden_layers"] if "skywork-moe-tiny" not in str(folder) else 2
    row = [devices[number % len(devices)] for number in range(experts)]
    return AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.bfloat16,
        device_map=expert_map([devices[0]] * layers, [row] * layers) if len(devices) > 1 else devices[0],
        quantization_config=CONFIGS[kind],
    )


def block_of(model: Any) -> SkyworkMoeBlock:
    return model.model.layers[0].block_sparse_moe


def rows_for(model: Any, tokens: int) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(tokens, 1, model.config.hidden_size).bfloat16().to(GPUS[0])


def assert_close(outputs: torch.Tensor, expected: torch.Tensor, share: float = 0.02) -> None:
    """Within a share of the size of what is expected."""
    assert outputs.dtype == expected.dtype
    assert (outputs.cpu().float() - expected.cpu().float()).norm() <= share * expected.cpu().float().norm()


@pytest.mark.usefixtures("no_kernels")
@pytest.mark.parametrize("devices", [1, 2, 3])
@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_launches_bytes_and_waits_of_a_layer(kind, devices, simulated, tmp_path):
    model = load(saved(tmp_path), kind, GPUS[:devices])
    layer, block = model.model.layers[0], block_of(model)
    cache = getattr(model(torch.tensor([[5]]).to(GPUS[0])), CACHE)
    states = rows_for(model, 1)
    positions = model.model.rotary_emb(states, torch.ones(1, 1, dtype=torch.int64).to(GPUS[0]))
    simulated.reset()
    with Launches() as launched:
        block(states)
    assert launched.total <= 10 + 5 * (devices - 1)
    with Launches() as launched:
        layer(states, position_embeddings=positions, **{CACHE: cache})
    assert launched.total <= 55 + 5 * (devices - 1)
    assert simulated.host_syncs == 0
    one = sum(parameter.nbytes for parameter in block.experts[0].parameters())
    others = sum(p.nbytes for part in (layer.self_attn, block.gate) for p in part.parameters())
    read = launched.nbytes + model.config.num_experts_per_tok * one
    assert read <= 1.05 * (model.config.num_experts_per_tok * one + others)


@pytest.mark.usefixtures("no_kernels")
@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_launches_of_a_batch(kind, simulated, tmp_path):
    model = load(saved(tmp_path), kind, GPUS[:1])
    cache = getattr(model(torch.full((8, 1), 5).to(GPUS[0])), CACHE)
    states = rows_for(model, 8)
    positions = model.model.rotary_emb(states, torch.ones(8, 1, dtype=torch.int64).to(GPUS[0]))
    simulated.reset()
    with Launches() as launched:
        model.model.layers[0](states, position_embeddings=positions, **{CACHE: cache})
    assert launched.total <= 65
    assert simulated.host_syncs == 0


@pytest.mark.parametrize(
    "devices", [GPUS[:1], GPUS[:2], GPUS, [GPUS[0], "cpu"], [GPUS[0], GPUS[1], "cpu", "disk"]], ids="+".join
)
@pytest.mark.parametrize("kind", ["int8", "fp8", "plain"])
@pytest.mark.parametrize("tokens", [1, 5])
def test_experts_anywhere_are_the_reference_path_s(kind, devices, tokens, simulated, tmp_path):
    folder = saved(tmp_path, hidden_size=32, intermediate_size=48)
    if "disk" in devices and kind != "plain":  # what is quantised while it loads cannot be there
        folder = tmp_path / kind
        load(tmp_path, kind, ["cpu"]).save_pretrained(folder)
    model = load(folder, kind if folder == tmp_path else "plain", devices)
    states, block = rows_for(model, tokens), block_of(model)
    simulated.reset()
    outputs = block(states)
    assert simulated.host_syncs == ("cpu" in devices)
    assert block.experts.tables.refusal is None
    block.experts.tables.refusal = "for the comparison"
    block.gate.has_triton = False
    assert_close(outputs, block(states))


def test_golden_logits_on_simulated_gpus(simulated):
    """Some tokens at a time, as the kernels take them."""
    rows = golden("skywork-moe-tiny")
    is_there = rows["attention_mask"][0].bool()
    ids, expected = rows["input_ids"][:1, is_there][:, :8], rows["logits"][0, is_there][:8]
    folder = checkpoint("skywork-moe-tiny")
    places = expert_map([GPUS[0]] * 2, [[GPUS[number % 3] for number in range(16)]] * 2)
    errors = []
    for is_reference in (False, True):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16, device_map=places)
        if is_reference:
            for experts in (module for module in model.modules() if isinstance(module, SkyworkMoeExperts)):
                assert experts.tables.refusal is None
                experts.tables.refusal = "for the comparison"
        logits, past = [], {}
        for part in ids.split([1, 2, 5], dim=1):
            outputs = model(part.to(GPUS[0]), **past)
            past = {CACHE: getattr(outputs, CACHE)}
            logits.append(outputs.logits.float().cpu()[0])
        errors.append((torch.cat(logits) - expected).norm() / expected.norm())
    print(errors)
    assert errors[0] <= max(1.5 * errors[1], 5e-3)


def layer_of(kind: str, dtype: torch.dtype = torch.bfloat16) -> SkyworkMoeExperts:
    """Random experts as a loaded model has them."""
    layer = SkyworkMoeExperts(tiny_moe_config()).to(dtype)
    for expert in layer if kind != "plain" else []:
        for name in ("w1", "w2", "w3"):
            linear = getattr(expert, name)
            made = (SkyworkInt8Linear if kind == "int8" else SkyworkFp8Linear)(linear.in_features, linear.out_features)
            quantize = formats.quantize_int8 if kind == "int8" else formats.quantize_fp8
            made._parameters["weight"].data, made.weight_scale.data = quantize(linear.weight.data)
            setattr(expert, name, made)
    return layer.eval().to(GPUS[0])


def routed(tokens: int = 3, dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    index = torch.stack([torch.randperm(4)[:2] for _ in range(tokens)])
    rows = torch.randn(tokens, 32).to(dtype), index, torch.rand(tokens, 2)
    return tuple(tensor.to(GPUS[0]) for tensor in rows)


@pytest.mark.parametrize("kind", ["int8", "fp8", "plain"])
def test_a_table_computes_what_the_experts_do_wherever_their_weights_went(kind):
    layer = layer_of(kind)
    tables = ExpertTables(layer)
    arguments = routed()

    def check() -> torch.Tensor:
        assert tables.takes(arguments[0]), tables.refusal
        assert_close(tables(*arguments), layer(*arguments))
        return tables.addresses[torch.device(GPUS[0])]

    first = check()
    assert check() is first
    for module in layer[1].modules():  # moved
        for name, parameter in module._parameters.items():
            module._parameters[name] = None if parameter is None else nn.Parameter(parameter.clone(), False)
    assert check() is not first
    other = layer_of(kind)
    layer[2].w1._parameters["weight"] = other[2].w1._parameters["weight"]  # replaced, as accelerate does
    if kind != "plain":
        layer[2].w1.weight_scale = other[2].w1.weight_scale
    layer[3].w2 = other[3].w2
    check()
    layer[0] = other[0]
    check()
    copied = copy.deepcopy(layer)
    tables, layer = ExpertTables(copied), copied
    check()
    layer[1].to("cpu")
    assert tables.takes(arguments[0])
    assert tables.on_cpu == {1}
    assert not tables.is_on_one_gpu
    layer[1].to("meta")
    assert not tables.takes(arguments[0])
    assert "accelerate" in tables.refusal


def test_the_rest_is_for_the_reference_path():
    tables = ExpertTables(layer_of("int8"))
    rows, _, _ = routed()
    assert tables.takes(rows)
    assert tables.takes(rows.half())
    assert not tables.takes(rows.float())
    assert not tables.takes(rows.repeat(6, 1))  # 18
    assert not tables.takes(rows[:0])
    assert not tables.takes(rows.cpu())
    with torch.enable_grad():
        assert not tables.takes(rows)
    assert not ExpertTables(layer_of("plain", torch.float16)).takes(rows)


def test_what_the_kernels_do_not_know_is_refused_in_a_sentence_and_taken_when_it_is_gone():
    layer = layer_of("int8")
    tables = ExpertTables(layer)
    rows, _, _ = routed()
    expert, kept = layer[1], layer[1].w1
    for module in (expert, expert.w2):
        handle = module.register_forward_hook(lambda *_: None)
        assert not tables.takes(rows)
        assert "hook" in tables.refusal
        handle.remove()
        assert tables.takes(rows)
    expert.forward = expert.forward  # as accelerate does
    assert not tables.takes(rows)
    del expert.forward
    expert.w1 = nn.Sequential(kept)  # as PEFT does
    assert not tables.takes(rows)
    assert "w1 of expert 1 is a Sequential" in tables.refusal
    expert.w1 = nn.Linear(32, 48, bias=False, dtype=torch.bfloat16).to(GPUS[0])
    assert not tables.takes(rows)
    assert "dtype" in tables.refusal
    expert.w1 = kept
    weight = kept._parameters.pop("weight")  # as prune and parametrizations do
    assert not tables.takes(rows)
    assert "no weight of its own" in tables.refusal
    kept._parameters["weight"] = weight
    assert tables.takes(rows)
    expert.act_fn = nn.GELU()
    assert "silu" in ExpertTables(layer).refusal


@pytest.mark.parametrize("kind", ["int8", "fp8", "plain"])
def test_kernels_are_compared_with_the_reference_once(kind, monkeypatch):
    said = []
    monkeypatch.setattr(gpu_kernels.logger, "warning_once", said.append)
    monkeypatch.setattr(gpu_kernels, "_differences", {})
    assert ExpertTables(layer_of(kind)).refusal is None
    right, called = triton_kernels.experts, []
    monkeypatch.setattr(triton_kernels, "experts", lambda *args: called.append(args) or 2 * right(*args))
    ExpertTables(layer_of(kind))
    assert not called
    gpu_kernels._differences.clear()
    for _ in range(2):
        tables = ExpertTables(layer_of(kind))
        assert "differs by 1 of its size" in tables.refusal
        assert not tables.takes(routed()[0])
    assert len(called) == 1
    (sentence,) = said
    assert "differs by 1 of its size" in sentence


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_many_rows_are_quantised_and_rescaled_in_one_launch_each(kind, monkeypatch):
    from skywork_hf.quantization import matmul

    linear = layer_of(kind)[0].w1
    rows = torch.randn(32, 32).bfloat16().to(GPUS[0])
    expected = linear(rows)
    monkeypatch.setattr(matmul, "has_fast_int_mm", lambda *_: True)
    monkeypatch.setattr(matmul, "has_fp8_unit", lambda _: True)
    with Launches() as launched:
        outputs = linear(rows)
    names = ("quantize_int8", "rescale") if kind == "int8" else ("quantize_fp8",)
    assert launched.by_name.keys() >= {f"skywork_hf::{name}" for name in names}
    assert launched.total == len(names) + 1
    assert_close(outputs, expected, 0.06)


def test_what_runs_is_reported(tmp_path):
    folder = saved(tmp_path, hidden_size=32, intermediate_size=48)
    model = load(folder, "int8", [GPUS[0], GPUS[1], "cpu"])
    report = placement_report(model)
    assert {kernel for device in GPUS[:2] for _, kernel in report.experts[device]} == {"triton"}
    assert "one by one" not in str(report)
    block_of(model).experts[0].act_fn = nn.GELU()
    block_of(model).experts.read_tables()
    assert "experts of 1 layers run one by one on GPUs: expert 0 has another activation" in str(
        placement_report(model)
    )


def test_a_model_of_one_gpu_says_that_it_compiles_whole(tmp_path):
    folder = saved(tmp_path, hidden_size=32, intermediate_size=48)
    assert load(folder, "int8", GPUS[:1])._can_compile_fullgraph
    assert not load(folder, "int8", GPUS[:2])._can_compile_fullgraph
    assert not load(folder, "int8", ["cpu"])._can_compile_fullgraph
    assert load(folder, "int8", GPUS[:1]).hf_quantizer.is_compileable


def test_gate_and_experts_compile_whole(simulated, monkeypatch):
    """On the CPU for once, as what is compiled cannot be simulated."""
    simulated.__exit__(None, None, None)
    try:
        monkeypatch.setattr(expert_table, "HOST", "none")
        monkeypatch.setattr(gpu_kernels, "has_triton", lambda device: device.type == "cpu")
        model = SkyworkMoeForCausalLM(tiny_moe_config(pad_token_id=0)).to(torch.bfloat16).eval()
        use_gpu_kernels(model)
        assert model._can_compile_fullgraph
        states = torch.randn(1, 3, 32).bfloat16()
        block = block_of(model)
        compiled = torch.compile(block, fullgraph=True, backend="eager")
        assert_close(compiled(states), block(states))
        tables = copy.deepcopy(block).experts.tables
        assert "copied" in tables.refusal  # a compiled copy would read the weights of the original
        assert tables.takes(states[0])
        torch._dynamo.reset()
        adapted = torch.compile(block, backend="eager")
        adapted(states)
        for expert in block.experts:
            expert.w2 = nn.Sequential(expert.w2, nn.Threshold(1e9, 0.0))  # as an adapter, here one that gives zeros
        assert not adapted(states).any()
    finally:
        simulated.__enter__()
