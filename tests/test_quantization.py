"""Quantised checkpoints through `from_pretrained`: golden outputs, round trips, bytes, training, and wrong input."""

from __future__ import annotations

import json
import logging
import runpy
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import checkpoint, golden, tiny_dense_config, tiny_moe_config, tokens
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from skywork_hf import SkyworkForCausalLM, SkyworkFp8Config, SkyworkInt8Config, SkyworkMoeForCausalLM, SkyworkMoeModel
from skywork_hf.quantization import formats, matmul
from skywork_hf.quantization.calibration import calibrate, quantize_static
from skywork_hf.quantization.linear import SkyworkFp8Linear, SkyworkInt8Linear, SkyworkQuantizedLinear

FP8 = "skywork-moe-tiny-fp8"
NATIVE = {"fp8": (SkyworkFp8Config, SkyworkFp8Linear), "int8": (SkyworkInt8Config, SkyworkInt8Linear)}
ON_DISK = dict.fromkeys(
    ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"), "cpu"
) | {"model.layers.1": "disk"}
QUANTISED_LINEARS = 2 * (4 + 16 * 3)  # of the golden MoE checkpoints: layers, attention, experts


def load(path: Any, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, **{"dtype": torch.float32, **options})


@torch.no_grad()
def golden_logits(model: Any, name: str) -> torch.Tensor:
    rows = golden(name)
    inputs = {key: rows[key] for key in ("input_ids", "attention_mask", "position_ids")}
    return model(**inputs).logits[rows["attention_mask"].bool()]


def expected(name: str, key: str) -> torch.Tensor:
    rows = golden(name)
    return rows[key][rows["attention_mask"].bool()]


def quantised(model: nn.Module) -> dict[str, SkyworkQuantizedLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, SkyworkQuantizedLinear)}


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("model*.safetensors") for name, tensor in load_file(file).items()}


@pytest.fixture
def fp8_unit(monkeypatch):
    """As on a GPU with FP8: torch's CPU runs `_scaled_mm` exactly, only slowly."""
    monkeypatch.setattr(matmul, "has_fp8_unit", lambda device: True)


@pytest.fixture
def bf16_folder(tmp_path):
    torch.manual_seed(0)
    SkyworkMoeForCausalLM(tiny_moe_config(hidden_size=64)).bfloat16().save_pretrained(tmp_path / "bf16")
    return tmp_path / "bf16"


# --- the released FP8 layout


def test_the_released_fp8_checkpoint_loads_with_no_argument():
    model, info = load(checkpoint(FP8), output_loading_info=True)
    assert not any(info.values())
    layers = quantised(model)
    assert len(layers) == QUANTISED_LINEARS
    assert {type(layer) for layer in layers.values()} == {SkyworkFp8Linear}
    assert {layer.activation_scheme for layer in layers.values()} == {"static"}
    assert not any(parameter.requires_grad for layer in layers.values() for parameter in layer.parameters())
    assert model.lm_head.weight.dtype == model.model.embed_tokens.weight.dtype == torch.float32
    assert (golden_logits(model, FP8) - expected(FP8, "logits_weight_only")).abs().max() <= 1e-4


@pytest.mark.parametrize("scheme", ["none", "dynamic"])
def test_other_schemes_ignore_the_activations_scales(scheme):
    model, info = load(checkpoint(FP8), quantization_config=SkyworkFp8Config(scheme), output_loading_info=True)
    assert not any(info.values())
    assert (golden_logits(model, FP8) - expected(FP8, "logits_weight_only")).abs().max() <= 1e-4


def test_static_activations(fp8_unit):
    logits = golden_logits(load(checkpoint(FP8)), FP8)
    assert (logits - expected(FP8, "logits_static_activations")).abs().max() <= 2e-2


@pytest.mark.usefixtures("fp8_unit")
def test_weight_only_stays_weight_only_where_there_is_an_fp8_unit():
    model = load(checkpoint(FP8), quantization_config=SkyworkFp8Config("none"))
    assert (golden_logits(model, FP8) - expected(FP8, "logits_weight_only")).abs().max() <= 1e-4


