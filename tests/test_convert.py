"""Conversion: layouts, dtypes, quantisation, upcycling and adapters against golden outputs, other libraries and round
trips; interrupted, wrong and hostile input."""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import random
import runpy
import shutil
import signal
import subprocess
import sys
import time
import zlib
from collections import namedtuple
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import test_megatron
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import checkpoint, forked, golden, stir, tiny_dense_config, tiny_moe_config, tokens
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

from skywork_hf import (
    SkyworkForCausalLM,
    SkyworkForSequenceClassification,
    SkyworkFp8Config,
    SkyworkInt8Config,
    SkyworkMoeConfig,
    SkyworkMoeForCausalLM,
)
from skywork_hf.checkpoints import convert as convert_module
from skywork_hf.checkpoints import writer
from skywork_hf.checkpoints.comparison import compare_checkpoints
from skywork_hf.checkpoints.convert import (
    MANIFEST,
    convert_checkpoint,
    quantize_checkpoint,
    upcycle_checkpoint,
    write_checkpoint,
)
from skywork_hf.checkpoints.sources import read_source
from skywork_hf.cli import main

DENSE, MOE, FP8, RAW = (
    "skywork-13b-tiny",
    "skywork-moe-tiny",
    "skywork-moe-tiny-fp8",
    "skywork-moe-tiny-training-layout",
)
TOLERANCE = 2e-5


@torch.no_grad()
def check_golden(folder: Path, name: str, tolerance: float = TOLERANCE) -> Any:
    rows = golden(name)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    inputs = {key: rows[key] for key in ("input_ids", "attention_mask", "position_ids")}
    difference = (model(**inputs).logits - rows["logits"])[rows["attention_mask"].bool()].abs().max().item()
    assert difference <= tolerance
    greedy = rows["greedy_single"]
    generated = model.generate(
        inputs["input_ids"][:1],
        attention_mask=inputs["attention_mask"][:1],
        max_new_tokens=24,
        do_sample=False,
        eos_token_id=None,
    )
    assert torch.equal(generated, greedy)
    return model


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def assert_same_tensors(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype
        assert torch.equal(tensor.reshape(-1).view(torch.uint8), other[name].reshape(-1).view(torch.uint8)), name


def digest(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}


# --- layouts


@pytest.mark.parametrize("name", [DENSE, MOE, RAW])
@pytest.mark.parametrize("size", ["5GB", "300KB"])
def test_any_layout_becomes_the_hubs(name, size, tmp_path):
    folder = convert_checkpoint(checkpoint(name), tmp_path / "hub", max_shard_size=size)
    check_golden(folder, name)
    assert (folder / "model.safetensors").exists() == (size == "5GB")
    assert (folder / "tokenizer.json").exists()
    text = "陕西的省会是西安 and more"
    assert AutoTokenizer.from_pretrained(folder)(text) == AutoTokenizer.from_pretrained(checkpoint(name))(text)


def test_a_dense_checkpoint_is_a_llama(tmp_path):
    folder = convert_checkpoint(checkpoint(DENSE), tmp_path / "llama", to="llama")
    model = check_golden(folder, DENSE)
    assert type(model) is LlamaForCausalLM
    program = (
        "import sys; from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "ids = tokenizer('a </s> b').input_ids\n"
        "print(type(model).__name__, ids, tokenizer.padding_side, 'skywork_hf' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", program, str(folder)], capture_output=True, text=True, check=True)
    ids = AutoTokenizer.from_pretrained(checkpoint(DENSE))("a </s> b").input_ids
    assert run.stdout.split("\n")[0] == f"LlamaForCausalLM {ids} left False"
    with pytest.raises(ValueError, match="only a dense checkpoint"):
        convert_checkpoint(checkpoint(MOE), tmp_path / "moe-llama", to="llama")


def test_a_classifier_is_a_llama_too(tmp_path):
    model = saved(tmp_path / "source", SkyworkForSequenceClassification, num_labels=3)
    llama = LlamaForSequenceClassification.from_pretrained(
        convert_checkpoint(tmp_path / "source", tmp_path / "llama", to="llama")
    )
    assert llama.config.architectures == ["LlamaForSequenceClassification"]
    ids = tokens()
    assert torch.equal(llama(ids).logits, model(ids).logits)


def saved(folder: Path, model_class: Any = SkyworkForCausalLM, **fields: Any) -> Any:
    """A tiny dense model with random weights."""
    model = model_class(tiny_dense_config(**fields)).eval()
    model.save_pretrained(folder)
    return model


@settings(max_examples=12, deadline=None)
@given(
    experts=st.integers(2, 5),
    interval=st.integers(1, 2),
    two_layers=st.booleans(),
    multiplies=st.booleans(),
    tied=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    size=st.sampled_from(["5GB", "10KB"]),
)
def test_to_the_training_layout_and_back(
    tmp_path_factory, experts, interval, two_layers, multiplies, tied, dtype, size
):
    folder = tmp_path_factory.mktemp("round")
    config = tiny_moe_config(
        num_experts=[experts],
        moe_expert_interval=interval,
        moe_2layer_gate=two_layers,
        moe_feature_no_mul_topk=not multiplies,
        tie_word_embeddings=tied,
    )
    SkyworkMoeForCausalLM(config).to(dtype).save_pretrained(folder / "hub")
    raw = convert_checkpoint(folder / "hub", folder / "raw", to="training", max_shard_size=size)
    names = stored(raw)
    assert any(name.startswith("model.layers.1.mlp.moe.experts.experts.0.gate_proj.") for name in names)
    assert ("model.layers.1.mlp.moe.gate.wg.0.weight" in names) == two_layers
    back = convert_checkpoint(raw, folder / "back", max_shard_size=size)
    assert_same_tensors(stored(back), stored(folder / "hub"))
    again = AutoConfig.from_pretrained(back)
    assert (again.moe_2layer_gate, again.multiplies_input_by_top_k) == (two_layers, multiplies)
    assert compare_checkpoints(raw, folder / "hub").is_equal


