"""`skywork-hf verify`: equal is what computes the same, and nothing else."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import checkpoint, tiny_dense_config, tiny_moe_config
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from skywork_hf import SkyworkForCausalLM, SkyworkMoeForCausalLM
from skywork_hf.checkpoints.comparison import compare_checkpoints
from skywork_hf.checkpoints.convert import convert_checkpoint
from skywork_hf.cli import main

V_PROJ = "model.layers.1.self_attn.v_proj.weight"


@pytest.fixture
def pair(tmp_path) -> tuple[Path, Path]:
    """Two equal checkpoints."""
    SkyworkForCausalLM(tiny_dense_config()).save_pretrained(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    return tmp_path / "a", tmp_path / "b"


def change(folder: Path, edit: Any) -> None:
    """Let `edit` change `V_PROJ` in place, or return another."""
    tensors = load_file(folder / "model.safetensors")
    edited = edit(tensors[V_PROJ])
    tensors[V_PROJ] = tensors[V_PROJ] if edited is None else edited
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def set_first(value: float) -> Any:
    def edit(tensor: torch.Tensor) -> None:
        tensor[0, 0] = value

    return edit


def errors(first: Path, second: Path) -> dict[str, float]:
    return {difference.part: difference.error for difference in compare_checkpoints(first, second).differences}


def test_what_is_equal_is_said_to_be(pair, capsys):
    assert compare_checkpoints(*pair).is_equal
    main(["verify", *map(str, pair)])
    assert "config:" not in capsys.readouterr().out


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_no_numbers_differ_from_numbers_and_equal_themselves(value, pair):
    change(pair[1], set_first(value))
    for first, second in (pair, pair[::-1]):
        assert errors(first, second)["attention"] == math.inf
        with pytest.raises(SystemExit) as caught:
            main(["verify", str(first), str(second)])
        assert caught.value.code == 1
    change(pair[0], set_first(value))
    assert compare_checkpoints(*pair).is_equal


def test_a_checkpoint_of_nothing_but_nan(pair):
    change(pair[1], lambda tensor: torch.full_like(tensor, math.nan))
    assert errors(*pair) == {**errors(pair[0], pair[0]), "attention": math.inf}


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e29])
def test_the_size_of_the_values_does_not_matter(scale, pair):
    change(pair[0], lambda tensor: tensor * scale)
    change(pair[1], lambda tensor: tensor * scale * 1.5)
    assert errors(*pair)["attention"] == pytest.approx(0.5, rel=1e-5)


def test_small_differences_are_differences(pair):
    change(pair[0], set_first(0.0))
    change(pair[1], set_first(1e-25))
    assert 0 < errors(*pair)["attention"] < 1e-20
    for folder, value in zip(pair, (0.0, 1e-12), strict=True):
        change(folder, lambda tensor, value=value: torch.ones_like(tensor).double() + value)
    assert errors(*pair)["attention"] == pytest.approx(1e-12, rel=1e-3)


def test_zeros_of_both_signs_are_equal_and_nothing_is_unlike_something(pair):
    change(pair[0], torch.zeros_like)
    assert errors(*pair)["attention"] == math.inf
    change(pair[1], lambda tensor: -torch.zeros_like(tensor))
    assert compare_checkpoints(*pair).is_equal


# --- configs


def edit_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize(
    ("model_class", "config", "field", "value"),
    [
        (SkyworkForCausalLM, tiny_dense_config, "rope_parameters", {"rope_type": "default", "rope_theta": 5e5}),
        (SkyworkForCausalLM, tiny_dense_config, "rms_norm_eps", 1e-5),
        (SkyworkMoeForCausalLM, tiny_moe_config, "num_experts_per_tok", 3),
        (SkyworkMoeForCausalLM, tiny_moe_config, "moe_use_logits_norm", False),
        (SkyworkMoeForCausalLM, tiny_moe_config, "moe_gate_norm_std", 2.0),
    ],
)
def test_configs_that_compute_something_else(model_class, config, field, value, tmp_path, capsys):
    model_class(config()).save_pretrained(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    edit_config(tmp_path / "b", **{field: value})
    comparison = compare_checkpoints(tmp_path / "a", tmp_path / "b")
    assert list(comparison.fields) == [field]
    assert comparison.fields[field][1] == value
    with pytest.raises(SystemExit) as caught:
        main(["verify", str(tmp_path / "a"), str(tmp_path / "b")])
    assert caught.value.code == 1
    assert f"config: `{field}` is " in capsys.readouterr().out


def test_fields_that_change_no_result_are_no_difference(tmp_path):
    SkyworkMoeForCausalLM(tiny_moe_config()).save_pretrained(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    same = {"moe_feature_no_mul_topk": False, "moe_use_mixtral_gating": True}  # two ways to say it
    edit_config(tmp_path / "b", dtype="bfloat16", use_cache=False, router_aux_loss_coef=0.5, bos_token_id=7, **same)
    assert compare_checkpoints(tmp_path / "a", tmp_path / "b").is_equal


# --- quantised weights


def test_bitsandbytes_8_bit_is_compared_by_its_real_values(tmp_path):
    pytest.importorskip("bitsandbytes")
    SkyworkForCausalLM(tiny_dense_config()).save_pretrained(tmp_path / "plain")
    quantized = AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain", quantization_config=BitsAndBytesConfig(load_in_8bit=True)
    )
    quantized.save_pretrained(tmp_path / "quantized")
    comparison = compare_checkpoints(tmp_path / "plain", tmp_path / "quantized")
    assert (comparison.only_in_first, comparison.only_in_second, comparison.fields) == ([], [], {})
    assert 0 < errors(tmp_path / "plain", tmp_path / "quantized")["attention"] < 0.02
    again = convert_checkpoint(tmp_path / "quantized", tmp_path / "again")
    assert compare_checkpoints(tmp_path / "quantized", again).is_equal


def test_bitsandbytes_4_bit_is_refused(tmp_path):
    pytest.importorskip("bitsandbytes")
    SkyworkForCausalLM(tiny_dense_config(hidden_size=64)).save_pretrained(tmp_path / "plain")
    options = BitsAndBytesConfig(load_in_4bit=True)
    quantized = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=options)
    quantized.save_pretrained(tmp_path / "quantized")
    for folders in (("plain", "quantized"), ("quantized", "quantized")):
        with pytest.raises(ValueError, match=f"{tmp_path / 'quantized'} is in bitsandbytes' 4 bits"):
            compare_checkpoints(*(tmp_path / folder for folder in folders))


def test_weights_whose_scale_is_unknown_are_refused(pair):
    change(pair[1], lambda tensor: tensor.int())
    with pytest.raises(ValueError, match=f"`{V_PROJ}` in {pair[1]} is stored as torch.int32, without a scale"):
        compare_checkpoints(*pair)


# --- quantised activations


@pytest.fixture
def fp8_pair(tmp_path) -> tuple[Path, Path]:
    """Two equal checkpoints in static FP8."""
    for name in ("a", "b"):
        shutil.copytree(checkpoint("skywork-moe-tiny-fp8"), tmp_path / name)
    return tmp_path / "a", tmp_path / "b"


def rewrite(folder: Path, edit: Any) -> None:
    """Let `edit` say of every tensor, by its name, its new name and its value."""
    renamed = {}
    for file in folder.glob("model-*.safetensors"):
        tensors = dict(edit(name, tensor) for name, tensor in load_file(file).items())
        save_file(tensors, file, metadata={"format": "pt"})
        renamed |= dict.fromkeys(tensors, file.name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": renamed}))


def times_100(name: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor]:
    return name, tensor * 100 if name.endswith("act_scale") else tensor


def set_scheme(folder: Path, **scheme: Any) -> None:
    edit_config(folder, quantization_config={"quant_method": "fp8", **scheme})


def test_scales_of_activations_are_compared(fp8_pair):
    assert errors(*fp8_pair)["activation scales"] == 0
    assert compare_checkpoints(*fp8_pair).is_equal
    rewrite(fp8_pair[1], times_100)
    assert errors(*fp8_pair)["activation scales"] == pytest.approx(99)
    rewrite(fp8_pair[1], lambda name, tensor: (name.replace("act_scale", "input_scale"), tensor))
    assert errors(*fp8_pair)["activation scales"] == pytest.approx(99)


def test_both_spellings_of_scales_of_activations_are_the_same(fp8_pair):
    def newer(name: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor]:
        is_scale = name.endswith("act_scale")
        return name.replace("act_scale", "input_scale"), tensor.reshape(1) if is_scale else tensor

    rewrite(fp8_pair[1], newer)
    comparison = compare_checkpoints(*fp8_pair)
    assert comparison.is_equal
    assert "activation scales" in {difference.part for difference in comparison.differences}


def test_scales_of_activations_that_no_model_uses_are_no_difference(fp8_pair):
    rewrite(fp8_pair[1], times_100)
    for folder in fp8_pair:
        set_scheme(folder, activation_scheme="dynamic")
    assert compare_checkpoints(*fp8_pair).is_equal


def test_other_ways_to_quantise_activations_are_a_difference(fp8_pair, capsys):
    set_scheme(fp8_pair[1], activation_scheme="dynamic")
    assert list(compare_checkpoints(*fp8_pair).fields) == ["quantization_config"]
    with pytest.raises(SystemExit):
        main(["verify", *map(str, fp8_pair)])
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("config:")]
    assert "`quantization_config` is static activation scheme" in line
    assert "and dynamic activation scheme" in line
    set_scheme(fp8_pair[0], activation_scheme="dynamic", weight_only=True)
    assert compare_checkpoints(*fp8_pair).fields["quantization_config"][0] == "weight-only"
    set_scheme(fp8_pair[1], activation_scheme="none")  # another way to say it
    assert compare_checkpoints(*fp8_pair).is_equal


def test_int8_that_quantises_activations_and_int8_that_does_not(tmp_path):
    SkyworkForCausalLM(tiny_dense_config()).save_pretrained(tmp_path / "plain")
    pair = [convert_checkpoint(tmp_path / "plain", tmp_path / name, quantization="int8") for name in "ab"]
    assert compare_checkpoints(*pair).is_equal
    for said, same in ((True, True), (False, False)):
        edit_config(pair[1], quantization_config={"quant_method": "skywork_int8", "quantize_activations": said})
        assert compare_checkpoints(*pair).is_equal == same
