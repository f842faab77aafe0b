"""Adapters on their way into a checkpoint: those that do not fit are refused before anything is written, and what is
merged is what PEFT computes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import stir, tiny_dense_config, tiny_moe_config, tokens
from transformers import AutoModelForCausalLM

from skywork_hf import SkyworkForCausalLM, SkyworkMoeForCausalLM
from skywork_hf.checkpoints.convert import convert_checkpoint, upcycle_checkpoint

peft = pytest.importorskip("peft")

Q = "model.layers.0.self_attn.q_proj.weight"
Q_ONLY = {"r": 2, "target_modules": ["q_proj"]}


def saved(folder: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """A tiny dense checkpoint."""
    SkyworkForCausalLM(tiny_dense_config(**changes)).to(dtype).save_pretrained(folder)
    return folder


def adapter_of(base: Path, folder: Path, rows: int | None = None, dtype: Any = "auto", **options: Any) -> Any:
    """An adapter with random weights, saved; PEFT's model, with a vocabulary of `rows`."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    if rows is not None:
        model.resize_token_embeddings(rows)
    adapted = peft.get_peft_model(model, options.pop("config", None) or peft.LoraConfig(**options))
    stir(adapted)
    adapted.save_pretrained(folder)
    return adapted


def change_weights(adapter: Path, change: Any) -> None:
    file = adapter / "adapter_model.safetensors"
    save_file(change(load_file(file)), file)


def change_config(adapter: Path, **fields: Any) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def refusal(base: Path, adapter: Path, **options: Any) -> str:
    """What is said; nothing is written."""
    target = adapter.parent / "merged"
    with pytest.raises(ValueError) as caught:  # noqa: PT011  # the callers look at the text
        convert_checkpoint(base, target, adapter=adapter, **options)
    assert not target.with_name("merged.unfinished").exists()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- adapters that would be merged in part


@pytest.mark.parametrize("more", [{"num_experts": [4]}, {"num_experts": [2], "num_hidden_layers": 3}])
def test_an_adapter_of_fewer_experts_or_layers_is_refused(more, tmp_path):
    SkyworkMoeForCausalLM(tiny_moe_config(num_experts=[2])).save_pretrained(tmp_path / "small")
    SkyworkMoeForCausalLM(tiny_moe_config(**more)).save_pretrained(tmp_path / "large")
    adapter_of(tmp_path / "small", tmp_path / "adapter", r=2, target_modules=["w1"])
    message = refusal(tmp_path / "large", tmp_path / "adapter")
    assert f"{tmp_path / 'adapter' / 'adapter_model.safetensors'} lacks `base_model.model.model.layers." in message
    assert f"asks for in {tmp_path / 'large'}" in message


@pytest.mark.parametrize(
    ("lost", "options"),
    [("lora_B", {}), ("lora_magnitude", {"use_dora": True}), ("", {}), ("lm_head", {"modules_to_save": ["lm_head"]})],
    ids=["lora_B", "magnitudes", "all", "whole modules"],
)
def test_an_adapter_that_is_not_whole_is_refused(lost, options, tmp_path):
    base = saved(tmp_path / "base")
    adapter_of(base, tmp_path / "adapter", **Q_ONLY, **options)
    change_weights(tmp_path / "adapter", lambda held: {name: held[name] for name in held if lost not in name})
    message = refusal(base, tmp_path / "adapter")
    assert "adapter_model.safetensors lacks `base_model.model." in message
    assert lost in message


def test_integers_are_refused(tmp_path):
    base = saved(tmp_path / "base")
    adapter_of(base, tmp_path / "adapter", **Q_ONLY, modules_to_save=["lm_head"])
    change_weights(tmp_path / "adapter", lambda held: {name: tensor.to(torch.int8) for name, tensor in held.items()})
    assert "is stored as torch.int8: expected an adapter in 16 or 32 bit" in refusal(base, tmp_path / "adapter")


# --- adapters and configs that contradict each other, or the model


