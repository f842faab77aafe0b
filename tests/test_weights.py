"""Checkpoint files in and out: names, bits, mapped memory, and what happens to files that are not right."""

from __future__ import annotations

import json
import logging
import pickle
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import LAYOUTS, checkpoint, tiny_dense_config, tiny_moe_config
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from skywork_hf import SkyworkForCausalLM, SkyworkInt8Config, SkyworkModel, SkyworkMoeForCausalLM
from skywork_hf.checkpoints.convert import convert_checkpoint

GOLDEN = ("skywork-13b-tiny", "skywork-moe-tiny")


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint folder, read without transformers."""
    state: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("model*.safetensors")):
        state.update(load_file(file))
    for file in sorted(folder.glob("pytorch_model*.bin")):
        state.update(torch.load(file, weights_only=True))
    return {name: tensor for name, tensor in state.items() if not name.endswith("rotary_emb.inv_freq")}


def assert_bit_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype, name
        assert tensor.equal(other[name]), name


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shards", ["10GB", "1MB"])
@pytest.mark.parametrize("name", GOLDEN)
def test_released_names_and_bits_come_back(name, shards, layout, tmp_path):
    options = {} if name == "skywork-13b-tiny" else {"experts_layout": layout}
    model = AutoModelForCausalLM.from_pretrained(checkpoint(name), **options)
    model.save_pretrained(tmp_path, max_shard_size=shards)
    assert (len(list(tmp_path.glob("model*.safetensors"))) > 1) == (shards == "1MB")
    assert_bit_equal(tensors_of(tmp_path), tensors_of(checkpoint(name)))
    for other in LAYOUTS if options else [None]:
        again = AutoModelForCausalLM.from_pretrained(tmp_path, **({"experts_layout": other} if other else {}))
        again.save_pretrained(tmp_path / f"again-{other}")
        assert_bit_equal(tensors_of(tmp_path / f"again-{other}"), tensors_of(checkpoint(name)))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("two_layer", [False, True])
def test_every_kind_of_layer_comes_back(layout, two_layer, tmp_path):
    config = tiny_moe_config(
        num_hidden_layers=3, moe_expert_interval=2, moe_2layer_gate=two_layer, experts_layout=layout
    )
    model = SkyworkMoeForCausalLM(config)
    model.save_pretrained(tmp_path)
    names = tensors_of(tmp_path).keys()
    gate = "0.weight" if two_layer else "weight"
    assert {f"model.layers.1.block_sparse_moe.gate.{gate}", "model.layers.0.mlp.gate_proj.weight"} <= names
    assert "model.layers.1.block_sparse_moe.experts.3.w2.weight" in names
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert_bit_equal(again.state_dict(), model.state_dict())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", ["dense", "moe"])
@pytest.mark.parametrize("sharded", [False, True])
def test_bin_files_load(layout, family, sharded, tmp_path):
    config = tiny_dense_config() if family == "dense" else tiny_moe_config()
    source = (SkyworkForCausalLM if family == "dense" else SkyworkMoeForCausalLM)(config)
    source.config.save_pretrained(tmp_path)
    state = {**source.state_dict(), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    write_bin(tmp_path, state, sharded)
    options = {"experts_layout": layout} if family == "moe" else {}
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True, **options)
    assert not any(info.values())
    model.save_pretrained(tmp_path / "out")
    assert_bit_equal(tensors_of(tmp_path / "out"), source.state_dict())


def write_bin(folder: Path, state: dict[str, torch.Tensor], sharded: bool) -> None:
    if not sharded:
        torch.save(state, folder / "pytorch_model.bin")
        return
    names = sorted(state)
    halves = {"pytorch_model-00001-of-00002.bin": names[::2], "pytorch_model-00002-of-00002.bin": names[1::2]}
    for file, part in halves.items():
        torch.save({name: state[name] for name in part}, folder / file)
    index = {"metadata": {}, "weight_map": {name: file for file, part in halves.items() for name in part}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def mapped_bytes(model: PreTrainedModel) -> int:
    """How many bytes of the parameters lie in memory that is mapped from a safetensors file."""
    ranges = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(".safetensors"):
            ranges.append([int(end, 16) for end in line.split()[0].split("-")])
    return sum(
        parameter.numel() * parameter.element_size()
        for parameter in model.parameters()
        if any(start <= parameter.data_ptr() < end for start, end in ranges)
    )


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="asks Linux what is mapped")
@pytest.mark.parametrize("family", ["dense", "moe"])
def test_modular_weights_stay_mapped_from_the_files(family, tmp_path):
    config = tiny_dense_config() if family == "dense" else tiny_moe_config()
    (SkyworkForCausalLM if family == "dense" else SkyworkMoeForCausalLM)(config).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    total = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    assert mapped_bytes(model) == total


# What follows is to be exactly what transformers does for a model of its own: each case runs against both.


def llama_twin(folder: Path, twin: Path) -> Path:
    """The same checkpoint as transformers' own Llama."""
    shutil.copytree(folder, twin)
    config = json.loads((twin / "config.json").read_text())
    (twin / "config.json").write_text(
        json.dumps({**config, "model_type": "llama", "architectures": ["LlamaForCausalLM"]})
    )
    return twin