def test_fields_that_a_training_config_lacks_have_the_training_codes_defaults(tmp_path):
    config = tiny_moe_config(moe_2layer_gate=True, moe_feature_no_mul_topk=False)
    SkyworkMoeForCausalLM(config).save_pretrained(tmp_path / "hub")
    raw = convert_checkpoint(tmp_path / "hub", tmp_path / "raw", to="training")
    written = json.loads((raw / "config.json").read_text())
    for field in ("moe_2layer_gate", "moe_feature_no_mul_topk"):
        del written[field]
    (raw / "config.json").write_text(json.dumps(written))
    ids = tokens()
    back = AutoModelForCausalLM.from_pretrained(convert_checkpoint(raw, tmp_path / "back"))
    hub = AutoModelForCausalLM.from_pretrained(tmp_path / "hub")
    assert torch.equal(back(ids).logits, hub(ids).logits)


def test_other_heads_keep_their_names(tmp_path):
    model = SkyworkForSequenceClassification(tiny_dense_config(num_labels=3))
    model.save_pretrained(tmp_path / "one")
    folder = convert_checkpoint(tmp_path / "one", tmp_path / "two")
    assert_same_tensors(stored(folder), stored(tmp_path / "one"))
    assert AutoConfig.from_pretrained(folder).architectures == ["SkyworkForSequenceClassification"]


def test_the_index_is_that_of_save_pretrained(tmp_path):
    saved(tmp_path / "one").save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    folder = convert_checkpoint(tmp_path / "one", tmp_path / "two", max_shard_size="20KB")
    ours, theirs = (
        json.loads((f / "model.safetensors.index.json").read_text()) for f in (folder, tmp_path / "sharded")
    )
    assert ours["metadata"]["total_size"] == theirs["metadata"]["total_size"]
    assert ours["weight_map"].keys() == theirs["weight_map"].keys()


# --- dtypes and quantisation


def test_another_dtype(tmp_path):
    folder = convert_checkpoint(checkpoint(MOE), tmp_path / "bf16", dtype="bfloat16")
    expected = {name: tensor.bfloat16() for name, tensor in stored(checkpoint(MOE)).items() if "golden" not in name}
    written = stored(folder)
    assert_same_tensors(written, {name: expected[name] for name in written})
    assert AutoConfig.from_pretrained(folder).dtype == torch.bfloat16
    for wrong in ("int8", "bf16", "nn", torch.int8):
        with pytest.raises(ValueError, match="expected one of float16, bfloat16, float32, float64"):
            convert_checkpoint(checkpoint(MOE), tmp_path / "int", dtype=wrong)


V_PROJ = "model.layers.1.self_attn.v_proj.weight"


def with_tensor(folder: Path, name: str, value: torch.Tensor) -> Path:
    """A tiny dense checkpoint with one tensor of a value that no training gives it."""
    saved(folder)
    save_file({**load_file(folder / "model.safetensors"), name: value}, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_values_that_a_dtype_cannot_hold_are_refused(tmp_path):
    large = torch.ones(32, 32)
    large[3, 4] = -1e6
    source = with_tensor(tmp_path / "source", V_PROJ, large)
    with pytest.raises(ValueError, match=rf"`{V_PROJ}` holds values beyond 65504, the largest of float16"):
        convert_checkpoint(source, tmp_path / "fp16", dtype="float16")
    convert_checkpoint(source, tmp_path / "bf16", dtype="bfloat16")
    large[3, 4] = torch.inf  # as it was before
    convert_checkpoint(with_tensor(tmp_path / "infinite", V_PROJ, large), tmp_path / "fp16", dtype="float16")


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool])
@pytest.mark.parametrize("change", [{"dtype": "float16"}, {"quantization": "int8"}])
def test_weights_that_are_no_floats_are_not_changed(dtype, change, tmp_path):
    source = with_tensor(tmp_path / "source", V_PROJ, torch.ones(32, 32, dtype=dtype))
    with pytest.raises(ValueError, match=rf"`{V_PROJ}` in .*"):
        convert_checkpoint(source, tmp_path / "out", **change)
    assert not (tmp_path / "out.unfinished").exists()


@pytest.mark.parametrize(
    ("method", "config"),
    [
        ("int8", SkyworkInt8Config()),
        ("fp8", SkyworkFp8Config()),
        ("fp8-weight-only", SkyworkFp8Config("none")),
    ],
)
def test_quantised_as_loading_and_saving_would(method, config, tmp_path):
    folder = quantize_checkpoint(checkpoint(MOE), tmp_path / "streamed", method, max_shard_size="200KB")
    AutoModelForCausalLM.from_pretrained(checkpoint(MOE), quantization_config=config).save_pretrained(
        tmp_path / "saved"
    )
    assert_same_tensors(stored(folder), stored(tmp_path / "saved"))
    one, other = (AutoConfig.from_pretrained(f).quantization_config for f in (folder, tmp_path / "saved"))
    assert one == other
    comparison = compare_checkpoints(checkpoint(MOE), folder)
    errors = {difference.part: difference.error for difference in comparison.differences}
    assert 0 < errors["experts"] < 0.05
    assert errors["gate"] == errors["norms"] == errors["head"] == 0
    with pytest.raises(ValueError, match="quantised already"):
        quantize_checkpoint(folder, tmp_path / "twice", "int8")
    with pytest.raises(ValueError, match="quantised already"):
        convert_checkpoint(folder, tmp_path / "cast", dtype="float32")


def test_a_quantised_checkpoint_is_resharded(tmp_path):
    folder = convert_checkpoint(checkpoint(FP8), tmp_path / "again", max_shard_size="150KB")
    before = {name: t for name, t in stored(checkpoint(FP8)).items() if name.startswith(("model.", "lm_head."))}
    assert_same_tensors(stored(folder), before)
    assert AutoModelForCausalLM.from_pretrained(folder).hf_quantizer is not None


# --- upcycling and adapters


@pytest.mark.parametrize("experts", [4, 8, 16])
@pytest.mark.parametrize("normalised", [True, False])
def test_an_upcycled_model_computes_what_the_dense_one_does(experts, normalised, tmp_path):
    folder = upcycle_checkpoint(
        checkpoint(DENSE), tmp_path / "moe", experts, moe_use_logits_norm=normalised, max_shard_size="400KB"
    )
    model = check_golden(folder, DENSE, tolerance=1e-5)
    assert isinstance(model, SkyworkMoeForCausalLM)
    assert model.config.num_local_experts == experts