def test_an_adapter_of_another_size_is_refused(tmp_path):
    adapter_of(saved(tmp_path / "other", hidden_size=64), tmp_path / "adapter", **Q_ONLY)
    message = refusal(saved(tmp_path / "base"), tmp_path / "adapter")
    assert "q_proj.lora_A.weight` in " in message
    assert "is [2, 64], and adapter_config.json makes it [2, 32]" in message


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"r": 4}, "is [2, 32], and adapter_config.json makes it [4, 32]"),
        ({"rank_pattern": {"(": 3}}, "adapter_config.json makes no adapter of"),
        ({"lora_alpha": "x"}, "adapter_config.json makes no adapter of"),
        ({"target_modules": ["nothing"]}, "adapter_config.json makes no adapter of"),
        ({"target_modules": ["k_proj"]}, "lacks `base_model.model.model.layers.0.self_attn.k_proj.lora_A.weight`"),
        ({"init_lora_weights": "corda"}, "adapter_config.json makes no adapter of"),
        (
            {"trainable_token_indices": [3, 99]},
            "adapter_config.json trains token 99: expected whole numbers from 0 to 66",
        ),
        ({"trainable_token_indices": [-1, 3]}, "adapter_config.json trains token -1: expected whole numbers"),
        ({"trainable_token_indices": [3, 5, 6]}, "is [2, 32], and adapter_config.json makes it [3, 32]"),
        ({"trainable_token_indices": None}, "trainable_tokens_delta` and 0 more weights that adapter_config.json"),
        ({"trainable_token_indices": "x"}, "adapter_config.json"),
        ({"trainable_token_indices": {"foo": [3, 5]}}, "adapter_config.json"),
        ({"trainable_token_indices": [[3], [5]]}, "adapter_config.json"),
        ({"trainable_token_indices": [3, 5.5]}, "adapter_config.json"),
    ],
)
def test_a_config_that_is_not_the_adapters_is_refused(fields, said, tmp_path):
    base = saved(tmp_path / "base")
    adapter_of(base, tmp_path / "adapter", **Q_ONLY, trainable_token_indices=[3, 5])
    change_config(tmp_path / "adapter", **fields)
    message = refusal(base, tmp_path / "adapter")
    assert str(tmp_path / "adapter") in message
    assert said in message


# --- values that do not fit


def test_a_merge_beyond_the_range_of_float16_is_refused(tmp_path):
    base = saved(tmp_path / "base", torch.float16)
    adapter_of(base, tmp_path / "adapter", **Q_ONLY)
    change_weights(tmp_path / "adapter", lambda held: {name: 3000 * tensor.float() for name, tensor in held.items()})
    with pytest.raises(ValueError, match=rf"`{Q}` holds values beyond 65504, the largest of float16"):
        convert_checkpoint(base, tmp_path / "merged", adapter=tmp_path / "adapter")
    folder = convert_checkpoint(base, tmp_path / "merged32", adapter=tmp_path / "adapter", dtype="float32")
    assert all(tensor.isfinite().all() for tensor in load_file(folder / "model.safetensors").values())


def test_a_whole_module_beyond_the_range_of_float16_is_refused(tmp_path):
    base = saved(tmp_path / "base", torch.float16)
    adapter_of(base, tmp_path / "adapter", **Q_ONLY, modules_to_save=["lm_head"])
    change_weights(tmp_path / "adapter", lambda held: {name: 1e6 * tensor.float() for name, tensor in held.items()})
    change_config(tmp_path / "adapter", lora_alpha=0)
    with pytest.raises(ValueError, match=r"`lm_head\.weight` holds values beyond 65504"):
        convert_checkpoint(base, tmp_path / "merged", adapter=tmp_path / "adapter")


def test_noise_of_upcycling_beyond_the_range_of_float16_is_refused(tmp_path):
    model = SkyworkForCausalLM(tiny_dense_config()).half()
    weight = model.model.layers[0].mlp.up_proj.weight
    with torch.no_grad():
        weight.copy_(60000 * torch.randn_like(weight, dtype=torch.float32).sign())
    model.save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match=r"up_proj\.weight` holds values beyond 65504"):
        upcycle_checkpoint(tmp_path / "base", tmp_path / "moe", 4, noise=0.5)


@pytest.mark.parametrize("whole", [None, ["lm_head"]])
def test_a_merge_is_rounded_once(whole, tmp_path):
    base = saved(tmp_path / "base", torch.bfloat16)
    adapted = adapter_of(base, tmp_path / "adapter", dtype=torch.float32, **Q_ONLY, modules_to_save=whole)
    folder = convert_checkpoint(base, tmp_path / "merged", adapter=tmp_path / "adapter", dtype="float32")
    expected = adapted.merge_and_unload().state_dict()
    for name, tensor in load_file(folder / "model.safetensors").items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-6, rtol=1e-5)
    folder = convert_checkpoint(base, tmp_path / "as it was", adapter=tmp_path / "adapter")
    assert all(tensor.dtype == torch.bfloat16 for tensor in load_file(folder / "model.safetensors").values())


# --- a head that is the embeddings


