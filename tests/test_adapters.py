"""PEFT's adapters on attention and experts: over every precision, in both layouts, trained, merged and loaded back."""

from __future__ import annotations

import copy
import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from simulated_device import SimulatedDevices
from test_placement_dispatch import GPUS, expert_map
from tiny import LAYOUTS, checkpoint, stir, tiny_dense_config, tiny_moe_config, tokens
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Trainer,
    TrainingArguments,
)
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.integrations.peft import MIN_PEFT_VERSION
from transformers.utils import check_peft_version

from skywork_hf import SkyworkForCausalLM, SkyworkFp8Config, SkyworkInt8Config, SkyworkMoeForCausalLM

peft = pytest.importorskip("peft")
from peft.tuners.tuners_utils import BaseTunerLayer  # noqa: E402

SIZES = {"hidden_size": 64, "intermediate_size": 128}  # 4 bit on a CPU wants multiples of 64
NATIVE = {"fp8": SkyworkFp8Config, "int8": SkyworkInt8Config}
PRECISIONS = ("float32", "bfloat16", *NATIVE, "bnb int8", "bnb nf4")
EXPERTS = ["w1", "w2", "w3"]
TARGETS = {
    "modular": {"target_modules": ["q_proj", *EXPERTS]},
    "fused": {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
}
ADAPTERS = {
    "lora": lambda **options: peft.LoraConfig(r=4, target_modules=["q_proj", *EXPERTS], **options),
    "rslora": lambda **options: peft.LoraConfig(r=4, target_modules=["q_proj", *EXPERTS], use_rslora=True, **options),
    "dora": lambda **options: peft.LoraConfig(r=4, target_modules=["q_proj", *EXPERTS], use_dora=True, **options),
    "ia3": lambda **options: peft.IA3Config(
        target_modules=["k_proj", "v_proj", "w2"], feedforward_modules=["w2"], **options
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("base")
    SkyworkMoeForCausalLM(tiny_moe_config(**SIZES, moe_2layer_gate=True)).save_pretrained(path)
    return path


def need_transformers_own_adapters() -> None:
    """Skip where transformers asks for a newer PEFT before it deals with adapters itself."""
    try:
        check_peft_version(MIN_PEFT_VERSION)
    except ValueError as too_old:
        pytest.skip(str(too_old))


def load(path: Path, precision: str = "float32", **options: Any) -> Any:
    if precision in NATIVE:
        options["quantization_config"] = NATIVE[precision]()
    elif precision.startswith("bnb"):
        pytest.importorskip("bitsandbytes")
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_8bit=precision == "bnb int8", load_in_4bit=precision == "bnb nf4", bnb_4bit_quant_type="nf4"
        )
    options.setdefault("dtype", torch.bfloat16 if precision == "bfloat16" else torch.float32)
    return SkyworkMoeForCausalLM.from_pretrained(path, **options)


def adapt(model: Any, config: Any) -> Any:
    """With adapters that change something, the same ones in every model."""
    torch.manual_seed(5)
    adapted = peft.get_peft_model(model, config)
    stir(adapted)
    return adapted.eval()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_experts_without_a_token_have_gradients_too(precision, folder):
    """Of zeros: processes that add up theirs have them for the same parameters."""
    adapted = adapt(load(folder, precision), peft.LoraConfig(r=2, target_modules=EXPERTS)).train()
    adapted(tokens(1, 1)).logits.sum().backward()
    gradients = {name: p.grad for name, p in adapted.named_parameters() if p.requires_grad}
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients.values())
    assert any(gradient.any() for gradient in gradients.values())
    assert any(not gradient.any() for gradient in gradients.values())


def adapter_values(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if ".lora_" in name or ".ia3_" in name}


def changed(model: Any, before: dict[str, torch.Tensor]) -> set[str]:
    """The names of what is not as it was; by bytes, as float8 cannot be compared."""

    def raw(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.flatten().view(torch.uint8)

    return {name for name, tensor in model.state_dict().items() if not torch.equal(raw(tensor), raw(before[name]))}


def error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((got.float() - wanted.float()).norm() / wanted.float().norm()).item()


# --- what is adapted


def linears(layers: int = 2, experts: int = 4) -> set[str]:
    names = [f"self_attn.{matrix}_proj" for matrix in "qkvo"]
    names += [f"block_sparse_moe.experts.{expert}.{matrix}" for expert in range(experts) for matrix in EXPERTS]
    return {f"base_model.model.model.layers.{layer}.{name}" for layer in range(layers) for name in names}


def adapted_modules(model: Any) -> set[str]:
    return {name.partition(".lora_A.")[0] for name, _ in model.named_parameters() if ".lora_A." in name}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_all_linear_is_attention_and_experts(precision, folder):
    adapted = peft.get_peft_model(load(folder, precision), peft.LoraConfig(r=2, target_modules="all-linear"))
    assert adapted_modules(adapted) == linears()


def test_default_targets_are_those_of_llama_and_mixtral():
    mappings = {
        name.removeprefix("TRANSFORMERS_MODELS_TO_").removesuffix("_MAPPING"): targets
        for name, targets in vars(peft.utils.constants).items()
        if name.startswith("TRANSFORMERS_MODELS_TO_")
    }
    for targets in mappings.values():
        assert targets.get("skywork") == targets.get("llama")
        assert ("skywork_moe" in targets) == ("llama" in targets)
    assert mappings["LORA_TARGET_MODULES"]["skywork_moe"] == ["q_proj", "v_proj"]
    assert mappings["VERA_TARGET_MODULES"]["skywork_moe"] == ["q_proj", "v_proj"]
    assert mappings["IA3_TARGET_MODULES"]["skywork_moe"] == ["k_proj", "v_proj", "w2"]
    assert mappings["IA3_FEEDFORWARD_MODULES"]["skywork_moe"] == ["w2"]


OTHER_PEFTS = """
import sys
import torch
sys.path[:0] = [sys.argv[1], sys.argv[2]]
from tiny import tiny_moe_config, tokens
from skywork_hf import SkyworkMoeForCausalLM
assert "peft" not in sys.modules
for constants in ("raise OSError('broken')", "TRANSFORMERS_MODELS_TO_OLD_MODULES_MAPPING = None", None):
    if constants is None:
        sys.modules["peft"] = None  # as if it were not there
    else:
        with open(sys.argv[1] + "/peft/utils/constants.py", "w") as file:
            file.write(constants)
        try:
            import peft
        except OSError as error:
            assert str(error) == "broken"
    model = SkyworkMoeForCausalLM(tiny_moe_config())
    model.load_state_dict(model.state_dict())
    assert model(tokens()).logits.isfinite().all()
    model.save_pretrained(sys.argv[1] + "/saved")
    SkyworkMoeForCausalLM.from_pretrained(sys.argv[1] + "/saved")
    for name in [name for name in sys.modules if name.partition(".")[0] == "peft"]:
        del sys.modules[name]
sys.path.remove(sys.argv[1])
import peft
assert peft.get_peft_model(model, peft.LoraConfig()).targeted_module_names
"""


def test_a_peft_that_is_broken_old_or_absent_breaks_nothing(tmp_path):
    """And one that is there afterwards knows our models."""
    (tmp_path / "peft" / "utils").mkdir(parents=True)
    (tmp_path / "peft" / "__init__.py").write_text("from .utils import constants")
    (tmp_path / "peft" / "utils" / "__init__.py").touch()
    command = [sys.executable, "-B", "-c", OTHER_PEFTS, str(tmp_path), str(Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("make", [lambda: peft.LoraConfig(task_type="CAUSAL_LM"), lambda: peft.IA3Config()])
@pytest.mark.parametrize("family", ["dense", "moe"])
def test_a_config_needs_no_targets(make, family):
    dense = family == "dense"
    model: Any = SkyworkForCausalLM(tiny_dense_config()) if dense else SkyworkMoeForCausalLM(tiny_moe_config())
    names = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    adapted = peft.get_peft_model(model, make())
    chosen = set(adapted.active_peft_config.target_modules)
    assert chosen <= names
    assert chosen == (
        {"q_proj", "v_proj"}
        if "LORA" in adapted.active_peft_config.peft_type
        else {"k_proj", "v_proj", "down_proj" if dense else "w2"}
    )
    ids = tokens()
    adapted(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for name, p in adapted.named_parameters() if "self_attn" in name and p.requires_grad)


def test_every_expert_may_have_its_own_rank(folder, tmp_path):
    config = peft.LoraConfig(
        r=2,
        lora_alpha=2,
        target_modules=EXPERTS,
        rank_pattern={r"layers\.1\..*\.experts\.3\.w1": 8, r"experts\.0\.w2": 1},
        alpha_pattern={r"experts\.0\.w2": 6},
    )
    adapted = adapt(load(folder), config)
    experts = adapted.get_base_model().model.layers[1].block_sparse_moe.experts
    assert experts[3].w1.lora_A["default"].weight.shape == (8, 64)
    assert experts[2].w1.lora_A["default"].weight.shape == (2, 64)
    assert (experts[0].w2.r["default"], experts[0].w2.scaling["default"]) == (1, 6)
    first = adapted.get_base_model().model.layers[0].block_sparse_moe.experts
    assert first[3].w1.r["default"] == 2
    adapted.save_pretrained(tmp_path)
    ids = tokens()
    again = peft.PeftModel.from_pretrained(load(folder), tmp_path)
    assert torch.equal(again(ids).logits, adapted(ids).logits)


# --- over quantised weights


@pytest.mark.parametrize("kind", NATIVE)
@pytest.mark.parametrize("how", ["get_peft_model", "add_adapter"])
def test_adapters_begin_as_over_float32(kind, how, folder):
    def initial(model: Any) -> dict[str, torch.Tensor]:
        torch.manual_seed(1)
        config = peft.LoraConfig(r=2, target_modules=["q_proj", "w1"])
        if how == "add_adapter":
            need_transformers_own_adapters()
            model.add_adapter(config)
        else:
            model = peft.get_peft_model(model, config)
        return adapter_values(model)

    got, wanted = initial(load(folder, kind)), initial(load(folder))
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        assert got[name].dtype == torch.float32
        assert torch.equal(got[name], value)


def observed(module: nn.Module) -> list[Any]:
    """The input and output of a module, when it has run; they keep their gradients, that of the input its own."""
    tensors: list[Any] = []

    def keep_input(_: nn.Module, inputs: Any) -> Any:
        tensors.append(inputs[0].clone())
        tensors[0].retain_grad()
        return (tensors[0], *inputs[1:])

    def keep_output(_: nn.Module, __: Any, output: torch.Tensor) -> None:
        tensors.append(output)
        output.retain_grad()

    module.register_forward_pre_hook(keep_input)
    module.register_forward_hook(keep_output)
    return tensors


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_gradients_are_those_of_the_definition(precision, rslora, folder):
    """Given what a layer got and what its outputs' gradient was, no rounding of weights is left to tolerate: every
    quantised weight is dequantised in float32 for the backward pass. Only 16 bit rounds what goes to the inputs, in
    two terms and their sum, with 8 bits of mantissa."""
    rank, alpha = 4, 6
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules="all-linear", use_rslora=rslora)
    adapted = adapt(load(folder, precision), config).train()
    real = load(folder, precision)
    if precision not in ("float32", "bfloat16"):
        real = real.dequantize()
    scaling = alpha / rank**0.5 if rslora else alpha / rank
    paths = ["model.layers.1.self_attn.q_proj", "model.layers.0.block_sparse_moe.experts.2.w2"]
    seen = {path: observed(adapted.get_base_model().get_submodule(path)) for path in paths}
    ids = tokens()
    adapted(input_ids=ids, labels=ids).loss.backward()

    for path in paths:
        x, g, dx = (seen[path][0].detach(), seen[path][1].grad, seen[path][0].grad)
        x, g, dx = (value.float().flatten(0, -2) for value in (x, g, dx))
        layer = adapted.get_base_model().get_submodule(path)
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        weight = real.get_submodule(path).weight.float()
        assert a.dtype == b.dtype == torch.float32
        assert error(b.grad, scaling * g.t() @ (x @ a.t())) < 1e-5
        assert error(a.grad, scaling * (g @ b).t() @ x) < 1e-5
        assert error(dx, g @ (weight + scaling * b @ a)) < (1e-2 if precision == "bfloat16" else 1e-5)


@pytest.mark.parametrize("kind", NATIVE)
@pytest.mark.parametrize("adapter", ["dora", "ia3"])
@torch.no_grad()
def test_adapters_see_the_real_weights(adapter, kind, folder):
    """DoRA by the norm of each row; both by what the whole model gives."""
    ids = tokens()
    config = ADAPTERS[adapter]()
    fresh = peft.get_peft_model(load(folder, kind), config)
    torch.testing.assert_close(fresh(ids).logits, load(folder, kind)(ids).logits)  # they begin by changing nothing
    if adapter == "dora":
        layer = fresh.get_base_model().model.layers[0].block_sparse_moe.experts[1].w1
        norms = layer.get_base_layer().dequantize(torch.float32).weight.norm(dim=1)
        torch.testing.assert_close(layer.lora_magnitude_vector["default"].weight, norms)
    adapted = adapt(load(folder, kind), config)
    real = adapt(load(folder, kind).dequantize(), config)
    change = error(real(ids).logits, load(folder)(ids).logits)
    assert error(adapted(ids).logits, real(ids).logits) < 0.05 < change  # where a kernel rounds the activations


@pytest.mark.parametrize("kind", NATIVE)
@pytest.mark.parametrize("adapter", ADAPTERS)
@torch.no_grad()
def test_merging_into_quantised_weights_is_refused_and_the_way_out_works(adapter, kind, folder):
    adapted = adapt(load(folder, kind), ADAPTERS[adapter]())
    before = {name: tensor.clone() for name, tensor in adapted.state_dict().items()}
    for merge in (adapted.merge_adapter, adapted.merge_and_unload):
        for safe in (False, True):
            with pytest.raises(
                ValueError, match=r"`model\.layers\.0\.self_attn\.\w_proj\.weight` is quantised, .*16 bit"
            ):
                merge(safe_merge=safe)
    assert not changed(adapted, before)

    adapted.get_base_model().dequantize()
    adapted.double()  # so that no CPU's float32 rounding has to be allowed for
    ids = tokens()
    logits = adapted(ids).logits
    torch.testing.assert_close(adapted.merge_and_unload()(ids).logits, logits, atol=1e-5, rtol=1e-5)


def test_merging_past_the_quantised_weights_is_allowed(folder):
    adapted = adapt(load(folder, "int8"), peft.LoraConfig(r=2, target_modules=["lm_head"]))
    ids = tokens()
    logits = adapted(ids).logits
    torch.testing.assert_close(adapted.merge_and_unload()(ids).logits, logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("precision", ["int8", "fp8", "bnb nf4"])
@pytest.mark.parametrize("adapter", ADAPTERS)
@torch.no_grad()
def test_an_adapter_of_a_quantised_base_merges_into_the_plain_one(adapter, precision, folder, tmp_path):
    adapt(load(folder, precision), ADAPTERS[adapter]()).save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(load(folder), tmp_path).double()  # as above
    ids = tokens()
    logits = loaded(ids).logits
    assert error(logits, load(folder)(ids).logits) > 0.05
    torch.testing.assert_close(loaded.merge_and_unload()(ids).logits, logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", NATIVE)
@pytest.mark.parametrize("adapter", ADAPTERS)
@torch.no_grad()
def test_adapters_live_where_their_layer_does(adapter, kind, folder):
    ids = tokens()
    wanted = adapt(load(folder, kind), ADAPTERS[adapter]())(ids).logits
    places = expert_map([GPUS[0], GPUS[1]], [["cpu", GPUS[0], GPUS[1], "cpu"]] * 2)
    with SimulatedDevices():
        placed = adapt(load(folder, kind, device_map=places), ADAPTERS[adapter]())
        for module in placed.modules():
            if isinstance(module, BaseTunerLayer):
                assert {parameter.device for parameter in module.parameters()} == {
                    module.get_base_layer().weight.device
                }
        got = placed(ids.to(GPUS[0])).logits.cpu()
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)


# --- PEFT's preparation for quantised bases


@pytest.mark.parametrize("kind", NATIVE)
def test_preparing_checkpoints_activations_and_leaves_the_weights_as_they_are(kind, folder):
    model = load(folder, kind, dtype=torch.bfloat16)
    before = {name: parameter.dtype for name, parameter in model.named_parameters()}
    model = peft.prepare_model_for_kbit_training(model)
    layers = [module for module in model.modules() if hasattr(module, "gradient_checkpointing")]
    assert all(layer.gradient_checkpointing for layer in layers)
    assert {name: parameter.dtype for name, parameter in model.named_parameters()} == before
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear")).train()
    ids = tokens(8)
    adapted(input_ids=ids, labels=ids).loss.backward()
    trained = {name: parameter for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert all(".lora_" in name and parameter.grad.isfinite().all() for name, parameter in trained.items())


def test_what_was_dequantised_is_prepared_as_any_model(folder):
    model = peft.prepare_model_for_kbit_training(load(folder, "int8", dtype=torch.bfloat16).dequantize())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("kind", NATIVE)
@torch.no_grad()
def test_prepared_bases_run_under_autocast(kind, rows, folder):
    model = peft.prepare_model_for_kbit_training(load(folder, kind, dtype=torch.bfloat16))
    adapted = adapt(model, peft.LoraConfig(r=2, target_modules="all-linear"))
    ids = tokens(1, rows)
    with torch.autocast("cpu", torch.bfloat16):
        logits = adapted(ids).logits
        for name, parameter in adapted.named_parameters():
            if name.endswith("_scale"):  # as PEFT casts the parameters of models that it does not know
                parameter.data = parameter.data.float()
        assert torch.equal(adapted(ids).logits, logits)
        prompt = ids[:, :5]
        assert adapted.generate(input_ids=prompt, max_new_tokens=3, min_new_tokens=3).shape[1] == prompt.shape[1] + 3
    assert logits.isfinite().all()


METHOD_OPTIONS = {
    "ADALORA": {"total_step": 10},
    "BOFT": {"boft_block_size": 4},
    "C3A": {"block_size": 16},
    "FOURIERFT": {"n_frequency": 50},
    "HRA": {"r": 4},
    "IA3": {"feedforward_modules": ["v_proj"]},
    "OFT": {"r": 0, "oft_block_size": 8},
    "SHIRA": {"r": 2},
    "VBLORA": {"num_vectors": 8, "vector_length": 32},
    "WAVEFT": {"n_frequency": 20},
}
# PEFT's methods that compute with the weights, in each release of it that is supported.
READ_WEIGHTS = {"DEFT", "FROD", "HIRA", "HRA", "OSF", "PEANUT", "SHIRA", "DELORA"}


@pytest.mark.parametrize("kind", NATIVE)
@torch.no_grad()
def test_every_method_takes_the_real_values_or_is_refused(kind, folder):
    """What runs gives what it gives over the same values in float32, and goes on so when its merges were refused."""
    ids = tokens()
    quantised = load(folder, kind)
    real = copy.deepcopy(quantised).dequantize()
    took: set[str] = set()
    refused: dict[str, str] = {}
    for method, make in peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING.items():
        options = {"target_modules": ["q_proj", "v_proj"], **METHOD_OPTIONS.get(method.value, {})}
        try:
            wanted = adapt(copy.deepcopy(real), make(**options))(ids).logits
        except Exception:
            continue  # it has no target modules, or needs more than this
        try:
            adapted = adapt(copy.deepcopy(quantised), make(**options))
            logits = adapted(ids).logits
        except (ValueError, TypeError, RuntimeError) as caught:
            refused[method.value] = str(caught)
            continue
        took.add(method.value)
        if method.value != "UNILORA":  # whose adapters' values come from elsewhere than torch's seed
            assert error(logits, wanted) < 0.01, method
        before = {name: tensor.clone() for name, tensor in adapted.state_dict().items()}
        layer = next(module for module in adapted.modules() if isinstance(module, BaseTunerLayer))
        for merge in (adapted.merge_adapter, layer.merge, adapted.merge_and_unload):
            for safe in (False, True):
                with pytest.raises((ValueError, TypeError, RuntimeError, NotImplementedError)):
                    merge(safe_merge=safe)
        assert not changed(adapted, before), method
        assert torch.equal(adapted(ids).logits, logits), method
    assert took >= {"LORA", "IA3", "LOHA", "LOKR", "OFT", "VERA"}
    for method in READ_WEIGHTS & {method.value for method in peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING}:
        assert "is quantised, and" in refused[method], method


def test_codes_are_looked_at_moved_and_saved_but_not_computed_with(folder):
    layer = load(folder, "int8").model.layers[0].self_attn.q_proj
    weight, plain = layer.weight, dict(layer.named_parameters())["weight"]
    assert isinstance(weight, nn.Parameter)
    assert (weight.shape, weight.dtype, weight.device) == (plain.shape, torch.int8, plain.device)
    assert torch.equal(weight, plain)
    computing = [
        lambda: weight + 1,
        lambda: weight.float(),
        lambda: weight.to("cpu", torch.bfloat16),
        lambda: weight.detach()[:1].t() @ plain[:1],
        lambda: torch.cat([weight, plain]),
        lambda: weight.data.copy_(plain),
        lambda: nn.functional.linear(torch.ones(1, 64), weight),
        lambda: setattr(weight, "data", plain.float()),
        lambda: copy.deepcopy(weight),
    ]
    for compute in computing:
        with pytest.raises(
            ValueError, match=r"^`(model\.layers\.0\.self_attn\.q_proj|linear)\.weight` is quantised, and "
        ):
            compute()
    layer.weight = weight  # as accelerate does
    assert {type(value) for value in [*layer.parameters(), *layer._parameters.values()] if value is not None} == {
        nn.Parameter
    }
    assert type(copy.deepcopy(layer).state_dict()["weight"]) is torch.Tensor


def test_a_model_whose_adapters_were_taken_out_is_looked_through_no_more(folder):
    model = load(folder)
    for _ in range(2):
        peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
        assert model.model.layers[0]._forward_pre_hooks
        for each in (copy.deepcopy(model), model):
            del each.peft_config  # as PEFT does in `unload` and `merge_and_unload`
            assert not each.model.layers[0]._forward_pre_hooks


def test_a_quantised_weight_that_is_to_be_trained_is_refused(folder):
    """int8 by torch itself; FP8 counts as a float, and would get no gradient."""
    config = peft.LoraConfig(target_modules=["v_proj"], modules_to_save=["q_proj"])
    adapted = peft.get_peft_model(load(folder, "fp8"), config)
    with pytest.raises(ValueError, match=r"^`model.layers.0.self_attn.q_proj.weight` is quantised, and would stay"):
        adapted(tokens())
    with torch.no_grad():
        adapted(tokens())


def test_adapters_of_a_quantised_base_are_weighted_as_those_of_a_plain_one(folder):
    def combined(model: Any) -> torch.Tensor:
        adapted = adapt(model, peft.LoraConfig(r=2, target_modules=["q_proj", "w1"]))
        adapted.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q_proj", "w1"], init_lora_weights=False))
        adapted.add_weighted_adapter(["default", "other"], [0.5, 2.0], "both", combination_type="svd")
        adapted.set_adapter("both")
        return adapted(ids).logits

    ids = tokens()
    quantised = load(folder, "int8")
    torch.testing.assert_close(combined(quantised), combined(load(folder, "int8").dequantize()), atol=1e-2, rtol=1e-2)


# --- saved, loaded and merged


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_a_lora_of_the_experts_loads_back(layout, folder, tmp_path):
    ids = tokens()
    adapted = adapt(load(folder, experts_layout=layout), peft.LoraConfig(r=4, **TARGETS[layout]))
    adapted.save_pretrained(tmp_path)
    base = load(folder, experts_layout=layout)
    assert error(base(ids).logits, adapted(ids).logits) > 0.05
    loaded = peft.PeftModel.from_pretrained(base, tmp_path)
    torch.testing.assert_close(loaded(ids).logits, adapted(ids).logits)
    base = load(folder, experts_layout=layout)
    base.load_adapter(str(tmp_path))
    torch.testing.assert_close(base(ids).logits, adapted(ids).logits)


def test_only_the_fused_layout_renames_weights():
    converted = {layout: SkyworkMoeForCausalLM(tiny_moe_config(experts_layout=layout)) for layout in LAYOUTS}
    assert get_model_conversion_mapping(converted["modular"], add_legacy=False) == []
    assert len(get_model_conversion_mapping(converted["fused"], add_legacy=False)) == 2


@pytest.mark.parametrize("loader", ["PeftModel", "load_adapter"])
@torch.no_grad()
def test_several_adapters_of_one_model(loader, folder, tmp_path):
    ids = tokens()
    configs = {
        "attention": peft.LoraConfig(r=2, target_modules=["q_proj"]),
        "experts": peft.LoraConfig(r=2, target_modules=["w1", "w2"]),
    }
    wanted = {}
    for name, config in configs.items():
        adapted = adapt(load(folder), config)
        adapted.save_pretrained(tmp_path / name)
        wanted[name] = adapted(ids).logits
    model = load(folder)
    if loader == "PeftModel":
        model = peft.PeftModel.from_pretrained(model, tmp_path / "attention", adapter_name="attention")
    else:
        need_transformers_own_adapters()
        model.load_adapter(str(tmp_path / "attention"), adapter_name="attention")
    model.load_adapter(str(tmp_path / "experts"), adapter_name="experts")
    for name, logits in wanted.items():
        model.set_adapter(name)
        torch.testing.assert_close(model(ids).logits, logits)


LOADERS = {
    "PeftModel": lambda model, path: peft.PeftModel.from_pretrained(model, path),
    "load_adapter": lambda model, path: model.load_adapter(str(path)),
}


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_adapter_of_the_other_layout_is_refused(layout, loader, folder, tmp_path):
    other = next(name for name in LAYOUTS if name != layout)
    adapt(load(folder, experts_layout=layout), peft.LoraConfig(r=2, **TARGETS[layout])).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=rf'experts\.base_layer\.lora_A.* load the model with experts_layout="{layout}"'
    ):
        LOADERS[loader](load(folder, experts_layout=other), tmp_path)


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_adapter_of_experts_alone_is_refused_in_the_other_layout(layout, loader, folder, tmp_path):
    other = next(name for name in LAYOUTS if name != layout)
    targets = {"target_modules": EXPERTS} if layout == "modular" else TARGETS["fused"] | {"target_modules": None}
    adapt(load(folder, experts_layout=layout), peft.LoraConfig(r=2, **targets)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r'not found in the base model|experts_layout="fused"|target_parameters'):
        LOADERS[loader](load(folder, experts_layout=other), tmp_path)


METHODS = {
    "lora": lambda: peft.LoraConfig(r=2, target_modules=["q_proj", *EXPERTS]),
    "ia3": lambda: peft.IA3Config(target_modules=["k_proj", "w2"], feedforward_modules=["w2"]),
    "loha": lambda: peft.LoHaConfig(r=2, target_modules=["q_proj", "w1"]),
    "lokr": lambda: peft.LoKrConfig(r=2, target_modules=["q_proj", "w1"]),
    "oft": lambda: peft.OFTConfig(r=0, oft_block_size=8, target_modules=["q_proj", "w1"]),
}


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize(
    ("trained_on", "loaded_into", "message"),
    [
        (6, 4, r"holds `\S+experts\.4\.w\d\.\S+`, which .* more experts"),
        (4, 6, r"lacks `\S+experts\.4\.w\d\.\S+` and \d+ more .* fewer experts"),
    ],
)
@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_for_another_count_of_experts_is_refused(
    method, trained_on, loaded_into, message, loader, tmp_path
):
    model, other, same = (
        SkyworkMoeForCausalLM(tiny_moe_config(num_experts=[n])) for n in (trained_on, loaded_into, trained_on)
    )
    adapt(model, METHODS[method]()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        LOADERS[loader](other, tmp_path)
    LOADERS[loader](same, tmp_path)


@pytest.mark.parametrize("loader", LOADERS)
def test_an_adapter_of_more_layers_is_refused_as_that(loader, tmp_path):
    model, other = (SkyworkMoeForCausalLM(tiny_moe_config(num_hidden_layers=n)) for n in (3, 2))
    adapt(model, peft.LoraConfig(r=2, target_modules=["q_proj", *EXPERTS])).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"holds `\S+layers\.2\.\S+`, which .* a model with more layers"):
        LOADERS[loader](other, tmp_path)


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("options", [{}, {"target_modules": ["q_proj"], "modules_to_save": ["gate"]}])
def test_an_adapter_of_other_sizes_is_refused_in_a_sentence(options, loader, tmp_path):
    model, other = (SkyworkMoeForCausalLM(tiny_moe_config(hidden_size=n)) for n in (64, 32))
    adapt(model, peft.LoraConfig(r=2, **options)).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"^The adapter holds `\S+` as \[\d+, 64\], and its config .* model's sizes\.$"
    ):
        LOADERS[loader](other, tmp_path)


@pytest.mark.parametrize("loader", LOADERS)
def test_ranks_that_contradict_the_weights_are_refused(loader, folder, tmp_path):
    adapt(load(folder), peft.LoraConfig(r=4, target_modules=["q_proj"])).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"r": 8}))
    with pytest.raises(ValueError, match=r"q_proj\.lora_A\.default\.weight\D+\[4, 64\]\D+\[8, 64\]"):
        LOADERS[loader](load(folder), tmp_path)


