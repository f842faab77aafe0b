"""Planned bytes against those of models that are loaded, and of forward passes that are run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import checkpoint, peak_bytes, tiny_dense_config, tiny_moe_config, tokens
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, cache_utils

from skywork_hf import (
    SkyworkForCausalLM,
    SkyworkForSequenceClassification,
    SkyworkFp8Config,
    SkyworkInt8Config,
    SkyworkModel,
    SkyworkMoeForCausalLM,
    SkyworkMoeModel,
    placement_report,
    plan_device_map,
)
from skywork_hf.placement.sizes import KV_CACHE_BACKENDS, KV_CACHE_BITS, model_parts

WIDE = {"hidden_size": 64, "intermediate_size": 128}
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}
QUANTIZATIONS = {
    "bf16": "bf16",
    "fp32": "fp32",
    "fp8": "fp8",
    "int8": "int8",
    "fp8 as int8": {"cpu": "int8"},
    "bnb-int8": "bnb-int8",
    "nf4": "nf4",
    "nf4 double": BitsAndBytesConfig(**NF4, bnb_4bit_use_double_quant=True),
}


def loaded_bytes(model: Any) -> int:
    """Everything that the model's modules hold, counted here and not by the planner."""
    total = 0
    for tensor in [*model.parameters(), *model.buffers()]:
        total += tensor.nbytes
        if getattr(tensor, "SCB", None) is not None:
            total += tensor.SCB.nbytes
        state = getattr(tensor, "quant_state", None)
        if state is not None:
            held = [state.absmax, state.code]
            held += [state.offset, state.state2.absmax, state.state2.code] if state.nested else []
            total += sum(part.nbytes for part in held)
    return total


@pytest.mark.parametrize("quantization", QUANTIZATIONS.values(), ids=QUANTIZATIONS)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["dense", "moe"])
def test_planned_bytes_are_loaded(family, tied, quantization, tmp_path):
    if quantization in ("bnb-int8", "nf4") or isinstance(quantization, BitsAndBytesConfig):
        pytest.importorskip("bitsandbytes")
    classes = {"dense": (SkyworkForCausalLM, tiny_dense_config), "moe": (SkyworkMoeForCausalLM, tiny_moe_config)}
    model_class, config = classes[family]
    model_class(config(**WIDE, tie_word_embeddings=tied)).bfloat16().save_pretrained(tmp_path)
    plan = plan_device_map(tmp_path, {"cpu": "1GiB"}, quantization)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=plan)
    assert plan.weight_bytes("cpu") == loaded_bytes(model)
    assert placement_report(model).weight_bytes == {"cpu": loaded_bytes(model)}


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_planned_bytes_of_the_released_fp8_layout(quantization):
    name = checkpoint("skywork-moe-tiny-fp8")
    plan = plan_device_map(name, {"cpu": "1GiB"}, quantization)
    assert plan.weight_bytes("cpu") == loaded_bytes(AutoModelForCausalLM.from_pretrained(name, device_map=plan))


@pytest.mark.parametrize("kept", ["q_proj", "model.layers.0"])
def test_modules_that_a_checkpoint_keeps_in_16_bit(kept, tmp_path):
    SkyworkMoeForCausalLM(tiny_moe_config()).bfloat16().save_pretrained(tmp_path / "plain")
    config = SkyworkFp8Config(modules_to_not_convert=[kept])
    quantised = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=config)
    quantised.save_pretrained(tmp_path / "kept")
    for quantization in (None, "fp8", SkyworkFp8Config("none")):
        plan = plan_device_map(tmp_path / "kept", {"cpu": "1GiB"}, quantization)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "kept", device_map=plan)
        assert plan.weight_bytes("cpu") == loaded_bytes(model)


@pytest.mark.parametrize(
    ("model_class", "config"),
    [
        (SkyworkModel, tiny_dense_config()),
        (SkyworkForSequenceClassification, tiny_dense_config(num_labels=3)),
        (SkyworkMoeModel, tiny_moe_config()),
        (SkyworkMoeForCausalLM, tiny_moe_config(experts_layout="fused")),
        (SkyworkMoeForCausalLM, tiny_moe_config(moe_expert_interval=2, moe_2layer_gate=True, num_key_value_heads=2)),
    ],
)
def test_planned_bytes_of_other_classes_and_layouts(model_class, config, tmp_path):
    model_class(config).save_pretrained(tmp_path)
    options = {
        "model_class": model_class,
        "strategy": "layers",
        "experts_layout": getattr(config, "experts_layout", None),
    }
    plan = plan_device_map(tmp_path, {"cpu": "1GiB"}, **{key: value for key, value in options.items() if value})
    layout = {"experts_layout": "fused"} if options["experts_layout"] == "fused" else {}
    model = model_class.from_pretrained(tmp_path, device_map=plan, **layout)
    assert plan.weight_bytes("cpu") == loaded_bytes(model)