@pytest.mark.parametrize(
    ("rows", "options"),
    [
        (70, Q_ONLY),
        (None, {**Q_ONLY, "trainable_token_indices": [3, 5]}),
        (70, {**Q_ONLY, "trainable_token_indices": [3, 69]}),
        (70, {**Q_ONLY, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
    ],
    ids=["larger", "tokens", "larger, tokens", "larger, whole modules"],
)
def test_adapters_of_a_tied_head(rows, options, tmp_path):
    base = saved(tmp_path / "base", tie_word_embeddings=True)
    adapted = adapter_of(base, tmp_path / "adapter", rows, **options)
    folder = convert_checkpoint(base, tmp_path / "merged", adapter=tmp_path / "adapter")
    ids = tokens()
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(folder)(ids).logits
        torch.testing.assert_close(logits, adapted(ids).logits, atol=1e-4, rtol=1e-4)
    manifest = json.loads((folder / "conversion.json").read_text())
    ignored = {tensor["name"] for tensor in manifest["ignored"]}
    assert {
        name for name in load_file(tmp_path / "adapter" / "adapter_model.safetensors") if "lm_head" in name
    } <= ignored


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"r": 2, "target_modules": ["lm_head"]}, "lm_head.lora_A.weight"),
        ({"r": 2, "target_modules": ["embed_tokens"]}, "embed_tokens.lora_embedding_A"),
        ({**Q_ONLY, "modules_to_save": ["lm_head"]}, "lm_head.weight"),
        ({**Q_ONLY, "modules_to_save": ["lm_head", "embed_tokens"]}, "lm_head.weight"),
    ],
)
def test_a_head_that_was_trained_apart_from_the_embeddings_is_refused(options, named, tmp_path):
    base = saved(tmp_path / "base", tie_word_embeddings=True)
    adapter_of(base, tmp_path / "adapter", **options)
    message = refusal(base, tmp_path / "adapter")
    assert f"{named}`, and the head of {base} is its embeddings (`tie_word_embeddings`)" in message


# --- what is merged is what PEFT computes


def test_a_larger_vocabulary_that_was_trained_whole(tmp_path):
    base = saved(tmp_path / "base")
    adapted = adapter_of(base, tmp_path / "adapter", 70, **Q_ONLY, modules_to_save=["embed_tokens", "lm_head"])
    folder = convert_checkpoint(base, tmp_path / "merged", adapter=tmp_path / "adapter")
    ids = tokens(vocab=70)
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(folder)(ids).logits
        torch.testing.assert_close(logits, adapted(ids).logits, atol=1e-4, rtol=1e-4)


def test_adalora_that_has_given_up_ranks(tmp_path):
    base = saved(tmp_path / "base")
    config = peft.AdaLoraConfig(target_modules=["q_proj"], init_r=4, total_step=10)
    adapted = adapter_of(base, tmp_path / "before", config=config)
    kept = {f"model.layers.{layer}.self_attn.q_proj.lora_E": [True, False, True, layer == 0] for layer in range(2)}
    adapted.peft_config["default"].rank_pattern = kept  # as its trainer leaves it
    adapted.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter")
    expected = again.merge_and_unload().state_dict()
    folder = convert_checkpoint(base, tmp_path / "merged", adapter=tmp_path / "adapter")
    for name, tensor in load_file(folder / "model.safetensors").items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-6, rtol=1e-5)


def test_a_merge_is_the_same_each_time(tmp_path):
    base = saved(tmp_path / "base")
    adapter_of(base, tmp_path / "adapter", **Q_ONLY, init_lora_weights="pissa_niter_2")
    merged = [
        load_file(convert_checkpoint(base, tmp_path / name, adapter=tmp_path / "adapter") / "model.safetensors")
        for name in ("one", "other")
    ]
    assert all(torch.equal(merged[0][name], merged[1][name]) for name in merged[0])


def test_the_folder_that_one_is_in_has_a_name(tmp_path, monkeypatch):
    base = saved(tmp_path / "base")
    adapter_of(base, tmp_path / "adapter", **Q_ONLY)
    monkeypatch.chdir(tmp_path / "adapter")
    manifest = json.loads((convert_checkpoint(base, tmp_path / "merged", adapter=".") / "conversion.json").read_text())
    assert manifest["changes"][0].startswith("merged adapter, SHA-256 of its config ")
    files = {source["file"] for tensor in manifest["tensors"] for source in tensor["sources"]}
    assert files == {"model.safetensors", "adapter/adapter_model.safetensors"}