SHARED_OR_MADE = {
    "VBLORA": lambda: peft.VBLoRAConfig(target_modules=["q_proj", "w1"], num_vectors=8, vector_length=32),
    "RANDLORA": lambda: peft.RandLoraConfig(target_modules=["q_proj", "w1"]),
    "SHIRA": lambda: peft.ShiraConfig(r=2, target_modules=["q_proj", "w1"]),
    "DORA": lambda: peft.LoraConfig(r=2, target_modules=["q_proj", "w1"], use_dora=True),
}


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("method", SHARED_OR_MADE)
@torch.no_grad()
def test_weights_that_layers_share_or_seeds_make_load_back(method, loader, folder, tmp_path):
    if (method, loader) == ("VBLORA", "load_adapter"):
        pytest.skip("PEFT refuses it")
    ids = tokens()
    adapted = adapt(load(folder), SHARED_OR_MADE[method]())
    adapted.save_pretrained(tmp_path)
    base = load(folder)
    assert error(base(ids).logits, adapted(ids).logits) > 0.05
    LOADERS[loader](base, tmp_path)
    torch.testing.assert_close(base(ids).logits, adapted(ids).logits)


@pytest.mark.parametrize("loader", LOADERS)
def test_weights_of_modules_that_the_config_leaves_out_are_refused_as_that(loader, folder, tmp_path):
    adapt(load(folder), peft.LoraConfig(r=2, target_modules=["q_proj", "w1"])).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"target_modules": ["q_proj"]}))
    way_out = r"\.$" if loader == "PeftModel" else r".*`PeftModel\.from_pretrained`\.$"
    with pytest.raises(
        ValueError, match=rf"holds `\S+w1\.lora_A\S+`, .* config asks for no such weight there{way_out}"
    ):
        LOADERS[loader](load(folder), tmp_path)