def test_upcycling_every_second_layer_with_a_seed_and_noise(tmp_path):
    every_second = upcycle_checkpoint(checkpoint(DENSE), tmp_path / "second", 4, interval=2)
    check_golden(every_second, DENSE, tolerance=1e-5)
    names = stored(every_second)
    assert "model.layers.0.mlp.up_proj.weight" in names
    assert "model.layers.1.block_sparse_moe.experts.3.w3.weight" in names

    def upcycled(name: str, **options: Any) -> dict[str, torch.Tensor]:
        return stored(upcycle_checkpoint(checkpoint(DENSE), tmp_path / name, 4, **options))

    one, same, other = upcycled("a", noise=0.1), upcycled("b", noise=0.1), upcycled("c", noise=0.1, seed=1)
    gate, expert = ("model.layers.0.block_sparse_moe." + name for name in ("gate.weight", "experts.{}.w1.weight"))
    assert_same_tensors(one, same)
    assert not torch.equal(one[gate], other[gate])
    dense = stored(convert_checkpoint(checkpoint(DENSE), tmp_path / "dense"))["model.layers.0.mlp.gate_proj.weight"]
    noise = [one[expert.format(number)] - dense for number in range(4)]
    assert all(n.std().item() == pytest.approx(0.1 * dense.std().item(), rel=0.1) for n in noise)
    assert not torch.equal(noise[0], noise[1])
    with pytest.raises(ValueError, match="has experts already"):
        upcycle_checkpoint(checkpoint(MOE), tmp_path / "again", 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"experts": 1}, "`experts`=1: expected at least 2"),
        ({"experts": -3}, "`experts`=-3: expected at least 2"),
        ({"top_k": 5}, "`top_k`=5: expected 1 to `experts`=4"),
        ({"top_k": 0}, "`top_k`=0: expected 1 to `experts`=4"),
        ({"interval": 9}, r"`interval`=9 \(--layers\): expected 1 to 2"),
        ({"interval": 0}, r"`interval`=0 \(--layers\): expected 1 to 2"),
        ({"noise": float("nan")}, "`noise`=nan: expected a number from 0 to 1000"),
        ({"noise": float("inf")}, "`noise`=inf"),
        ({"noise": -1.0}, r"`noise`=-1\.0"),
    ],
)
def test_arguments_of_upcycling_that_make_no_sense(arguments, message, tmp_path):
    saved(tmp_path / "dense")
    with pytest.raises(ValueError, match=message):
        upcycle_checkpoint(tmp_path / "dense", tmp_path / "moe", **{"experts": 4, **arguments})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense"]


def test_a_classifier_is_not_upcycled(tmp_path):
    saved(tmp_path / "dense", SkyworkForSequenceClassification)
    with pytest.raises(ValueError, match=r"holds `score\.weight`, which a MoE model has no place for"):
        upcycle_checkpoint(tmp_path / "dense", tmp_path / "moe", 4)


def adapter_of(model: Any, folder: Path, **options: Any) -> Any:
    """An adapter with random weights, saved; the model with it merged by PEFT."""
    peft = pytest.importorskip("peft")
    config = options.pop("config", None) or peft.LoraConfig(init_lora_weights=False, **options)
    adapted = peft.get_peft_model(model, config)
    torch.manual_seed(3)
    stir(adapted)
    adapted.save_pretrained(folder)
    return adapted.merge_and_unload()


@pytest.mark.parametrize(
    "options",
    [
        {"r": 2, "target_modules": ["q_proj", "w1", "w2"], "task_type": "CAUSAL_LM"},
        {"r": 4, "target_modules": "all-linear", "use_rslora": True, "rank_pattern": {r"experts\.1\.w3": 2}},
        {"r": 2, "target_modules": ["v_proj", "w3"], "use_dora": True, "alpha_pattern": {"v_proj": 3}},
        {"r": 2, "target_modules": ["o_proj"], "modules_to_save": ["lm_head"]},
        {"r": 2, "target_modules": ["embed_tokens", "k_proj"]},
        {"r": 2, "target_modules": ["k_proj"], "trainable_token_indices": [5, 3]},
        {"r": 2, "target_modules": ["w2"], "trainable_token_indices": {"lm_head": [7], "embed_tokens": [3, 5]}},
    ],
    ids=["lora", "rslora with patterns", "dora", "whole modules", "embeddings", "tokens", "tokens of both ends"],
)
def test_an_adapter_is_merged_as_peft_merges_it(options, tmp_path):
    model = SkyworkMoeForCausalLM(tiny_moe_config())
    model.save_pretrained(tmp_path / "base")
    merged = adapter_of(model, tmp_path / "adapter", **options)
    folder = convert_checkpoint(tmp_path / "base", tmp_path / "merged", adapter=tmp_path / "adapter")
    written = stored(folder)
    changed = compare_checkpoints(tmp_path / "base", folder)
    assert any(difference.error > 0.01 for difference in changed.differences)
    for name, tensor in merged.state_dict().items():
        torch.testing.assert_close(written[name], tensor, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("tokens", [{}, {"trainable_token_indices": {"embed_tokens": [4007, 4008, 4009]}}])
def test_an_adapter_with_tokens_of_its_own_brings_them(tokens, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint(DENSE))
    model = AutoModelForCausalLM.from_pretrained(checkpoint(DENSE))
    assert tokenizer.add_chat_tokens(model) == 3
    tokenizer.save_pretrained(tmp_path / "adapter")
    merged = adapter_of(model, tmp_path / "adapter", r=2, target_modules=["q_proj"], **tokens)
    folder = convert_checkpoint(checkpoint(DENSE), tmp_path / "merged", adapter=tmp_path / "adapter")
    again = AutoModelForCausalLM.from_pretrained(folder)
    assert again.config.vocab_size == len(tokenizer) == len(again.get_input_embeddings().weight)
    ids = AutoTokenizer.from_pretrained(folder).apply_chat_template(
        [{"role": "user", "content": "你好"}], return_tensors="pt"
    )["input_ids"]
    assert ids[0, 2] == 4007
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, merged(ids).logits, atol=1e-5, rtol=1e-5)


