"""Predicted bytes of fine-tuning against adapters that PEFT makes, and against training steps that are run."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from simulated_device import SimulatedDevices
from test_placement_sizes import QUANTIZATIONS, WIDE, loaded_bytes
from tiny import peak_bytes, tiny_dense_config, tiny_moe_config, tokens
from transformers import AutoModelForCausalLM

from skywork_hf import SkyworkConfig, SkyworkForCausalLM, SkyworkMoeConfig, SkyworkMoeForCausalLM
from skywork_hf.placement.spread import DoesNotFit
from skywork_hf.training.memory import FinetuningMemory, finetuning_memory

peft = pytest.importorskip("peft")

ROOT = Path(__file__).parents[1]
GPU = "lazy:0"  # of `SimulatedDevices`
NF4_TWICE = "nf4 double"
TARGETS = {"all": "all-linear", "attention": ["q_proj", "k_proj", "v_proj", "o_proj"]}
FAMILIES: dict[str, Any] = {
    "dense": (SkyworkForCausalLM, tiny_dense_config),
    "moe": (SkyworkMoeForCausalLM, tiny_moe_config),
}


def lora(targets: str = "all", **options: Any) -> Any:
    return peft.LoraConfig(**{"r": 4, "target_modules": TARGETS[targets], **options})


def load(folder: Any, memory: FinetuningMemory) -> Any:
    precision = memory.request.precision
    options = {"dtype": precision.dtype, "quantization_config": precision.config}
    return AutoModelForCausalLM.from_pretrained(folder, **options)


class TrainingStep:
    """A forward and a backward pass, to be called as a model is by what measures one."""

    def __init__(self, model: Any, autocast: bool = False) -> None:
        self.model, self.autocast = model, autocast

    def __call__(self, ids: torch.Tensor, **_: Any) -> None:
        with torch.enable_grad():
            with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
                outputs = self.model(input_ids=ids, labels=ids)
            outputs.loss.backward()


# --- what is exact


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize(
    ("model_class", "config"),
    [
        (SkyworkForCausalLM, tiny_dense_config()),
        (SkyworkForCausalLM, tiny_dense_config(tie_word_embeddings=True, num_key_value_heads=2)),
        (SkyworkMoeForCausalLM, tiny_moe_config()),
        (SkyworkMoeForCausalLM, tiny_moe_config(moe_expert_interval=2, moe_2layer_gate=True)),
        (SkyworkForCausalLM, SkyworkConfig(num_hidden_layers=2)),
        (SkyworkMoeForCausalLM, SkyworkMoeConfig(num_hidden_layers=2)),
    ],
)
def test_trained_parameters_are_those_of_peft(model_class, config, targets):
    with torch.device("meta"):
        adapted = peft.get_peft_model(model_class(config), lora(targets))
    assert finetuning_memory(config, lora(targets)).trained.count == adapted.get_nb_trainable_parameters()[0]


@pytest.mark.parametrize("quantization", ["bf16", "fp32", "fp8", "int8", "bnb-int8", "nf4", NF4_TWICE], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_weights_adapters_gradients_and_states_take_what_was_predicted(family, quantization, tmp_path):
    if quantization in ("bnb-int8", "nf4", NF4_TWICE):
        pytest.importorskip("bitsandbytes")
    model_class, config = FAMILIES[family]
    model_class(config(**WIDE)).bfloat16().save_pretrained(tmp_path)
    memory = finetuning_memory(tmp_path, lora(), QUANTIZATIONS.get(quantization))
    model = load(tmp_path, memory)
    predicted = memory.nbytes
    assert predicted["weights"] == loaded_bytes(model)

    adapted = peft.get_peft_model(model, lora()).train()
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    TrainingStep(adapted)(tokens(4, 60))  # so many that every expert is chosen
    optimizer.step()
    assert predicted["adapters"] == sum(parameter.nbytes for parameter in trained)
    assert predicted["gradients"] == sum(parameter.grad.nbytes for parameter in trained)
    states = [optimizer.state[parameter] for parameter in trained]
    assert predicted["AdamW"] == sum(state["exp_avg"].nbytes + state["exp_avg_sq"].nbytes for state in states)


# --- what is an upper bound


@pytest.mark.parametrize(
    ("kind", "quantization", "options"),
    [
        ("dense", "bf16", {}),
        ("dense", "bf16", {"vocab": 8192}),
        ("dense", "fp32", {}),
        ("dense", "nf4", {}),
        ("moe", "bf16", {}),
        ("moe", "fp32", {"vocab": 8192}),
        ("moe", "bf16", {"targets": "attention"}),
        ("moe", "bf16", {"checkpointing": False}),
        ("moe", "bf16", {"dropout": 0.1}),
        ("moe", "bf16", {"autocast": True}),
        ("moe", "bf16", {"autocast": True, "vocab": 8192}),
        ("moe", "fp8", {}),
        ("moe", "int8", {}),
        ("moe", "nf4", {}),
        ("moe one expert", "bf16", {}),
        ("moe one expert", "int8", {}),
    ],
)
def test_activations_are_enough_and_not_much_more(kind, quantization, options, tmp_path):
    if quantization == "nf4":
        pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    vocab, checkpointing = options.get("vocab", 67), options.get("checkpointing", True)
    model_class, config = FAMILIES["dense" if kind == "dense" else "moe"]
    shape = {"hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 3, "max_position_embeddings": 1024}
    model = model_class(config(**shape, vocab_size=vocab)).bfloat16()
    if kind == "moe one expert":
        for layer in model.model.layers:
            layer.block_sparse_moe.gate.weight.data.zero_()
    model.save_pretrained(tmp_path)
    adapters = lora(options.get("targets", "all"), lora_dropout=options.get("dropout", 0.0))
    memory = finetuning_memory(
        tmp_path, adapters, quantization, context_tokens=256, batch_size=2, gradient_checkpointing=checkpointing
    )
    adapted = peft.get_peft_model(load(tmp_path, memory), adapters).train()
    if checkpointing:
        adapted.gradient_checkpointing_enable()
    step, ids = TrainingStep(adapted, options.get("autocast", False)), tokens(2, 256, vocab=vocab)
    step(ids)  # makes the gradients, to which the measured step adds
    peak = peak_bytes(lambda: step(ids))
    planned = sum(memory.nbytes[part] for part in ("kept", "working", "copies"))
    print(f"{kind} {quantization} {options}: {planned / peak:.2f} times the peak")
    assert peak <= planned <= 3 * peak


# --- where it goes


def test_parts_add_up_to_what_the_planner_places():
    memory = finetuning_memory(SkyworkConfig(num_hidden_layers=2), lora(), context_tokens=512)
    on_one = memory.place({0: "h100"}).nbytes[0]
    assert sum(memory.nbytes.values()) == sum(on_one.values())
    on_two = memory.place({0: "rtx4090", 1: "rtx4090"}).nbytes
    for kind in ("dense", "experts", "cache"):
        assert on_two[0][kind] + on_two[1][kind] == on_one[kind]


def test_other_weights_keep_the_adapters():
    config = tiny_moe_config(**WIDE)
    memory = finetuning_memory(config, lora(), "bf16")
    assert memory.with_quantization("nf4").nbytes == finetuning_memory(config, lora(), "nf4").nbytes
    assert "weights" in str(memory)


def test_what_does_not_fit_says_how_much_is_missing():
    memory = finetuning_memory(tiny_moe_config(), lora(), "fp32", context_tokens=16)
    whole = sum(memory.nbytes.values())
    with pytest.raises(DoesNotFit) as refused:
        memory.place({0: whole // 2})
    assert 0 < refused.value.shortfall < whole
    assert set(memory.place({0: whole}).device_map.values()) == {0}


def test_experts_train_where_the_plan_puts_them(tmp_path):
    SkyworkMoeForCausalLM(tiny_moe_config()).save_pretrained(tmp_path)
    memory = finetuning_memory(tmp_path, lora(), context_tokens=60)
    gpu = sum(memory.nbytes.values()) - memory.parts.layers[0].experts[0].nbytes("", 4)
    with SimulatedDevices():
        places = memory.place({GPU: gpu, "cpu": "1GiB"}).device_map
        model = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=places)
        adapted = peft.get_peft_model(model, lora()).train()
        TrainingStep(adapted)(tokens(4, 60))
        devices = {
            name: {str(p.grad.device) for p in model.get_submodule(name).parameters() if p.requires_grad}
            for name in places
            if ".experts." in name
        }
    assert {"cpu"} in devices.values()
    assert {GPU} in devices.values()
    assert all(found == {places[name]} for name, found in devices.items())


def test_the_largest_rank_of_a_pattern_is_counted():
    """By what r makes of it where all ranks are that one, since any linear may be the largest."""
    config = tiny_moe_config(**WIDE)
    sizes = {"context_tokens": 64, "gradient_checkpointing": False}
    of_pattern = finetuning_memory(config, lora(r=2, rank_pattern={"w1": 16, "q_proj": 4}), **sizes).nbytes
    of_rank = finetuning_memory(config, lora(r=16), **sizes).nbytes
    assert {name: of_pattern[name] for name in ("kept", "working")} == {
        name: of_rank[name] for name in ("kept", "working")
    }
    assert of_pattern["adapters"] < of_rank["adapters"]


def test_only_lora_is_counted():
    with pytest.raises(ValueError, match=r"`lora` is of type IA3Config: expected a peft\.LoraConfig"):
        finetuning_memory(tiny_dense_config(), peft.IA3Config())


# --- the docs


def test_the_docs_have_the_tables_that_the_benchmark_prints():
    tables = runpy.run_path(str(ROOT / "benchmarks" / "finetuning_memory.py"))["tables"]()
    assert tables in (ROOT / "docs" / "finetuning.md").read_text(encoding="utf-8")