@torch.no_grad()
def test_what_is_loaded_in_part_on_purpose_is(folder, tmp_path, caplog):
    adapted = adapt(load(folder), peft.LoraConfig(r=4, target_modules=["q_proj", "w1"], rank_pattern={"w1": 2}))
    adapted.save_pretrained(tmp_path)
    values = peft.get_peft_model_state_dict(adapted)
    part = {name: value + 1 for name, value in values.items() if "layers.0" in name}
    peft.set_peft_model_state_dict(adapted, part)
    values = peft.get_peft_model_state_dict(adapted)
    assert all(torch.equal(values[name], value) for name, value in part.items())
    part = {name: value for name, value in adapted.state_dict().items() if "lora_A" in name}
    assert not adapted.load_state_dict(part, strict=False).unexpected_keys
    with pytest.raises(RuntimeError, match="Missing key"):  # torch's own
        adapted.load_state_dict(part)

    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"rank_pattern": {}}))
    with pytest.raises(ValueError, match=r"lacks `\S+w1\.lora_A\S+` .*`is_trainable=True`"):
        peft.PeftModel.from_pretrained(load(folder), tmp_path, ignore_mismatched_sizes=True)
    logging.getLogger("skywork_hf").propagate = True
    options = {"ignore_mismatched_sizes": True, "is_trainable": True}
    caplog.clear()
    loaded = peft.PeftModel.from_pretrained(load(folder), tmp_path, **options)
    (warning,) = [record.getMessage() for record in caplog.records if record.name == "skywork_hf.adapters"]
    assert "these stay as they were" in warning
    assert adapter_values(loaded).keys() == adapter_values(adapted).keys()