def test_the_plan_of_another_class_is_refused(tmp_path):
    SkyworkMoeForCausalLM(tiny_moe_config()).save_pretrained(tmp_path)
    plan = plan_device_map(tmp_path, {"cpu": "1GiB"})
    with pytest.raises(ValueError, match="for SkyworkMoeForCausalLM, and SkyworkMoeModel is to be loaded"):
        SkyworkMoeModel.from_pretrained(tmp_path, device_map=plan)
    with pytest.raises(ValueError, match=r"is not the plan's torch\.float32"):
        SkyworkMoeForCausalLM.from_pretrained(tmp_path, device_map=plan, dtype="bfloat16")


# --- what a prompt takes


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", ["dense", "moe", "moe one expert", "int8 moe"])
def test_working_space_is_enough_and_not_much_more(kind, dtype, tmp_path):
    """Routing that sends every token to the same experts is the worst."""
    shape = {"hidden_size": 128, "intermediate_size": 320, "vocab_size": 640, "max_position_embeddings": 1024}
    config = tiny_dense_config(**shape) if kind == "dense" else tiny_moe_config(**shape)
    model_class: Any = SkyworkForCausalLM if kind == "dense" else SkyworkMoeForCausalLM
    model_class(config).to(dtype).save_pretrained(tmp_path)
    quantization = SkyworkInt8Config() if kind == "int8 moe" else None
    model = model_class.from_pretrained(tmp_path, dtype=dtype, quantization_config=quantization)
    if kind == "moe one expert":
        for layer in model.model.layers:
            layer.block_sparse_moe.gate.weight.data.zero_()
    ids = tokens(1, 512, vocab=640)
    parts = model_parts(model_class, config, dtype, None)
    cache = config.num_hidden_layers * parts.kv_bytes(512, 1)
    unpacking = parts.unpacking_bytes("int8" if quantization else "", "cpu")
    planned = cache + parts.dense_working_bytes(512, 1) + parts.expert_working_bytes(512) + unpacking
    model.eval()(ids[:, :4])  # what is made once
    peak = peak_bytes(lambda: model(ids, logits_to_keep=1))
    print(f"{kind} {dtype}: {planned / peak:.2f} times the peak")
    assert peak <= planned <= 4 * peak


# --- the KV cache

KV = {"num_key_value_heads": 2, "num_attention_heads": 4, "hidden_size": 256}


def kv_parts(held: str | None) -> Any:
    return model_parts(SkyworkMoeForCausalLM, tiny_moe_config(**KV), torch.bfloat16, None, held)


@torch.no_grad()
@pytest.mark.parametrize("held", ["fp8", "int8", "int4", "int2"])
def test_a_cache_of_fewer_bits_takes_what_is_planned(held):
    """One token more, after 299 of each of three sequences: all is unpacked, and packed again."""
    options: Any = {} if held == "fp8" else {"nbits": KV_CACHE_BITS[held], "residual_length": 1}
    if held == "fp8" and not hasattr(cache_utils, "Fp8QuantizedLayer"):
        pytest.skip("transformers has no cache in FP8")
    pytest.importorskip({"fp8": "torch", "hqq": "hqq", "quanto": "optimum.quanto"}[KV_CACHE_BACKENDS[held]])
    names = {"fp8": "Fp8QuantizedLayer", "hqq": "HQQQuantizedLayer", "quanto": "QuantoQuantizedLayer"}
    layer = getattr(cache_utils, names[KV_CACHE_BACKENDS[held]])(**options)
    prompt, token = ([torch.randn(3, 2, length, 64).bfloat16() for _ in range(2)] for length in (299, 1))
    layer.update(*prompt)
    peak = peak_bytes(lambda: layer.update(*token))
    growth = [parts.dense_working_bytes(900, 3) for parts in (kv_parts(held), kv_parts(None))]
    planned = growth[0] - growth[1] + kv_parts(None).kv_bytes(900, 3)
    print(f"{held}: {peak / kv_parts(None).kv_bytes(900, 3):.2f} times the layer's cache in 16 bit")
    assert 0.7 * planned <= peak <= planned + 2**16
    if held == "fp8":
        codes = [codes for codes, _ in (layer._quantized_keys, layer._quantized_values)]
        assert sum(tensor.nbytes for tensor in codes) == kv_parts("fp8").kv_bytes(900, 3)


def test_bits_scales_and_the_last_tokens_of_a_quantised_cache():
    """What hqq and quanto hold of 64 values: so many bits, and two 16-bit numbers; each sequence's last 128 stay."""
    plain = kv_parts(None).kv_bytes(1000, 2)
    last = kv_parts(None).kv_bytes(256, 2)
    for held, bits in {"int8": 8.5, "int4": 4.5, "int2": 2.5}.items():
        assert kv_parts(held).kv_bytes(1000, 2) == plain * bits / 16 + last
        assert kv_parts(held).kv_bytes(100, 2) < 2 * kv_parts(None).kv_bytes(100, 2)