@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("name", ["act_scale", "input_scale"])
def test_either_name_and_shape_of_a_scale(name, shape, tmp_path):
    shutil.copytree(checkpoint(FP8), tmp_path, dirs_exist_ok=True)
    tensors = {
        key.replace("act_scale", name): tensor.reshape(shape) if key.endswith("_scale") else tensor
        for key, tensor in stored(tmp_path).items()
    }
    for file in (*tmp_path.glob("model-*"), tmp_path / "model.safetensors.index.json"):
        file.unlink()
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    model = load(tmp_path)
    assert (golden_logits(model, FP8) - expected(FP8, "logits_weight_only")).abs().max() <= 1e-4
    model.save_pretrained(tmp_path / "saved")
    saved = stored(tmp_path / "saved")
    assert {key for key in saved if key.endswith("_scale")} == {
        key.replace("act_scale", "input_scale") for key in tensors if key.endswith("_scale")
    }
    for key in saved.keys() & tensors.keys():
        assert torch.equal(saved[key].float(), tensors[key].float()), key


@pytest.mark.parametrize("scheme", ["static", "dynamic", "none"])
def test_what_is_saved_is_what_vllm_reads(scheme, tmp_path):
    model = load(checkpoint(FP8), quantization_config=SkyworkFp8Config(scheme))
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert written["quant_method"] == "fp8"
    assert written["activation_scheme"] == ("static" if scheme == "static" else "dynamic")
    assert any(name.endswith(".input_scale") for name in stored(tmp_path)) == (scheme == "static")
    again = load(tmp_path)
    assert again.config.quantization_config.activation_scheme == scheme
    assert torch.equal(golden_logits(again, FP8), golden_logits(model, FP8))


@pytest.mark.parametrize("config", [SkyworkFp8Config("dynamic"), SkyworkFp8Config("none"), SkyworkInt8Config(False)])
def test_a_dict_is_the_config_that_writes_it(config, bf16_folder, tmp_path):
    written = config.to_dict()
    model = load(bf16_folder, quantization_config=written)
    of_config = load(bf16_folder, quantization_config=config)
    assert written == config.to_dict()
    assert type(model.config.quantization_config) is type(config)
    assert {type(layer) for layer in quantised(model).values()} == {type(next(iter(quantised(of_config).values())))}
    ids = tokens()
    assert torch.equal(model(ids).logits, of_config(ids).logits)
    model.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved", quantization_config=written)
    assert torch.equal(again(ids).logits, model(ids).logits)
    with_block_scales = tiny_moe_config(quantization_config={**written, "weight_block_size": [128, 128]})
    method = "skywork_int8" if isinstance(config, SkyworkInt8Config) else "fp8"
    assert with_block_scales.quantization_config["quant_method"] == method


def test_no_quantization_config_is_the_checkpoints_own():
    assert len(quantised(load(checkpoint(FP8), quantization_config=None))) == QUANTISED_LINEARS


def test_the_config_alone_is_written_as_it_was_read(tmp_path):
    from transformers import AutoConfig

    AutoConfig.from_pretrained(checkpoint(FP8)).save_pretrained(tmp_path)
    released = json.loads((checkpoint(FP8) / "config.json").read_text())["quantization_config"]
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"] == released