def test_half_of_a_larger_vocabulary_is_refused(tmp_path):
    model = SkyworkMoeForCausalLM(tiny_moe_config())
    model.save_pretrained(tmp_path / "base")
    model.resize_token_embeddings(70)
    adapter_of(model, tmp_path / "adapter", r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    kept = {name: tensor for name, tensor in load_file(file).items() if "lm_head" not in name}
    save_file(kept, file)
    with pytest.raises(ValueError, match=r"embed_tokens\.weight` has 70 rows and `lm_head\.weight` 67"):
        convert_checkpoint(tmp_path / "base", tmp_path / "merged", adapter=tmp_path / "adapter")


def test_adapters_that_do_not_fit(tmp_path):
    model = SkyworkMoeForCausalLM(tiny_moe_config())
    model.save_pretrained(tmp_path / "base")
    adapter_of(model, tmp_path / "adapter", r=2, target_modules=["q_proj", "w1"])
    SkyworkForCausalLM(tiny_dense_config()).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"adapts `model\.layers\.0\.block_sparse_moe\.experts\.0\.w1\.weight` and"):
        convert_checkpoint(tmp_path / "other", tmp_path / "merged", adapter=tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"no adapter_config\.json"):
        convert_checkpoint(tmp_path / "base", tmp_path / "merged", adapter=tmp_path / "base")
    assert not (tmp_path / "merged").exists()


# --- the manifest


@pytest.mark.parametrize("name", [DENSE, RAW])
def test_every_source_tensor_is_accounted_for(name, tmp_path):
    folder = convert_checkpoint(checkpoint(name), tmp_path / "hub", max_shard_size="300KB", dtype="bfloat16")
    manifest = json.loads((folder / MANIFEST).read_text())
    sources = {
        (file.name, key)
        for file in checkpoint(name).glob("*.bin")
        for key in torch.load(file, weights_only=True, map_location="meta")
    }
    used = [(source["file"], source["name"]) for entry in manifest["tensors"] for source in entry["sources"]]
    ignored = [(tensor["file"], tensor["name"]) for tensor in manifest["ignored"]]
    assert sorted([*used, *ignored]) == sorted(sources)
    for product in (product for entry in manifest["tensors"] for product in entry["products"]):
        with safe_open(folder / product["file"], framework="pt") as file:
            tensor = file.get_tensor(product["name"])
        assert str(tensor.dtype) == f"torch.{product['dtype']}"
        assert list(tensor.shape) == product["shape"]
        assert f"{zlib.crc32(tensor.view(torch.uint8).numpy().tobytes()):08x}" == product["crc32"]


def test_a_value_that_was_not_written_as_it_was_read_is_found(tmp_path, monkeypatch):
    real = convert_module.finish_shard

    def flipped(file: Path) -> None:
        real(file)
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)

    monkeypatch.setattr(convert_module, "finish_shard", flipped)
    with pytest.raises(ValueError, match="is not what was to be written"):
        convert_checkpoint(checkpoint(MOE), tmp_path / "hub")
    assert not (tmp_path / "hub").exists()
    convert_checkpoint(checkpoint(MOE), tmp_path / "unverified", verify=False)


@pytest.mark.parametrize("what", ["changed", "cut off", "gone"])
def test_what_verification_found_wrong_is_written_again(what, tmp_path, monkeypatch):
    saved(tmp_path / "source")
    expected = digest(convert_checkpoint(tmp_path / "source", tmp_path / "whole", max_shard_size="20KB"))
    real = convert_module.finish_shard

    def failing(file: Path) -> None:
        real(file)
        if "00002" not in file.name:
            return
        content = file.read_bytes()
        file.write_bytes(content[:-1] + b"x" if what == "changed" else content[:-100])
        if what == "gone":
            file.unlink()

    monkeypatch.setattr(convert_module, "finish_shard", failing)
    with pytest.raises(
        ValueError, match=r"`model\..*` in .*00002.* is not what was to be written.*`resume` writes it"
    ):
        convert_checkpoint(tmp_path / "source", tmp_path / "hub", max_shard_size="20KB")
    monkeypatch.undo()
    written = []
    count_shards(monkeypatch, written)
    convert_checkpoint(tmp_path / "source", tmp_path / "hub", max_shard_size="20KB", resume=True)
    assert len(written) == 1
    assert digest(tmp_path / "hub") == expected


def count_shards(monkeypatch: pytest.MonkeyPatch, written: list[Any]) -> None:
    real = convert_module.write_shard

    def counting(*arguments: Any) -> Any:
        written.append(arguments[0])
        return real(*arguments)

    monkeypatch.setattr(convert_module, "write_shard", counting)


# --- interrupted


def writes_slowly(source: Path, target: Path) -> None:
    real = writer._write

    def slow(*arguments: Any) -> None:
        time.sleep(0.03)
        real(*arguments)

    writer._write = slow
    convert_checkpoint(source, target, max_shard_size="100KB", resume=True)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="each conversion is in a process of its own")
@pytest.mark.parametrize("kills", [3, pytest.param(30, marks=pytest.mark.soak)])
def test_killed_at_any_moment_and_resumed_it_ends_byte_equal(kills, tmp_path):
    source, target = checkpoint(MOE), tmp_path / "hub"
    expected = digest(convert_checkpoint(source, tmp_path / "whole", max_shard_size="100KB"))
    before = digest(source)
    moments = random.Random(0)
    killed = 0
    while not target.exists():
        child = forked(lambda: writes_slowly(source, target))
        if killed < kills:
            time.sleep(moments.uniform(0.0, 0.4 if kills < 10 else 0.1))
            os.kill(child, signal.SIGKILL)
            killed += os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        else:
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert not target.exists() or digest(target) == expected
    assert digest(target) == expected
    assert digest(source) == before
    assert not (tmp_path / "hub.unfinished").exists()
    assert killed > 1


def converts(source: Any, target: Path, resume: bool = True, lives: int | None = None) -> bool:
    """Convert in a process of its own, which dies before it changes the disk for the time after `lives`; whether it
    lived on to the end."""

    def convert() -> None:
        left = itertools.repeat(1) if lives is None else iter(range(lives, -1, -1))

        def hook(event: str, arguments: Any) -> None:
            opens = event == "open" and str(arguments[0]).startswith(str(target))
            if (opens or event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir")) and not next(left):
                os._exit(9)

        os.fsync = lambda descriptor: None  # a process that dies loses nothing that it wrote
        sys.addaudithook(hook)
        write_checkpoint(source, target, max_shard_size="12KB", resume=resume)

    code = os.waitstatus_to_exitcode(os.waitpid(forked(convert), 0)[1])
    assert code in (0, 9)
    return code == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="each conversion is in a process of its own")