# --- embeddings that were resized, one adapter a row

SHAPE = {"num_key_value_heads": 4, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
# Ours, and what they are to behave as.
FAMILIES = {
    "dense": lambda size: SkyworkForCausalLM(tiny_dense_config(vocab_size=size)),
    "llama": lambda size: LlamaForCausalLM(LlamaConfig(**SHAPE, num_attention_heads=4, vocab_size=size)),
    "moe": lambda size: SkyworkMoeForCausalLM(tiny_moe_config(vocab_size=size)),
    "mixtral": lambda size: MixtralForCausalLM(
        MixtralConfig(**SHAPE, num_attention_heads=4, vocab_size=size, num_local_experts=4)
    ),
}
RESIZED = {
    "whole modules": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "tokens": {"trainable_token_indices": [3, -1]},
    "adapted": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "untrained": {},
}


@pytest.mark.parametrize("trained", RESIZED)
@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_of_resized_embeddings_loads_as_everywhere(family, trained, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint("skywork-13b-tiny"))
    FAMILIES[family](len(tokenizer)).save_pretrained(tmp_path / "base")
    tokenizer.add_tokens(["<one>", "<other>"])
    size = len(tokenizer)
    options = {"target_modules": ["q_proj"], **RESIZED[trained]}
    if "trainable_token_indices" in options:
        options["trainable_token_indices"] = [3, size - 1]

    def base() -> Any:
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        model.resize_token_embeddings(size)
        return model

    def fresh() -> Any:
        torch.manual_seed(2)
        return peft.get_peft_model(base(), peft.LoraConfig(r=2, task_type="CAUSAL_LM", **options))

    def trainer(steps: int) -> Trainer:
        arguments = TrainingArguments(
            output_dir=tmp_path / "run",
            max_steps=steps,
            eval_strategy="steps",
            eval_steps=1,
            save_steps=1,
            load_best_model_at_end=True,
            learning_rate=0.01,
            report_to=[],
            use_cpu=True,
        )
        return Trainer(fresh(), arguments, train_dataset=rows, eval_dataset=rows[:1])

    adapted = fresh()
    stir(adapted)
    adapted.eval().save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    rows = [{"input_ids": ids, "labels": ids} for ids in tokens(2, 5, vocab=size)]
    ids = tokens(vocab=size)
    with torch.no_grad():
        for loaded in (
            peft.PeftModel.from_pretrained(base(), tmp_path / "adapter"),
            peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter"),
        ):
            torch.testing.assert_close(loaded(ids).logits, adapted(ids).logits)
    if family in ("dense", "moe") and trained == "whole modules":
        trainer(1).train()
        resumed = trainer(2)
        resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
        best = Path(str(resumed.state.best_model_checkpoint))
        values = peft.get_peft_model_state_dict(resumed.model)
        saved = load_file(best / "adapter_model.safetensors")
        assert all(torch.equal(value, saved[name]) for name, value in values.items())


def batch_of_two(family: str, targets: list[str], layout: str = "modular") -> tuple[Any, torch.Tensor, torch.Tensor]:
    """A model with two adapters, a batch of three rows, and what base and adapters give for one row each."""
    model = (
        FAMILIES[family](67) if layout == "modular" else SkyworkMoeForCausalLM(tiny_moe_config(experts_layout=layout))
    )
    config = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    adapted = peft.get_peft_model(model, config)
    adapted.add_adapter("other", config)
    ids = tokens(3)
    rows = []
    with torch.no_grad():
        for name, row in zip(["default", "other"], ids[1:], strict=True):
            adapted.set_adapter(name)
            rows.append(adapted.eval()(row[None]).logits)
        with adapted.disable_adapter():
            rows.insert(0, adapted(ids[:1]).logits)
    return adapted, ids, torch.cat(rows)


NAMES = ["__base__", "default", "other"]


@pytest.mark.parametrize("family", ["dense", "moe"])
@torch.no_grad()
def test_each_row_may_have_its_own_adapter_in_attention(family):
    adapted, ids, wanted = batch_of_two(family, ["q_proj", "v_proj"])
    torch.testing.assert_close(adapted(ids, adapter_names=NAMES).logits, wanted)


@torch.no_grad()
def test_no_row_has_its_own_adapter_in_experts():
    adapted, ids, wanted = batch_of_two("moe", ["q_proj", *EXPERTS])
    for call in (adapted, lambda ids, **options: adapted.generate(input_ids=ids, max_new_tokens=2, **options)):
        with pytest.raises(ValueError, match=r"^`model\.layers\.0\.block_sparse_moe\S+w1` has adapters, .* own batch"):
            call(ids, adapter_names=NAMES)
        hooked = [module for module in adapted.modules() if module._forward_pre_hooks]
        assert hooked == [adapted.get_base_model().model.layers[0]]  # which is ours
    torch.testing.assert_close(adapted(ids[2:]).logits, wanted[2:])


@torch.no_grad()
def test_no_forward_looks_through_the_whole_model_for_adapters(monkeypatch):
    config = peft.LoraConfig(target_modules=["w1"], layers_to_transform=[1])
    adapted = peft.get_peft_model(FAMILIES["moe"](67), config).eval()
    looked = []
    monkeypatch.setattr(nn.Module, "modules", lambda module, *_: iter(looked.append(module) or ()))
    adapted.get_base_model()(input_ids=tokens(1))
    assert looked == []


def test_adapters_that_begin_at_a_token_of_each_row_are_refused_in_experts():
    config = {"r": 2, "task_type": "CAUSAL_LM", "alora_invocation_tokens": [5, 6], "init_lora_weights": False}
    ids = torch.cat([tokens(2, 4), torch.tensor([[5, 6]] * 2), tokens(2, 4)], dim=1)
    fine = peft.get_peft_model(FAMILIES["moe"](67), peft.LoraConfig(**config, target_modules=["q_proj"]))
    fine.train()(input_ids=ids, labels=ids).loss.backward()
    refused = peft.get_peft_model(FAMILIES["moe"](67), peft.LoraConfig(**config, target_modules=["w1"]))
    with pytest.raises(ValueError, match=r"w1` has adapters, .*aLoRA"):
        refused.train()(input_ids=ids, labels=ids)


# --- the Trainer


@pytest.mark.parametrize("precision", ["float32", *NATIVE])
def test_the_trainer_trains_the_adapters_alone(precision, folder, tmp_path):
    adapted = peft.get_peft_model(
        load(folder, precision), peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    before = {name: tensor.clone() for name, tensor in adapted.state_dict().items()}
    arguments = TrainingArguments(
        output_dir=tmp_path,
        max_steps=3,
        learning_rate=0.01,
        per_device_train_batch_size=2,
        gradient_checkpointing=True,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
    )
    rows = [{"input_ids": ids, "labels": ids} for ids in tokens(8)]
    trainer = Trainer(adapted, arguments, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 3
    assert torch.tensor(losses).isfinite().all()
    trained = changed(adapted, before)
    assert all(".lora_" in name for name in trained)
    assert any(".experts." in name for name in trained)
    ids = tokens()
    again = peft.PeftModel.from_pretrained(load(folder, precision), tmp_path / "checkpoint-3")
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, adapted.eval()(ids).logits)