def damaged(tmp_path: Path, damage) -> list[Path]:
    model = SkyworkForCausalLM(tiny_dense_config())
    model.save_pretrained(tmp_path / "ours")
    file = tmp_path / "ours" / "model.safetensors"
    damage(file)
    return [tmp_path / "ours", llama_twin(tmp_path / "ours", tmp_path / "llama")]


def edit(change):
    def damage(file: Path) -> None:
        state = load_file(file)
        change(state)
        save_file(state, file, metadata={"format": "pt"})

    return damage


def remove(state: dict[str, torch.Tensor]) -> None:
    del state["model.layers.1.self_attn.q_proj.weight"]


def add(state: dict[str, torch.Tensor]) -> None:
    state["model.layers.1.self_attn.surprise.weight"] = torch.ones(2)


def reshape(state: dict[str, torch.Tensor]) -> None:
    state["model.norm.weight"] = torch.ones(31)


def outcome(folder: Path, caplog) -> tuple[str, set[str], set[str]]:
    """What loading did: the kind of error or "loaded", and the tensors and words that it named."""
    caplog.clear()
    try:
        _, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        kind, named = "loaded", {str(key) for keys in info.values() for key in keys}
    except Exception as error:
        kind, named = type(error).__name__, set(re.findall(r"model\.[\w.]+weight", str(error)))
    logged = set(re.findall(r"model\.[\w.{}, ]+weight", caplog.text))
    return kind, named, logged


@pytest.mark.parametrize("change", [remove, add, reshape])
def test_wrong_tensors_are_named_as_for_transformers_own_models(change, tmp_path, caplog):
    logging.getLogger("transformers").propagate = True
    caplog.set_level(logging.WARNING)
    ours, llama = (outcome(folder, caplog) for folder in damaged(tmp_path, edit(change)))
    assert ours == llama
    assert ours[1] | ours[2]


def test_truncated_file_is_refused_by_name(tmp_path):
    SkyworkMoeForCausalLM(tiny_moe_config()).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=f"{file} has .* it is cut off"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_missing_expert_is_named_in_both_layouts(layout, tmp_path, caplog):
    logging.getLogger("transformers").propagate = True
    SkyworkMoeForCausalLM(tiny_moe_config()).save_pretrained(tmp_path)
    name = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    edit(lambda state: state.pop(name))(tmp_path / "model.safetensors")
    if layout == "modular":
        _, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
        assert info["missing_keys"] == {name}
        assert name in re.sub(r"\x1b\[\d+m", "", caplog.text)
    else:
        with pytest.raises(RuntimeError, match="CONVERSION"):
            AutoModelForCausalLM.from_pretrained(tmp_path, experts_layout=layout)
        assert "model.layers.1.block_sparse_moe.experts.gate_up_proj" in caplog.text


def test_an_expert_of_the_wrong_shape_is_refused_in_both_layouts(tmp_path):
    SkyworkMoeForCausalLM(tiny_moe_config()).save_pretrained(tmp_path)
    name = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    edit(lambda state: state.update({name: torch.ones(47, 32)}))(tmp_path / "model.safetensors")
    for layout in LAYOUTS:
        with pytest.raises(RuntimeError):
            AutoModelForCausalLM.from_pretrained(tmp_path, experts_layout=layout)