@pytest.mark.parametrize("stride", [9, pytest.param(1, marks=pytest.mark.soak)])
def test_killed_before_changes_of_the_disk_and_resumed_it_ends_byte_equal(stride, tmp_path):
    """Killed once, before each change of the disk (`make test`: before some), and killed again and again, each time
    that many changes later."""
    saved(tmp_path / "source", num_hidden_layers=1, vocab_size=16, intermediate_size=16)
    folder = tmp_path / "folder"
    folder.mkdir()
    source = read_source(tmp_path / "source")
    assert converts(source, folder / "whole", resume=False)
    expected = digest(folder / "whole")

    def ends_equal() -> None:
        assert digest(folder / "out") == expected, lives
        assert sorted(path.name for path in folder.iterdir()) == ["out", "whole"], lives
        shutil.rmtree(folder / "out")

    for lives in itertools.count(0, stride):
        if converts(source, folder / "out", resume=False, lives=lives):
            break
        if (folder / "out").exists():
            assert digest(folder / "out") == expected, lives
        assert converts(source, folder / "out"), lives
        ends_equal()
    assert lives > 20
    ends_equal()
    for lives in itertools.count(0, stride):
        if converts(source, folder / "out", lives=lives):
            break
    ends_equal()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="each conversion is in a process of its own")
@pytest.mark.parametrize("rounds", [2, pytest.param(40, marks=pytest.mark.soak)])
def test_of_two_at_once_one_writes_and_the_other_is_refused(rounds, tmp_path):
    source = read_source(checkpoint(DENSE))
    expected = digest(write_checkpoint(source, tmp_path / "whole", max_shard_size="300KB"))

    def convert(start: float) -> None:
        time.sleep(max(0.0, start - time.monotonic()))
        try:
            write_checkpoint(source, tmp_path / "out", max_shard_size="300KB")
        except ValueError as error:
            os._exit(9 if "is there already" in str(error) else 1)

    for _ in range(rounds):
        start = time.monotonic() + 0.2
        both = [forked(partial(convert, start)) for _ in range(2)]
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in both]
        assert sorted(codes) == [0, 9]
        assert digest(tmp_path / "out") == expected
        shutil.rmtree(tmp_path / "out")