# --- quantising while loading


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", NATIVE)
def test_a_16_bit_checkpoint_is_quantised_while_it_loads(kind, dtype, tmp_path):
    config_class, layer_class = NATIVE[kind]
    model = load(checkpoint("skywork-moe-tiny"), dtype=dtype, quantization_config=config_class())
    layers = quantised(model)
    assert len(layers) == QUANTISED_LINEARS
    assert {type(layer) for layer in layers.values()} == {layer_class}
    plain = load(checkpoint("skywork-moe-tiny")).state_dict()
    quantize = formats.quantize_int8 if kind == "int8" else formats.quantize_fp8
    for name, layer in layers.items():
        weight, scale = quantize(plain[f"{name}.weight"].to(dtype))
        assert torch.equal(layer.weight.view(torch.uint8), weight.view(torch.uint8))
        assert torch.equal(layer.weight_scale, scale)
    model.save_pretrained(tmp_path)
    again = load(tmp_path, dtype=dtype)
    assert torch.equal(golden_logits(again, "skywork-moe-tiny"), golden_logits(model, "skywork-moe-tiny"))
    restored = golden_logits(again.dequantize(), "skywork-moe-tiny")
    assert not quantised(again)
    assert not hasattr(again.config, "quantization_config")
    if dtype == torch.float32:
        for layer in layers.values():
            layer.quantize_activations = False  # as some CPUs do, which rounds more than the weights
        torch.testing.assert_close(restored, golden_logits(model, "skywork-moe-tiny"), rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", NATIVE)
def test_dense_models_base_models_and_tied_heads(kind, tmp_path):
    config_class, _ = NATIVE[kind]
    SkyworkForCausalLM(tiny_dense_config(tie_word_embeddings=True)).save_pretrained(tmp_path / "dense")
    model = load(tmp_path / "dense", quantization_config=config_class())
    assert len(quantised(model)) == 2 * 7
    assert model.lm_head.weight is model.model.embed_tokens.weight
    SkyworkMoeModel(tiny_moe_config()).save_pretrained(tmp_path / "base")
    whole = load(tmp_path / "base", quantization_config=config_class())
    assert len(quantised(whole)) == 2 * (4 + 4 * 3)
    whole.save_pretrained(tmp_path / "whole")
    base = SkyworkMoeModel.from_pretrained(tmp_path / "whole", dtype=torch.float32)
    ids = tokens()
    torch.testing.assert_close(base(ids).last_hidden_state, whole.model(ids).last_hidden_state)


def test_pickled_and_sharded_checkpoints(tmp_path):
    model = load(checkpoint("skywork-13b-tiny"), quantization_config=SkyworkInt8Config())
    assert len(quantised(model)) == model.config.num_hidden_layers * 7
    rows = golden("skywork-13b-tiny")
    logits = golden_logits(model, "skywork-13b-tiny")
    exact = rows["logits"][rows["attention_mask"].bool()]
    assert 0 < (logits - exact).norm() / exact.norm() < 0.05


def test_modules_to_not_convert(bf16_folder, tmp_path):
    config = SkyworkFp8Config(modules_to_not_convert=["self_attn", r"model.layers.0.block_sparse_moe"])
    # A name, the end of a name, or a pattern: "self_attn" alone is none of a linear's names.
    config.modules_to_not_convert = [r".*self_attn.*", "model.layers.0.block_sparse_moe"]
    model = load(bf16_folder, quantization_config=config)
    assert set(quantised(model)) == {
        f"model.layers.1.block_sparse_moe.experts.{expert}.w{matrix}" for expert in range(4) for matrix in (1, 2, 3)
    }
    model.save_pretrained(tmp_path / "saved")
    assert set(quantised(load(tmp_path / "saved"))) == set(quantised(model))


def test_static_needs_calibration(bf16_folder):
    with pytest.raises(ValueError, match=r"conversion/calibrate_fp8\.py"):
        load(bf16_folder, quantization_config=SkyworkFp8Config("static"))


@pytest.mark.parametrize("kind", NATIVE)
@pytest.mark.parametrize("device_map", [{"": "cpu"}, ON_DISK])
def test_device_maps(kind, device_map, bf16_folder, tmp_path):
    config_class, _ = NATIVE[kind]
    model = load(bf16_folder, quantization_config=config_class())
    model.save_pretrained(tmp_path / "saved")
    placed = load(tmp_path / "saved", device_map=device_map, offload_folder=tmp_path / "offload")
    ids = tokens()
    torch.testing.assert_close(placed(ids).logits, model(ids).logits)


# --- the experts layout


def test_fused_experts_are_not_left_in_16_bit(bf16_folder, tmp_path):
    with pytest.raises(ValueError, match="would leave the 3-D parameters of fused experts in 16 bit"):
        load(bf16_folder, experts_layout="fused", quantization_config=SkyworkInt8Config())
    load(bf16_folder, experts_layout="fused").save_pretrained(tmp_path / "fused")
    assert json.loads((tmp_path / "fused" / "config.json").read_text())["experts_layout"] == "fused"
    model = load(tmp_path / "fused", quantization_config=SkyworkInt8Config())
    assert model.config.experts_layout == "modular"
    assert len(quantised(model)) == 2 * (4 + 4 * 3)


@pytest.mark.parametrize("processes", [False, True])  # which share no weights
@torch.no_grad()
def test_a_decoded_token_wraps_no_codes_and_asks_no_idle_expert(processes, bf16_folder, monkeypatch):
    model = load(bf16_folder, quantization_config=SkyworkInt8Config())
    monkeypatch.setattr("skywork_hf.quantization.linear._as_codes", lambda *_: pytest.fail("wrapped"))
    monkeypatch.setattr("skywork_hf.modeling_skywork_moe._has_processes", lambda: processes)
    monkeypatch.setattr("skywork_hf.modeling_skywork_moe._runs_idle", lambda *_: pytest.fail("asked"))
    model(tokens(1, 1))


# --- FP8 to int8


def test_fp8_becomes_int8(tmp_path):
    exact = load(checkpoint(FP8)).dequantize(torch.float32).state_dict()
    model = load(checkpoint(FP8), quantization_config=SkyworkFp8Config(int8_devices="all"))
    assert {type(layer) for layer in quantised(model).values()} == {SkyworkInt8Linear}
    for name, layer in quantised(model).items():
        weight, scale = formats.quantize_int8(exact[f"{name}.weight"])
        assert torch.equal(layer.weight, weight)
        assert torch.equal(layer.weight_scale, scale)
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert isinstance(again.config.quantization_config, SkyworkInt8Config)
    assert torch.equal(golden_logits(again, FP8), golden_logits(model, FP8))


def test_fp8_becomes_int8_by_device(monkeypatch, tmp_path, caplog):
    def kinds(int8_devices: Any) -> dict[str, set[type]]:
        model = load(
            checkpoint(FP8),
            quantization_config=SkyworkFp8Config(int8_devices=int8_devices),
            device_map=ON_DISK,
            offload_folder=tmp_path,
        )
        golden_logits(model, FP8)
        return {
            part: {type(layer) for name, layer in quantised(model).items() if name.startswith(part)}
            for part in ("model.layers.0", "model.layers.1")
        }

    assert kinds("without_fp8") == {"model.layers.0": {SkyworkInt8Linear}, "model.layers.1": {SkyworkInt8Linear}}
    monkeypatch.setattr(matmul, "has_fp8_unit", lambda device: device.type == "cpu")
    assert kinds("without_fp8")["model.layers.0"] == {SkyworkFp8Linear}
    with pytest.raises(ValueError, match="give the device map as a dict"):
        load(checkpoint(FP8), quantization_config=SkyworkFp8Config(int8_devices=["cpu"]), device_map="auto")


def test_fp8_that_became_int8_is_read_from_the_offload_folder(tmp_path):
    config = SkyworkFp8Config(int8_devices="all")
    placed = load(checkpoint(FP8), quantization_config=config, device_map=ON_DISK, offload_folder=tmp_path)
    assert torch.equal(
        golden_logits(placed, FP8), golden_logits(load(checkpoint(FP8), quantization_config=config), FP8)
    )


def test_a_rule_by_device_reads_the_device_map(monkeypatch):
    from skywork_hf.quantization.quantizers import _becomes_int8

    places = {"model.layers.0": 0, "model.layers.1": 1, "model.layers.1.block_sparse_moe.experts.3": "cpu"}
    expert = "model.layers.1.block_sparse_moe.experts.{}.w1"
    names = ["model.layers.0.self_attn.q_proj", expert.format(0), expert.format(3)]
    assert [_becomes_int8(name, ["cpu"], places) for name in names] == [False, False, True]
    assert [_becomes_int8(name, [1, "cpu"], places) for name in names] == [False, True, True]
    monkeypatch.setattr(matmul, "has_fp8_unit", lambda device: device == torch.device("cuda:0"))
    assert [_becomes_int8(name, "without_fp8", places) for name in names] == [False, True, True]


def test_a_mixture_is_not_saved(tmp_path, monkeypatch, caplog):
    logging.getLogger("transformers").propagate = True
    logging.getLogger("skywork_hf").propagate = True
    monkeypatch.setattr("skywork_hf.quantization.quantizers._becomes_int8", lambda name, *_: ".layers.0." in name)
    model = load(checkpoint(FP8), quantization_config=SkyworkFp8Config(int8_devices=["cpu"]))
    assert {type(layer) for layer in quantised(model).values()} == {SkyworkFp8Linear, SkyworkInt8Linear}
    exact = expected(FP8, "logits_weight_only")
    assert (golden_logits(model, FP8) - exact).norm() / exact.norm() < 0.2
    with pytest.raises(ValueError, match="not serializable"):
        model.save_pretrained(tmp_path / "mixture")
    assert not (tmp_path / "mixture").exists()


def test_weights_that_are_quantised_while_loading_cannot_be_on_disk(bf16_folder, tmp_path):
    """accelerate would read the 16-bit weights of the files as the quantised ones."""
    for config in (SkyworkInt8Config(), SkyworkFp8Config()):
        with pytest.raises(ValueError, match="quantised while loading"):
            load(bf16_folder, device_map=ON_DISK, offload_folder=tmp_path / "offload", quantization_config=config)


# --- memory


@pytest.mark.parametrize("kind", NATIVE)
def test_bytes_are_those_predicted(kind, tmp_path):
    config_class, _ = NATIVE[kind]
    config = tiny_moe_config()
    SkyworkMoeForCausalLM(config).bfloat16().save_pretrained(tmp_path)
    model = load(tmp_path, dtype=torch.bfloat16, quantization_config=config_class())
    hidden, ffn, experts, vocabulary = 32, 48, 4, 67
    matrices = [(hidden, hidden)] * 4 + [(ffn, hidden), (ffn, hidden), (hidden, ffn)] * experts
    scales = sum(2 * rows for rows, _ in matrices) if kind == "int8" else 4 * len(matrices)
    layer = sum(rows * columns for rows, columns in matrices) + scales + 2 * (experts * hidden + 2 * hidden)
    rotary = 2 * 4 * (hidden // 4 // 2)  # frequencies and their originals, float32
    predicted = 2 * layer + 2 * (2 * vocabulary * hidden + hidden) + rotary
    actual = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    assert actual == predicted


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux what is mapped")
@pytest.mark.parametrize("kind", NATIVE)
def test_a_quantised_checkpoint_stays_mapped(kind, tmp_path):
    from test_weights import mapped_bytes

    config_class, _ = NATIVE[kind]
    SkyworkMoeForCausalLM(tiny_moe_config()).save_pretrained(tmp_path / "plain")
    load(tmp_path / "plain", quantization_config=config_class()).save_pretrained(tmp_path / "quantised")
    model = load(tmp_path / "quantised")
    model(tokens())
    assert mapped_bytes(model) == sum(parameter.nbytes for parameter in model.parameters())


# --- training through frozen weights


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", NATIVE)
def test_adapters_learn_through_quantised_weights(kind, checkpointing, bf16_folder, tmp_path):
    peft = pytest.importorskip("peft")
    config_class, _ = NATIVE[kind]
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "w1", "w2", "w3"], init_lora_weights=False)

    def gradients(model: Any) -> dict[str, torch.Tensor]:
        torch.manual_seed(1)
        adapted = peft.get_peft_model(model, lora).train()
        if checkpointing:
            adapted.gradient_checkpointing_enable()
            adapted.enable_input_require_grads()
        ids = torch.arange(3, 23).view(2, 10)
        adapted(input_ids=ids, labels=ids).loss.backward()
        return {name: value.grad for name, value in adapted.named_parameters() if value.requires_grad}

    model = load(bf16_folder, quantization_config=config_class())
    assert model.hf_quantizer.is_trainable
    real = load(bf16_folder, quantization_config=config_class()).dequantize()
    got, wanted = gradients(model), gradients(real)
    assert got.keys() == wanted.keys()
    assert all(".lora_" in name for name in got)
    assert sum(grad.abs().sum() > 0 for grad in got.values() if grad is not None) > 20
    for name, grad in wanted.items():
        if grad is not None:
            torch.testing.assert_close(got[name], grad, rtol=1e-3, atol=1e-5)