def other_names(family: str, folder: Path, file: str) -> Path:
    """A checkpoint whose config is ours and whose tensors have names of the training code, or of nobody."""
    model = SkyworkForCausalLM(tiny_dense_config()) if family == "dense" else SkyworkMoeForCausalLM(tiny_moe_config())
    if family == "dense":
        state = {name.replace("model.layers", "transformer.h"): tensor for name, tensor in model.state_dict().items()}
    else:
        model.save_pretrained(folder / "hub")
        state = tensors_of(convert_checkpoint(folder / "hub", folder / "raw", to="training"))
    model.config.save_pretrained(folder)
    if file == "bin":
        write_bin(folder, state, sharded=True)
    else:
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("file", ["bin", "safetensors"])
@pytest.mark.parametrize("family", ["dense", "moe"])
def test_other_names_are_refused_with_the_command_that_converts(family, file, tmp_path):
    folder = other_names(family, tmp_path, file)
    named = "mlp.moe" if family == "moe" else "transformer.h.0"
    options = [{"experts_layout": layout} for layout in LAYOUTS] if family == "moe" else [{}]
    for cls in (AutoModel, AutoModelForCausalLM):
        for option in options:
            with pytest.raises(ValueError, match=rf"{folder} has no tensor .*{named}.*`skywork-hf convert {folder} "):
                cls.from_pretrained(folder, **option)
    with pytest.raises(ValueError, match=f"skywork-hf inspect {folder}`"):
        AutoModel.from_pretrained(folder, quantization_config=SkyworkInt8Config())


def test_a_gate_of_the_other_kind_is_refused(tmp_path):
    SkyworkMoeForCausalLM(tiny_moe_config()).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"has no tensor `model.layers.\*.block_sparse_moe.gate.\*.weight`, but .*gate.weight'"
    ):
        AutoModelForCausalLM.from_pretrained(tmp_path, moe_2layer_gate=True)


def test_what_a_checkpoint_may_lack(tmp_path):
    """A head, what is tied, what is of another size where that is asked for, and all where the state is the user's."""
    config = tiny_dense_config(tie_word_embeddings=True)
    SkyworkForCausalLM(config).save_pretrained(tmp_path / "tied")
    SkyworkModel(tiny_dense_config()).save_pretrained(tmp_path / "base")
    for cls, folder, missing in (
        (AutoModelForSequenceClassification, "tied", {"score.weight"}),
        (AutoModel, "tied", set()),
        (AutoModelForCausalLM, "tied", set()),
        (AutoModelForCausalLM, "base", {"lm_head.weight"}),
    ):
        _, info = cls.from_pretrained(tmp_path / folder, output_loading_info=True)
        assert info["missing_keys"] == missing
    file = tmp_path / "tied" / "model.safetensors"
    embeddings = tensors_of(file.parent)["model.embed_tokens.weight"]
    edit(lambda state: state.update({"lm_head.weight": state.pop("model.embed_tokens.weight")}))(file)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(file.parent).model.embed_tokens.weight, embeddings)
    options = {"intermediate_size": 40, "ignore_mismatched_sizes": True, "output_loading_info": True}
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "tied", **options)
    assert len(info["mismatched_keys"]) == 6
    _, info = SkyworkForCausalLM.from_pretrained(None, config=config, state_dict={}, output_loading_info=True)
    assert info["missing_keys"]


class Surprise:
    def __reduce__(self):
        return (Path.touch, (Path("code-of-a-checkpoint-ran"),))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_pickle_that_is_not_plain_tensors_is_refused(layout, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = tiny_moe_config()
    config.save_pretrained(tmp_path)
    state = {**SkyworkMoeForCausalLM(config).state_dict(), "surprise": Surprise()}
    torch.save(state, tmp_path / "pytorch_model.bin")
    with pytest.raises((pickle.UnpicklingError, OSError, ValueError), match=r"weights_only|[Uu]nsupported"):
        AutoModelForCausalLM.from_pretrained(tmp_path, experts_layout=layout)
    assert not (tmp_path / "code-of-a-checkpoint-ran").exists()


def test_saved_files_say_that_they_are_pytorchs(tmp_path):
    SkyworkMoeForCausalLM(tiny_moe_config()).save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata()["format"] == "pt"