def test_a_lock_on_a_folder_that_another_has_made_anew_is_none(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")
    real, unfinished = fcntl.flock, tmp_path / "out.unfinished"
    unfinished.mkdir()

    def late(*arguments: Any) -> None:
        shutil.rmtree(unfinished)
        unfinished.mkdir()
        (unfinished / "fingerprint").write_text("0" * 64)
        real(*arguments)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(ValueError, match="another conversion writes it at this moment"):
        write_checkpoint(read_source(checkpoint(DENSE)), tmp_path / "out")
    assert (unfinished / "fingerprint").exists()


def test_everything_is_on_the_disk_before_the_result_has_its_name(tmp_path, monkeypatch):
    real, synced = os.fsync, set()

    def syncing(descriptor: int) -> None:
        synced.add(os.fstat(descriptor).st_ino)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", syncing)
    real_rename, before = Path.rename, []

    def renaming(path: Path, target: Path) -> Path:
        if target == tmp_path / "hub":
            before.extend(synced)
        return real_rename(path, target)

    monkeypatch.setattr(Path, "rename", renaming)
    folder = convert_checkpoint(checkpoint(DENSE), tmp_path / "hub", max_shard_size="300KB")
    assert {path.name for path in [folder, *folder.iterdir()] if path.stat().st_ino not in before} == set()
    assert tmp_path.stat().st_ino in synced


def test_resuming_what_is_finished_changes_nothing(tmp_path):
    saved(tmp_path / "source")
    folder = convert_checkpoint(tmp_path / "source", tmp_path / "hub")
    before = digest(folder)
    assert convert_checkpoint(tmp_path / "source", folder, resume=True) == folder
    assert digest(folder) == before
    with pytest.raises(ValueError, match="is there already"):
        convert_checkpoint(tmp_path / "source", folder, dtype="float16", resume=True)


def test_a_result_is_finished_only_if_it_is_whole_and_as_verified_as_asked_for(tmp_path):
    saved(tmp_path / "source")
    shutil.copy(checkpoint(DENSE) / "tokenizer.model", tmp_path / "source")
    convert = partial(convert_checkpoint, tmp_path / "source", max_shard_size="20KB", resume=True)
    unverified = convert(tmp_path / "unverified", verify=False)
    assert convert(unverified, verify=False) == unverified
    with pytest.raises(ValueError, match="is there already"):
        convert(unverified)
    lacking = convert(tmp_path / "lacking")
    min(lacking.glob("*.safetensors")).unlink()
    with pytest.raises(ValueError, match="is there already"):
        convert(lacking)
    older = convert(tmp_path / "older")
    os.utime(tmp_path / "source" / "tokenizer.model", (1, 1))
    with pytest.raises(ValueError, match="is there already"):
        convert(older)


def test_damaged_notes_are_made_anew(tmp_path, monkeypatch):
    saved(tmp_path / "source")
    stopped_after(monkeypatch, 2)
    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(tmp_path / "source", tmp_path / "hub", max_shard_size="20KB")
    monkeypatch.undo()
    min((tmp_path / "hub.unfinished" / "notes").iterdir()).write_text("[[")
    convert_checkpoint(tmp_path / "source", tmp_path / "hub", max_shard_size="20KB", resume=True)
    assert compare_checkpoints(tmp_path / "source", tmp_path / "hub").is_equal


@pytest.mark.parametrize("destination", [".", "..", "/"])
def test_a_destination_needs_a_name(destination):
    with pytest.raises(ValueError, match="cannot be made: expected the name of a new folder"):
        convert_checkpoint(checkpoint(DENSE), destination)


def test_resuming_with_another_seed_or_noise_is_refused(tmp_path, monkeypatch):
    saved(tmp_path / "dense")
    upcycled = partial(upcycle_checkpoint, tmp_path / "dense", tmp_path / "moe", 4, max_shard_size="40KB")
    stopped_after(monkeypatch, 2)
    with pytest.raises(KeyboardInterrupt):
        upcycled(noise=0.1)
    monkeypatch.undo()
    for other in ({"noise": 0.1, "seed": 1}, {"noise": 0.2}, {}):
        with pytest.raises(ValueError, match="begun from another source or with other arguments"):
            upcycled(resume=True, **other)
    manifest = json.loads((upcycled(resume=True, noise=0.1) / MANIFEST).read_text())
    assert manifest["changes"] == ["upcycled: 4 experts, top 2, interval 1, seed 0, noise 0.1"]


def test_resuming_with_another_adapter_config_is_refused(tmp_path, monkeypatch):
    adapter_of(saved(tmp_path / "base"), tmp_path / "adapter", r=2, target_modules=["q_proj"])
    merging = partial(
        convert_checkpoint,
        tmp_path / "base",
        tmp_path / "out",
        adapter=tmp_path / "adapter",
        dtype="float32",
        quantization="int8",
        max_shard_size="10KB",
    )
    stopped_after(monkeypatch, 2)
    with pytest.raises(KeyboardInterrupt):
        merging()
    monkeypatch.undo()
    file = tmp_path / "adapter" / "adapter_config.json"
    before = file.read_text()
    file.write_text(json.dumps({**json.loads(before), "lora_alpha": 64}))
    with pytest.raises(ValueError, match="begun from another source or with other arguments"):
        merging(resume=True)
    file.write_text(before)
    changes = json.loads((merging(resume=True) / MANIFEST).read_text())["changes"]
    digest_of_config = hashlib.sha256(before.encode()).hexdigest()
    assert changes == [
        f"merged adapter, SHA-256 of its config {digest_of_config}",
        "cast to float32",
        "quantised to int8",
    ]


def test_resuming_with_other_arguments_or_sources_is_refused(tmp_path, monkeypatch):
    source = tmp_path / "source"
    shutil.copytree(checkpoint(MOE), source)
    stopped_after(monkeypatch, 2)
    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(source, tmp_path / "hub", max_shard_size="100KB")
    monkeypatch.undo()
    with pytest.raises(ValueError, match="begun from another source or with other arguments"):
        convert_checkpoint(source, tmp_path / "hub", max_shard_size="200KB", resume=True)
    file = source / "model-00001-of-00003.safetensors"
    os.utime(file, (1, 1))
    with pytest.raises(ValueError, match="begun from another source or with other arguments"):
        convert_checkpoint(source, tmp_path / "hub", max_shard_size="100KB", resume=True)
    convert_checkpoint(source, tmp_path / "hub", max_shard_size="100KB")  # without `resume`: from the beginning
    check_golden(tmp_path / "hub", MOE)


def stopped_after(monkeypatch: pytest.MonkeyPatch, shards: int) -> None:
    real, written = convert_module.write_shard, []

    def stopping(*arguments: Any) -> Any:
        if len(written) == shards:
            raise KeyboardInterrupt
        written.append(arguments)
        return real(*arguments)

    monkeypatch.setattr(convert_module, "write_shard", stopping)


def test_a_full_disk_leaves_what_is_finished(tmp_path, monkeypatch):
    calls = []

    def filling(real: Any, *arguments: Any) -> int:
        calls.append(arguments)
        if len(calls) > 40:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*arguments)

    for name in ("pwrite", "copy_file_range"):
        monkeypatch.setattr(os, name, partial(filling, getattr(os, name)))
    with pytest.raises(OSError, match="is full: make room and go on with `resume`"):
        convert_checkpoint(checkpoint(MOE), tmp_path / "hub", max_shard_size="100KB")
    assert not (tmp_path / "hub").exists()
    finished = digest_of_shards(tmp_path / "hub.unfinished" / "result")
    assert finished
    monkeypatch.undo()
    convert_checkpoint(checkpoint(MOE), tmp_path / "hub", max_shard_size="100KB", resume=True)
    assert finished.items() <= digest(tmp_path / "hub").items()


@pytest.mark.parametrize("refuses", ["each", "every second", "none"])
def test_what_the_kernel_does_not_copy_is_written(refuses, tmp_path, monkeypatch):
    real, calls = os.copy_file_range, []

    def reluctant(source: int, target: int, size: int, *offsets: int) -> int:
        calls.append(size)
        if refuses == "each" or (refuses == "every second" and len(calls) % 2 == 0):
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        return real(source, target, max(1, size // 3), *offsets)

    convert_checkpoint(checkpoint(MOE), tmp_path / "plain", verify=False)
    monkeypatch.setattr(os, "copy_file_range", reluctant)
    convert_checkpoint(checkpoint(MOE), tmp_path / "written", verify=False)
    assert calls
    assert digest(tmp_path / "written") == digest(tmp_path / "plain")


def digest_of_shards(folder: Path) -> dict[str, str]:
    return {name: value for name, value in digest_files(folder).items() if name.endswith(".safetensors")}


def digest_files(folder: Path) -> dict[str, str]:
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in folder.iterdir() if f.is_file()}


def test_too_little_room_is_said_before_anything_is_written(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(100, 100, 2**20))
    with pytest.raises(OSError, match=r"has 0\.0009766 GiB free and 0\.00497\d* GiB are still to be written"):
        convert_checkpoint(checkpoint(MOE), tmp_path / "hub")
    assert not list(tmp_path.iterdir())


def test_a_shard_that_is_written_again_needs_its_room_once(tmp_path, monkeypatch):
    saved(tmp_path / "source")
    size = sum(tensor.nbytes for tensor in stored(tmp_path / "source").values())
    usage, room = namedtuple("usage", "total used free"), size + convert_module._SPARE_BYTES + 4096

    def disk_usage(folder: Path) -> Any:
        used = sum(file.stat().st_size for file in tmp_path.glob("hub.unfinished/**/*.safetensors*"))
        return usage(room, used, room - used)

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    with monkeypatch.context() as stopped:
        stopped.setattr(convert_module, "finish_shard", lambda file: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            convert_checkpoint(tmp_path / "source", tmp_path / "hub")
    assert disk_usage(tmp_path).used > size
    convert_checkpoint(tmp_path / "source", tmp_path / "hub", resume=True)


# --- wrong input


def broken_source(folder: Path, what: str) -> Path:
    """A copy of the golden MoE checkpoint with something wrong."""
    shutil.copytree(checkpoint(MOE), folder)
    shard = folder / "model-00002-of-00003.safetensors"
    tensors = load_file(shard)
    name = next(iter(tensors))
    if what == "missing tensor":
        del tensors[name]
    elif what == "unexpected tensor":
        tensors["model.layers.0.other.weight"] = torch.ones(2)
    elif what == "shape":
        tensors[name] = torch.ones(3, 5)
    elif what == "two sources":
        tensors |= {"lm_head.weight": torch.ones(4007, 64), "model.embed_tokens.weight": torch.ones(4007, 64)}
    save_file(tensors, shard)
    if what == "cut off":
        shard.write_bytes(shard.read_bytes()[:-100])
    elif what == "missing file":
        shard.unlink()
    elif what == "no config":
        (folder / "config.json").unlink()
    return folder


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("missing tensor", "tensors are missing: "),
        ("unexpected tensor", r"tensors are unexpected: model\.layers\.0\.other\.weight"),
        ("shape", r"contradictions: .* is \[3, 5\]"),
        ("two sources", "is in .* too: expected one source"),
        ("cut off", "it is cut off or damaged"),
        ("missing file", "files are missing: model-00002-of-00003"),
        ("no config", r"config\.json is not there"),
    ],
)
def test_a_source_that_is_not_whole(what, message, tmp_path):
    source = broken_source(tmp_path / "source", what)
    before = digest(source)
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(source, tmp_path / "hub")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]
    assert digest(source) == before


