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
    """Every token takes every expert: rounding would have some take others, which no tolerance covers."""
    config = tiny_moe_config(**SIZES, moe_2layer_gate=True, num_experts_per_tok=4)
    SkyworkMoeForCausalLM(config).save_pretrained(tmp_path / "moe")
    return tmp_path / "moe"


@pytest.fixture
def dense_folder(tmp_path):
    SkyworkForCausalLM(tiny_dense_config(**SIZES)).save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def peft() -> Any:
    return pytest.importorskip("peft")


def relative(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((got - wanted).norm() / wanted.norm()).item()


@torch.no_grad()
def evaluate(model: Any, ids: torch.Tensor) -> None:
    model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids))


def lora(model: Any, *_: Any) -> Any:
    return peft().get_peft_model(model, peft().LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))


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
    model = load(moe_folder, quantization_config=BitsAndBytesConfig(**CONFIGS[kind]))
    model = peft().prepare_model_for_kbit_training(model, use_gradient_checkpointing=checkpointing)
    model = peft().get_peft_model(model, peft().LoraConfig(r=2, target_modules=["q_proj", "w1", "w2"])).train()
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


TRAINED = {
    "embeddings and norms": lambda model, _: model,
    "prompt": lambda model, _: peft().get_peft_model(
        model, peft().PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    ),
    "LoRA": lora,
    "LoRA loaded for inference": lambda model, path: peft().PeftModel.from_pretrained(model, path),
}


@pytest.mark.parametrize("trained", TRAINED)
@pytest.mark.parametrize("kind", CONFIGS)
def test_whatever_is_trained_after_an_evaluation_learns_from_its_gradients(kind, trained, dense_folder, tmp_path):
    """Within the rounding of block scales to bfloat16, as below; what packed weights give is another vector."""
    ids = tokens()
    options = {"quantization_config": BitsAndBytesConfig(**CONFIGS[kind])}
    if trained == "LoRA loaded for inference":
        lora(load(dense_folder)).save_pretrained(tmp_path / "adapter")

    def gradients(evaluated: bool) -> dict[str, torch.Tensor]:
        model = load(dense_folder, **options)
        if evaluated:
            evaluate(model, ids)
        torch.manual_seed(1)
        model = TRAINED[trained](model, tmp_path / "adapter")
        if evaluated:
            evaluate(model, ids)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.requires_grad_()
        model.train()(input_ids=ids, labels=ids, attention_mask=torch.ones_like(ids)).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    plain, after = gradients(evaluated=False), gradients(evaluated=True)
    assert after.keys() == plain.keys()
    got, wanted = (torch.cat([gradient.flatten() for gradient in by.values()]) for by in (after, plain))
    assert relative(got, wanted) < 0.1


@pytest.mark.parametrize("kind", CONFIGS)
def test_an_evaluation_before_training_leaves_its_gradients_as_they_are(kind, moe_folder):
    ids = tokens()

    def gradients(evaluated: bool) -> dict[str, torch.Tensor]:
        torch.manual_seed(1)
        model = load(moe_folder, quantization_config=BitsAndBytesConfig(**CONFIGS[kind]))
        adapted = lora(model).eval()
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
def test_a_model_that_has_run_saves_merges_and_dequantises_what_was_loaded(kind, dense_folder, tmp_path):
    """Within the rounding of block scales to bfloat16, which some CPUs' kernels want."""
    ids, options = tokens(), {"quantization_config": BitsAndBytesConfig(**CONFIGS[kind])}

    def that_has_run() -> Any:
        model = load(dense_folder, **options)
        model(ids)
        return model

    def error(model: Any) -> float:
        return relative(model(ids).logits, load(dense_folder, **options).dequantize()(ids).logits)

    assert error(that_has_run().dequantize()) < 0.02
    that_has_run().save_pretrained(tmp_path)
    assert error(load(tmp_path).dequantize()) < 0.02
    adapted = peft().get_peft_model(that_has_run(), peft().LoraConfig(r=2, target_modules=["q_proj"]))
    limit = 0.05 if kind == "int8" else 0.02  # whose kernel rounds the activations
    assert error(adapted) < limit
    assert error(adapted.merge_and_unload()) < limit


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("part", ["model", "model.layers.0", "model.layers.0.self_attn.q_proj"])
@torch.no_grad()
def test_a_part_of_a_model_that_has_run_saves_what_was_loaded_and_runs_on(part, kind, dense_folder):
    ids, options = tokens(), {"quantization_config": BitsAndBytesConfig(**CONFIGS[kind])}
    model = load(dense_folder, **options)
    logits = model(ids).logits
    state = model.get_submodule(part).state_dict()
    exact = load(dense_folder, **options).get_submodule(part).state_dict()
    assert state.keys() == exact.keys()
    assert all(state[name].shape == exact[name].shape for name in exact if "quant_state" not in name)
    assert relative(model(ids).logits, logits) < 0.02


@pytest.mark.parametrize("options", [{"use_dora": True}, {"init_lora_weights": "olora"}], ids=str)
@torch.no_grad()
def test_adapters_that_begin_with_the_weights_see_the_real_ones_after_an_evaluation(options, dense_folder):
    """Within the rounding of block scales to bfloat16, after which OLoRA quantises once more."""

    def adapted(evaluated: bool) -> Any:
        model = load(dense_folder, quantization_config=BitsAndBytesConfig(**CONFIGS["nf4"]))
        if evaluated:
            evaluate(model, ids)
        torch.manual_seed(1)
        config = peft().LoraConfig(r=2, target_modules=["q_proj", "down_proj"], **options)
        return peft().get_peft_model(model, config).eval()(ids).logits

    ids = tokens()
    assert relative(adapted(evaluated=True), adapted(evaluated=False)) < 0.1


@pytest.mark.parametrize("dora", [False, True])
@torch.no_grad()
def test_adapters_loaded_for_inference_see_the_real_weights_of_4_bit(dora, dense_folder, tmp_path):
    ids, options = tokens(), {"quantization_config": BitsAndBytesConfig(**CONFIGS["nf4"])}
    config = peft().LoraConfig(r=2, target_modules=["q_proj", "down_proj"], use_dora=dora, init_lora_weights=False)
    peft().get_peft_model(load(dense_folder, **options), config).save_pretrained(tmp_path)

    def adapted(base: Any) -> Any:
        return peft().PeftModel.from_pretrained(base, tmp_path)

    wanted = adapted(load(dense_folder, **options).dequantize())(ids).logits
    model = adapted(load(dense_folder, **options))
    for _ in range(2):
        assert relative(model(ids).logits, wanted) < 0.05

    def merged_and_back(runs: bool) -> torch.Tensor:
        model = adapted(load(dense_folder, **options))
        model.merge_adapter()
        if runs:
            model(ids)
        model.unmerge_adapter()
        return model(ids).logits

    assert relative(merged_and_back(runs=True), merged_and_back(runs=False)) < 0.05