# --- static calibration


def test_calibration_writes_what_the_released_checkpoint_has(tmp_path, fp8_unit):
    model = load(checkpoint("skywork-moe-tiny"))
    exact = golden_logits(model, "skywork-moe-tiny")
    texts = [torch.randint(3, 4007, (1, 40)) for _ in range(8)]
    seen: dict[str, float] = {}
    layer = model.model.layers[1].self_attn.q_proj
    layer.register_forward_pre_hook(
        lambda module, inputs: seen.update(largest=max(seen.get("largest", 0), inputs[0].abs().max().item()))
    )
    scales = calibrate(model, texts)
    assert scales["model.layers.1.self_attn.q_proj"].item() == pytest.approx(seen["largest"] / 448)
    quantize_static(model, scales).save_pretrained(tmp_path)

    released, written = stored(checkpoint(FP8)), stored(tmp_path)
    names = {name.replace("act_scale", "input_scale"): (t.dtype, t.shape) for name, t in released.items()}
    assert {name: (tensor.dtype, tensor.shape) for name, tensor in written.items()} == names
    again = load(tmp_path)
    logits = golden_logits(again, "skywork-moe-tiny")
    assert torch.equal(logits, golden_logits(model, "skywork-moe-tiny"))
    assert 1e-4 < (logits - exact).norm() / exact.norm() < 0.5