class Hostile:
    def __reduce__(self) -> Any:
        return (os.system, ("touch hostile",))


def test_a_pickle_with_more_than_tensors_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(checkpoint(RAW), tmp_path / "source")
    content = torch.load(tmp_path / "source" / "pytorch_model.bin", weights_only=True)
    torch.save({**content, "extra": Hostile()}, tmp_path / "source" / "pytorch_model.bin")
    with pytest.raises(ValueError, match="Pickles that hold anything but plain tensors are refused"):
        convert_checkpoint(tmp_path / "source", tmp_path / "hub")
    assert not (tmp_path / "hostile").exists()


def test_what_is_there_is_not_overwritten(tmp_path):
    (tmp_path / "hub").mkdir()
    with pytest.raises(ValueError, match="is there already"):
        convert_checkpoint(checkpoint(MOE), tmp_path / "hub")
    with pytest.raises(ValueError, match="expected one of hub, training, llama"):
        convert_checkpoint(checkpoint(MOE), tmp_path / "other", to="onnx")
    with pytest.raises(ValueError, match="expected one of int8, fp8, fp8-weight-only"):
        convert_checkpoint(checkpoint(MOE), tmp_path / "other", quantization="int3")


@pytest.mark.parametrize(
    ("there", "message"),
    [
        ("checkpoint", r"hub\.unfinished holds `config\.json`, which no interrupted conversion has left"),
        ("notes.txt", r"holds `notes\.txt`"),
        ("result/model.safetensors", "holds `result`"),
        ("fingerprint", "holds `fingerprint`"),
        ("a file", r"hub\.unfinished is there already and no folder"),
        ("a link", r"hub\.unfinished is there already and no folder"),
    ],
)
@pytest.mark.parametrize("resume", [False, True])
def test_nothing_is_removed_but_what_a_conversion_has_left(there, message, resume, tmp_path):
    source, unfinished = tmp_path / "source", tmp_path / "hub.unfinished"
    saved(source)
    (tmp_path / "elsewhere").mkdir()
    if there == "checkpoint":
        source = unfinished
        saved(source)
    elif there == "a file":
        unfinished.write_text("mine")
    elif there == "a link":
        unfinished.symlink_to(tmp_path / "elsewhere")
    else:
        (unfinished / there).parent.mkdir(parents=True)
        (unfinished / there).write_text("mine")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=message if there != "checkpoint" else "which the result is written into"):
        convert_checkpoint(source, tmp_path / "hub", resume=resume)
    if there == "checkpoint":
        with pytest.raises(ValueError, match=message):
            convert_checkpoint(tmp_path / "source", tmp_path / "hub", resume=resume)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_source_in_the_folder_that_is_written_is_refused(tmp_path, monkeypatch):
    source, adapter = tmp_path / "source", tmp_path / "hub.unfinished" / "result"
    model = saved(source)
    stopped_after(monkeypatch, 0)
    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(source, tmp_path / "hub")
    monkeypatch.undo()
    adapter_of(model, adapter, r=2, target_modules=["q_proj"])
    before = digest(adapter)
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors lies in .*which the result is written into"):
        convert_checkpoint(source, tmp_path / "hub", adapter=adapter)
    assert digest(adapter) == before


def test_destinations_that_cannot_be_written(tmp_path):
    saved(tmp_path / "source")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="dangling is there already"):
        convert_checkpoint(tmp_path / "source", tmp_path / "dangling")
    for below in ("out", "new/out"):
        with pytest.raises(OSError, match=r"cannot be made \(.*\): choose a destination in a folder that can be"):
            convert_checkpoint(tmp_path / "source", tmp_path / "source" / "config.json" / below)
    with pytest.raises(OSError, match="cannot be made"):
        convert_checkpoint(tmp_path / "source", Path("/proc/out"))
    assert convert_checkpoint(tmp_path / "source", tmp_path / "a" / "b" / "out").is_dir()  # folders above are made


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("tokenizer.model", "xx", r"cannot be read \(.+\): download it again"),
        ("tokenizer.json", "{}", r"cannot be read \(.+\): download it again"),
        ("tokenizer.json", "{", r"is not JSON \(.+\): download or write it again"),
        ("tokenizer_config.json", "{", r"is not JSON \(.+\): download or write it again"),
        ("generation_config.json", "{", r"is not JSON \(.+\): download or write it again"),
        ("generation_config.json", "[]", r"does not hold a JSON object: download or write it again"),
        ("generation_config.json", '{"max_new_tokens": -1}', r"cannot be read \(.+\): download it again"),
    ],
)
def test_damaged_files_beside_the_weights_are_named_before_anything_is_written(name, content, said, tmp_path):
    saved(tmp_path / "source")
    shutil.copy(checkpoint(DENSE) / "tokenizer.model", tmp_path / "source")
    (tmp_path / "source" / name).write_text(content)
    with pytest.raises(ValueError, match=f"source/{name} {said}"):
        convert_checkpoint(tmp_path / "source", tmp_path / "hub")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


