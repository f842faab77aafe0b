"""bitsandbytes through our classes: every attention and expert linear, and nothing else."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from tiny import checkpoint, tiny_dense_config, tiny_moe_config, tokens
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from skywork_hf import SkyworkForCausalLM, SkyworkMoeForCausalLM

bnb = pytest.importorskip("bitsandbytes")

CONFIGS = {
    "int8": {"load_in_8bit": True},
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4 twice": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
}
SIZES = {"hidden_size": 64, "intermediate_size": 128}  # 4 bit on a CPU wants multiples of 64


def load(path: Any, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, **{"dtype": torch.float32, **options})


def quantised(model: nn.Module) -> set[str]:
    kinds = (bnb.nn.Linear8bitLt, bnb.nn.Linear4bit)
    return {name for name, module in model.named_modules() if isinstance(module, kinds)}


@pytest.fixture
def moe_folder(tmp_path):
    SkyworkMoeForCausalLM(tiny_moe_config(**SIZES, moe_2layer_gate=True)).save_pretrained(tmp_path / "moe")
    return tmp_path / "moe"


@torch.no_grad()
@pytest.mark.parametrize("kind", CONFIGS)
def test_every_attention_and_expert_linear_and_nothing_else(kind, moe_folder, tmp_path):
    model = load(moe_folder, quantization_config=BitsAndBytesConfig(**CONFIGS[kind]))
    assert quantised(model) == {
        f"model.layers.{layer}.{linear}"
        for layer in range(2)
        for linear in (
            *(f"self_attn.{matrix}_proj" for matrix in "qkvo"),
            *(f"block_sparse_moe.experts.{expert}.w{matrix}" for expert in range(4) for matrix in (1, 2, 3)),
        )
    }
    plain = [p for name, p in model.named_parameters() if name.rpartition(".")[0] not in quantised(model)]
    assert {parameter.dtype for parameter in plain} == {torch.float32}
    ids = tokens()
    model.save_pretrained(tmp_path / "saved")  # before it runs, which rounds scales on some CPUs
    logits = model(ids).logits
    again = load(tmp_path / "saved")
    assert quantised(again) == quantised(model)
    assert torch.equal(again(ids).logits, logits)
    exact = load(moe_folder).state_dict()
    for restored in (again.dequantize(), model.dequantize()):  # the second was saved before
        assert not quantised(restored)
        assert (restored(ids).logits - logits).norm() / logits.norm() < 0.1
        error = {
            name: (value - exact[name]).norm() / exact[name].norm() for name, value in restored.state_dict().items()
        }
        changed = {name.removesuffix(".weight") for name, value in error.items() if value > 0}
        assert changed == quantised(load(moe_folder, quantization_config=BitsAndBytesConfig(**CONFIGS[kind])))
        assert max(error.values()) < (0.015 if kind == "int8" else 0.25)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_fused_experts_are_refused_or_made_modular(kind, moe_folder, tmp_path):
    config = BitsAndBytesConfig(**CONFIGS[kind])
    with pytest.raises(ValueError, match="would leave the 3-D parameters of fused experts in 16 bit"):
        load(moe_folder, experts_layout="fused", quantization_config=config)
    load(moe_folder, experts_layout="fused").save_pretrained(tmp_path / "fused")
    model = load(tmp_path / "fused", quantization_config=config)
    assert model.config.experts_layout == "modular"
    assert len(quantised(model)) == 2 * (4 + 4 * 3)
    model.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["experts_layout"] == "modular"


@torch.no_grad()
@pytest.mark.parametrize("weight_format", [True, False])
def test_the_layout_of_the_released_8_bit_repositories(weight_format, tmp_path):
    """A pickle with int8 `weight` and float `SCB`; older files have no `weight_format`."""
    SkyworkForCausalLM(tiny_dense_config(**SIZES)).save_pretrained(tmp_path / "plain")
    model = load(tmp_path / "plain", quantization_config=BitsAndBytesConfig(load_in_8bit=True))
    model.save_pretrained(tmp_path / "saved")
    (tmp_path / "saved" / "model.safetensors").unlink()
    state = {name: value for name, value in model.state_dict().items() if weight_format or "weight_format" not in name}
    name = "model.layers.0.self_attn.q_proj"
    assert (state[f"{name}.weight"].dtype, state[f"{name}.SCB"].dtype) == (torch.int8, torch.float32)
    torch.save(state, tmp_path / "saved" / "pytorch_model.bin")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    config["quantization_config"] = {"load_in_8bit": True, "llm_int8_threshold": 6.0}
    (tmp_path / "saved" / "config.json").write_text(json.dumps(config))
    again, info = load(tmp_path / "saved", output_loading_info=True)
    assert not info["missing_keys"]
    assert len(quantised(again)) == 2 * 7
    assert torch.equal(again(tokens()).logits.isfinite(), torch.ones(2, 10, 67, dtype=torch.bool))
    torch.manual_seed(0)
    ids = tokens()
    assert torch.equal(again(ids).logits, model(ids).logits)


@torch.no_grad()
@pytest.mark.parametrize("device_map", ["cpu", {"": "cpu"}, "auto"])
def test_device_maps(device_map, moe_folder):
    config = BitsAndBytesConfig(load_in_8bit=True)
    ids = tokens()
    placed = load(moe_folder, quantization_config=config, device_map=device_map)
    assert torch.equal(placed(ids).logits, load(moe_folder, quantization_config=config)(ids).logits)


@pytest.mark.parametrize("kind", CONFIGS)
def test_bytes_are_those_of_the_format(kind):
    model = load(checkpoint("skywork-moe-tiny"), quantization_config=BitsAndBytesConfig(**CONFIGS[kind]))
    layers = [model.get_submodule(name) for name in quantised(model)]
    elements = sum(layer.in_features * layer.out_features for layer in layers)
    stored = sum(layer.weight.nbytes for layer in layers)
    assert stored == (elements if kind == "int8" else elements // 2)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_adapters_learn_through_it(kind, checkpointing, moe_folder):
    peft = pytest.importorskip("peft")
    model = load(moe_folder, quantization_config=BitsAndBytesConfig(**CONFIGS[kind]))
    model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=checkpointing)
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "w1", "w2"])).train()
    ids = tokens()
    model(input_ids=ids, labels=ids).loss.backward()
    adapters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in adapters)
    assert any(".experts." in n and p.grad is not None and p.grad.abs().sum() > 0 for n, p in adapters.items())


@pytest.mark.gpu
@pytest.mark.parametrize("kind", CONFIGS)
def test_a_model_on_a_gpu_agrees_with_the_cpu(kind, moe_folder):
    options = {"dtype": torch.bfloat16, "quantization_config": BitsAndBytesConfig(**CONFIGS[kind])}
    ids = tokens()
    here = load(moe_folder, **options, device_map="cpu")(ids).logits.float()
    there = load(moe_folder, **options, device_map="cuda")(ids.cuda()).logits.float().cpu()
    assert (here - there).norm() / here.norm() < 0.1


@pytest.mark.parametrize("kind", CONFIGS)
def test_an_evaluation_before_training_leaves_its_gradients_as_they_are(kind, moe_folder):
    peft = pytest.importorskip("peft")
    ids = tokens()

    def gradients(evaluated: bool) -> dict[str, torch.Tensor]:
        torch.manual_seed(1)
        model = load(moe_folder, quantization_config=BitsAndBytesConfig(**CONFIGS[kind]))
        lora = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
        adapted = peft.get_peft_model(model, lora).eval()
        if evaluated:
            with torch.no_grad():
                adapted(ids)
        adapted.train()(input_ids=ids, labels=ids).loss.backward()
        return {name: p.grad for name, p in adapted.named_parameters() if p.grad is not None}

    plain, after = gradients(evaluated=False), gradients(evaluated=True)
    assert any("layers.0" in name for name in plain)
    assert after.keys() == plain.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(after[name], gradient, msg=name)


@pytest.mark.parametrize("kind", CONFIGS)
@torch.no_grad()
def test_a_model_that_has_run_saves_merges_and_dequantises_what_was_loaded(kind, moe_folder, tmp_path):
    """Within the rounding of block scales to bfloat16, which some CPUs' kernels want."""
    peft = pytest.importorskip("peft")
    ids, options = tokens(), {"quantization_config": BitsAndBytesConfig(**CONFIGS[kind])}

    def that_has_run() -> Any:
        model = load(moe_folder, **options)
        model(ids)
        return model

    def error(model: Any) -> float:
        wanted = load(moe_folder, **options).dequantize()(ids).logits
        return ((model(ids).logits - wanted).norm() / wanted.norm()).item()

    assert error(that_has_run().dequantize()) < 0.02
    that_has_run().save_pretrained(tmp_path)
    assert error(load(tmp_path).dequantize()) < 0.02
    adapted = peft.get_peft_model(that_has_run(), peft.LoraConfig(r=2, target_modules=["w1"]))
    assert error(adapted) < 0.05
    assert error(adapted.merge_and_unload()) < 0.05