def test_experts_that_no_token_reached(caplog):
    logging.getLogger("skywork_hf").propagate = True
    model = SkyworkMoeForCausalLM(tiny_moe_config(num_experts=16)).eval()
    scales = calibrate(model, [tokens(1, 2)])
    assert "experts were reached by no token" in caplog.text
    assert len(scales) == 2 * (4 + 16 * 3)
    assert all(scale > 0 and scale.isfinite() for scale in scales.values())
    with pytest.raises(ValueError, match="at least one text"):
        calibrate(model, [])


def test_the_calibration_script(tmp_path, monkeypatch):
    script = str(Path(__file__).parents[1] / "conversion" / "calibrate_fp8.py")
    (tmp_path / "texts.txt").write_text("西安是陕西的省会。\n\nParis is the capital of France.\n", encoding="utf-8")
    command = [script, str(checkpoint("skywork-moe-tiny")), str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", [*command, "--texts", str(tmp_path / "texts.txt")])
    runpy.run_path(script, run_name="__main__")
    assert load(tmp_path / "out").config.quantization_config.activation_scheme == "static"
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("西安").input_ids
    with pytest.raises(SystemExit, match="is there already"):
        runpy.run_path(script, run_name="__main__")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "texts.txt"]


# --- wrong input, each found before a layer runs