@pytest.mark.parametrize("size", ["lots", "", "-5GB", "0", 0, -1, "nanGB", "infGB", 1.5])
def test_sizes_that_are_none(size, tmp_path):
    saved(tmp_path / "source")
    with pytest.raises(ValueError, match=r"--max-shard-size\) .*: expected a size above 0, as 5GB"):
        convert_checkpoint(tmp_path / "source", tmp_path / "hub", max_shard_size=size)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_a_size_may_be_a_number_of_bytes(tmp_path):
    saved(tmp_path / "source")
    numbers = [
        digest(convert_checkpoint(tmp_path / "source", tmp_path / str(number), max_shard_size=size))
        for number, size in enumerate(["20000", 20000, "20KB"])
    ]
    assert numbers[0] == numbers[1] == numbers[2]
    assert len(numbers[0]) > 5


def test_a_config_is_for_megatron_alone(tmp_path):
    config, tensors, _ = test_megatron.dense()
    test_megatron.Writer(tensors, config).write(tmp_path / "run")
    shutil.copytree(checkpoint(DENSE), tmp_path / "hub")
    file = tmp_path / "config.json"
    config.to_json_file(file)
    for command in ("convert", "quantize", "upcycle"):
        main([command, str(tmp_path / "run"), str(tmp_path / command), "--config", str(file)])
        assert AutoConfig.from_pretrained(tmp_path / command).hidden_size == config.hidden_size
        with pytest.raises(SystemExit, match=r"`config` \(--config\) is for checkpoints of Megatron-LM"):
            main([command, str(tmp_path / "hub"), str(tmp_path / "out"), "--config", str(file)])


# --- memory


@pytest.mark.skipif(sys.platform != "linux", reason="limits address space as Linux counts it")
@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux what is used, and limits it")
@pytest.mark.parametrize(("layers", "allowed"), [(1, 150), pytest.param(4, 600, marks=pytest.mark.soak)])
def test_a_checkpoint_larger_than_the_memory_allowed(layers, allowed, tmp_path):
    """In a process that may have `allowed` MiB more than this one has, a checkpoint of twice that."""
    import resource

    config = SkyworkMoeConfig(
        vocab_size=1024, hidden_size=1024, intermediate_size=3072, num_hidden_layers=layers, num_attention_heads=8
    )
    source, target = tmp_path / "source", tmp_path / "hub"
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(source, max_shard_size="50MB")
    del model
    size = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    assert size > 1.9 * allowed * 2**20

    def convert(dtype: str | None) -> None:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + allowed * 2**20,) * 2)
        convert_checkpoint(source, target, max_shard_size=f"{25 * layers}MB", dtype=dtype, verify=False)

    for dtype in (None, "float16"):
        assert os.waitstatus_to_exitcode(os.waitpid(forked(partial(convert, dtype)), 0)[1]) == 0
        written = sum(file.stat().st_size for file in target.glob("*.safetensors"))
        assert written == pytest.approx(size, rel=0.001)
        shutil.rmtree(target)


# --- the command


def test_the_commands(tmp_path, capsys):
    main(["convert", str(checkpoint(RAW)), str(tmp_path / "hub"), "--max-shard-size", "1MB"])
    main(["quantize", str(tmp_path / "hub"), str(tmp_path / "int8"), "--method", "int8", "--no-verify"])
    main(["upcycle", str(checkpoint(DENSE)), str(tmp_path / "moe"), "--experts", "4", "--layers", "2"])
    main(["verify", str(checkpoint(RAW)), str(tmp_path / "hub")])
    printed = capsys.readouterr().out
    for name in ("hub", "int8", "moe"):
        assert f"Wrote {tmp_path / name}." in printed
    with pytest.raises(SystemExit) as stopped:
        main(["verify", str(tmp_path / "hub"), str(tmp_path / "int8")])
    assert stopped.value.code == 1
    assert "experts" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"skywork-hf: .* is there already"):
        main(["convert", str(checkpoint(RAW)), str(tmp_path / "hub")])
    with pytest.raises(SystemExit, match="expected every, or a number"):
        main(["upcycle", str(checkpoint(DENSE)), str(tmp_path / "again"), "--layers", "some"])


@pytest.mark.parametrize(
    ("script", "options"),
    [
        ("convert_checkpoint.py", [DENSE, "--to", "llama"]),
        ("quantize_checkpoint.py", [MOE]),
        ("upcycle_dense_to_moe.py", [DENSE, "--experts", "4"]),
    ],
)
def test_the_scripts(script, options, tmp_path, monkeypatch, capsys):
    path = str(Path(__file__).parent.parent / "conversion" / script)
    monkeypatch.setattr(sys, "argv", [path, str(checkpoint(options[0])), str(tmp_path / "out"), *options[1:]])
    runpy.run_path(path, run_name="__main__")
    assert (tmp_path / "out" / "model.safetensors").exists()
    monkeypatch.setattr(sys, "argv", [path, "--help"])
    with pytest.raises(SystemExit):
        runpy.run_path(path, run_name="__main__")
    assert "example" in capsys.readouterr().out


def test_calibration_removes_nothing_either(tmp_path):
    script = runpy.run_path(str(Path(__file__).parent.parent / "conversion" / "calibrate_fp8.py"))
    (tmp_path / "out.unfinished").mkdir()
    (tmp_path / "out.unfinished" / "mine").write_text("mine")
    with pytest.raises(ValueError, match=r"out\.unfinished is there already"):
        script["write_static_fp8"](str(checkpoint(MOE)), tmp_path / "out", tmp_path / "texts.txt")
    assert (tmp_path / "out.unfinished" / "mine").exists()