W1 = "model.layers.1.block_sparse_moe.experts.3.w1"


def damaged(kind: str, folder: Path, change: Any) -> Path:
    config_class, _ = NATIVE[kind]
    SkyworkMoeForCausalLM(tiny_moe_config()).save_pretrained(folder / "plain")
    load(folder / "plain", quantization_config=config_class()).save_pretrained(folder / "damaged")
    tensors = stored(folder / "damaged")
    change(tensors)
    save_file(tensors, folder / "damaged" / "model.safetensors", {"format": "pt"})
    return folder / "damaged"


@pytest.mark.parametrize("kind", NATIVE)
@pytest.mark.parametrize("value", [-1.0, 0.0, float("nan"), float("inf")])
def test_a_scale_must_be_a_number_above_0(kind, value, tmp_path):
    folder = damaged(kind, tmp_path, lambda tensors: tensors[f"{W1}.weight_scale"].view(-1)[-1:].fill_(value))
    with pytest.raises(ValueError, match=rf"`{W1}\.weight_scale` in .*model\.safetensors holds .*above 0"):
        load(folder)


@pytest.mark.parametrize(
    ("kind", "tensor", "message"),
    [
        ("fp8", None, r"weight_scale` is missing"),
        ("int8", None, r"weight_scale` is missing"),
        ("fp8", torch.ones(48), r"expected one float for the whole matrix"),
        ("int8", torch.ones(47, dtype=torch.bfloat16), r"one float for each row of `.*w1\.weight`, \[48\]"),
        ("int8", torch.ones(48, dtype=torch.int8), r"one float for each row"),
    ],
)
def test_a_scale_of_another_shape(kind, tensor, message, tmp_path):
    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[f"{W1}.weight_scale"]
        if tensor is not None:
            tensors[f"{W1}.weight_scale"] = tensor

    with pytest.raises(ValueError, match=message):
        load(damaged(kind, tmp_path, change))


@pytest.mark.parametrize("kind", NATIVE)
def test_a_weight_that_is_missing_or_not_quantised(kind, tmp_path):
    folder = damaged(kind, tmp_path, lambda tensors: tensors.update({f"{W1}.weight": torch.ones(48, 32)}))
    with pytest.raises(ValueError, match=rf"`{W1}\.weight` .* is stored as torch\.float32; config\.json says"):
        load(folder)
    folder = damaged(kind, tmp_path, lambda tensors: tensors.pop(f"{W1}.weight"))
    with pytest.raises(ValueError, match=rf"`{W1}\.weight` is missing"):
        load(folder)


def test_a_missing_activation_scale_names_the_way_out(tmp_path):
    shutil.copytree(checkpoint(FP8), tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    for file in tmp_path.glob("model-*.safetensors"):
        kept = {name: tensor for name, tensor in load_file(file).items() if not name.endswith("3.w1.act_scale")}
        save_file(kept, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r'w1\.input_scale` is missing.*activation_scheme="dynamic"'):
        load(tmp_path)
    load(tmp_path, quantization_config=SkyworkFp8Config("dynamic"))
    for wrong, message in (
        ({"activation_scheme": "sometimes"}, "'sometimes' is unknown"),
        ({}, "has no `activation_"),
    ):
        changed = {**config, "quantization_config": {"quant_method": "fp8", **wrong}}
        (tmp_path / "config.json").write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=message):
            load(tmp_path)
    config.pop("quantization_config")
    (tmp_path / "config.json").write_text(json.dumps(config))
    for options in ({}, {"quantization_config": SkyworkInt8Config()}):
        with pytest.raises(ValueError, match=r"is stored as torch\.float8_e4m3fn, and config.json has no"):
            load(tmp_path, **options)


def test_a_dtype_that_torch_cannot_hold(bf16_folder):
    file = bf16_folder / "model.safetensors"
    file.write_bytes(file.read_bytes().replace(b'"BF16"', b'"F6_E"', 1))
    with pytest.raises(ValueError, match=r"in .*model\.safetensors is stored as F6_E, which torch cannot hold"):
        load(bf16_folder)


def test_weights_that_are_not_finite_are_not_quantised(bf16_folder, caplog):
    logging.getLogger("transformers").propagate = True
    tensors = stored(bf16_folder)
    tensors[f"{W1}.weight"][0, 0] = float("nan")
    save_file(tensors, bf16_folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(RuntimeError):
        load(bf16_folder, quantization_config=SkyworkInt8Config())
    assert f"`{W1}.weight` holds values that are not finite" in caplog.text


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SkyworkFp8Config("per-tensor"), "`activation_scheme`='per-tensor' is unknown"),
        (lambda: SkyworkFp8Config(int8_devices="cpu"), "`int8_devices`='cpu'"),
        (lambda: SkyworkFp8Config(modules_to_not_convert="lm_head"), "expected a list of module names"),
        (lambda: SkyworkInt8Config("yes"), "`quantize_activations`='yes'"),
    ],
)
def test_wrong_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# --- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("kind", NATIVE)
def test_a_model_on_a_gpu_agrees_with_the_cpu(kind, bf16_folder):
    config_class, _ = NATIVE[kind]
    options = {"dtype": torch.bfloat16, "quantization_config": config_class()}
    ids = tokens()
    here = load(bf16_folder, **options)(ids).logits.float()
    there = load(bf16_folder, **options, device_map="cuda")(ids.cuda()).logits.float().cpu()
    assert (here - there).norm() / here.norm() < 0.1
