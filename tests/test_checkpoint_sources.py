"""What is read as a checkpoint and what is refused, each with one sentence and before anything is written."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import stir, tiny_dense_config, tiny_moe_config, tokens
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

from skywork_hf import (
    SkyworkConfig,
    SkyworkForCausalLM,
    SkyworkForSequenceClassification,
    SkyworkModel,
    SkyworkMoeModel,
)
from skywork_hf.checkpoints.adapters import merge_adapter
from skywork_hf.checkpoints.comparison import compare_checkpoints
from skywork_hf.checkpoints.convert import convert_checkpoint
from skywork_hf.checkpoints.inspection import inspect_checkpoint
from skywork_hf.checkpoints.sources import read_source

HEAD = "lm_head.weight"
NORM, OTHER_NORM = "model.layers.0.input_layernorm.weight", "model.layers.0.post_attention_layernorm.weight"


@pytest.fixture
def dense(tmp_path) -> Path:
    """A dense checkpoint in the Hub's layout."""
    folder = tmp_path / "dense"
    SkyworkForCausalLM(tiny_dense_config()).save_pretrained(folder)
    return folder


def refusal(folder: Path, *arguments: Any) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011  # the callers look at the text
        read_source(folder, *arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- safetensors headers


def rewrite_header(file: Path, change: Any) -> None:
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


def set_entry(name: str, **changes: Any) -> Any:
    return lambda header: header[name].update(changes)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (set_entry(HEAD, dtype="F16"), "float16 [67, 32]"),
        (set_entry(HEAD, shape=[67, 31]), "[67, 31]"),
        (lambda h: h[NORM].update(data_offsets=h[OTHER_NORM]["data_offsets"]), "it would have"),
        (lambda h: h[NORM].update(data_offsets=[h[NORM]["data_offsets"][0] + 4] * 2), "it would have"),
        (lambda h: h[HEAD].pop("shape"), "has the `shape` None"),
        (set_entry(HEAD, shape="x"), "has the `shape` 'x'"),
        (set_entry(HEAD, shape=[-67, -32]), "has the `shape` [-67, -32]"),
        (lambda h: h[HEAD].pop("dtype"), "is stored as None"),
        (set_entry(HEAD, dtype="F4"), "is stored as F4"),
        (set_entry(HEAD, dtype=["F32"]), "is stored as ['F32']"),
        (lambda h: h[HEAD].pop("data_offsets"), "is not a whole safetensors file"),
        (set_entry(HEAD, data_offsets=[]), "is not a whole safetensors file"),
        (lambda h: h.update(x=3), "is not a whole safetensors file"),
        (set_entry(HEAD, data_offsets=[0, 10**9]), "it is cut off or damaged"),
    ],
)
def test_a_header_that_contradicts_itself(change, said, dense):
    file = dense / "model.safetensors"
    rewrite_header(file, change)
    message = refusal(dense)
    assert str(file) in message
    assert said in message


def test_a_header_with_one_name_twice(dense):
    file = dense / "model.safetensors"
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    twice = json.dumps(header)[:-1] + f', "{HEAD}": {json.dumps(header["model.embed_tokens.weight"])}}}'
    file.write_bytes(len(twice).to_bytes(8, "little") + twice.encode() + content[8 + length :])
    assert f"in {file} has `data_offsets`" in refusal(dense)


# --- pickles


@pytest.fixture
def pickled(dense) -> Any:
    """A function that makes the checkpoint a pickle of this content."""
    state = SkyworkForCausalLM.from_pretrained(dense).state_dict()
    (dense / "model.safetensors").unlink()

    def write(change: Any, **options: Any) -> Path:
        torch.save(change(dict(state)), dense / "pytorch_model.bin", **options)
        return dense

    return write


class Stranger:
    """Stands for whatever a pickle may hold."""


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: {**s, 0: torch.ones(2)}, "holds a tensor called 0: expected a name"),
        (lambda s: {**s, HEAD: s[HEAD].to(torch.complex64)}, f"`{HEAD}` in FILE is stored as torch.complex64"),
        (lambda s: {**s, HEAD: s[HEAD].to_sparse()}, f"`{HEAD}` in FILE is stored as torch.sparse_coo"),
        (
            lambda s: {**s, HEAD: torch.quantize_per_tensor(s[HEAD], 0.1, 0, torch.qint8)},
            f"`{HEAD}` in FILE is quantised by torch",
        ),
        (lambda s: {**s, "epoch": 3}, "'epoch' is of type int; write it again without that"),
        (lambda s: {"state_dict": s, "epoch": 3}, "its tensors are inside 'state_dict'; write that inner dictionary"),
        (lambda s: {"model": s}, "its tensors are inside 'model'; write that inner dictionary"),
        (lambda s: list(s.values()), "named tensors, a list: expected a model's `state_dict()`"),
        (lambda s: {**s, "x": Stranger()}, f"it holds a `{__name__}.Stranger`. Pickles that hold anything but plain"),
        (lambda s: {**s, "x": print}, "it holds a `print`. Pickles that hold anything but plain"),
    ],
)
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.filterwarnings("ignore:.*deprecated")
def test_a_pickle_with_something_else(change, said, zipped, pickled):
    folder = pickled(change, _use_new_zipfile_serialization=zipped)
    message = refusal(folder)
    assert said.replace("FILE", str(folder / "pytorch_model.bin")) in message
    assert str(folder / "pytorch_model.bin") in message
    assert "weights_only" not in message
    assert "\033" not in message


@pytest.mark.parametrize("content", [b"", b"garbage" * 100, b"PK cut off"])
def test_a_pickle_that_is_none(content, pickled):
    file = pickled(dict) / "pytorch_model.bin"
    file.write_bytes(content)
    assert f"{file} cannot be read as a checkpoint: it is empty, cut off, or nothing that" in refusal(file.parent)


@pytest.mark.filterwarnings("ignore:.*deprecated")
@pytest.mark.filterwarnings("ignore:.*TorchScript")
def test_a_torchscript_archive(pickled):
    file = pickled(dict) / "pytorch_model.bin"
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), file)
    message = refusal(file.parent)
    assert f"{file} cannot be read as a checkpoint" in message
    assert "weights_only" not in message


def test_parameters_are_tensors(pickled):
    folder = pickled(lambda s: {name: torch.nn.Parameter(tensor) for name, tensor in s.items()})
    assert len(read_source(folder).recipes) == len(SkyworkForCausalLM(tiny_dense_config()).state_dict())


def test_a_stray_pickle_beside_shards_that_no_index_names(dense):
    state = SkyworkForCausalLM.from_pretrained(dense).state_dict()
    (dense / "model.safetensors").unlink()
    names = list(state)
    torch.save({name: state[name] for name in names[:8]}, dense / "pytorch_model-00001-of-00002.bin")
    torch.save({name: state[name] for name in names[8:]}, dense / "pytorch_model-00002-of-00002.bin")
    assert len(read_source(dense).recipes) == len(names)
    torch.save({"optimizer": {"step": 3}}, dense / "optimizer.bin")
    message = refusal(dense)
    assert str(dense / "optimizer.bin") in message
    assert "No index names the shards, so that all *.bin files were taken" in message


# --- configs


def edit_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{}", "is of a None model"),
        ("nope", "is not JSON"),
        ("[]", "does not hold a JSON object"),
        ('{"model_type": "skywork", "num_attention_heads": 5}', "describes no model that can be built"),
        (None, "is not there"),
        ("FOLDER", "is a folder"),
    ],
)
@pytest.mark.parametrize("beside", [True, False])
def test_configs_that_are_none(content, said, beside, tmp_path):
    """Beside the weights, beside Megatron-LM's folders, and given."""
    (tmp_path / "run" / "iter_0000001" / "mp_rank_00").mkdir(parents=True)
    file = tmp_path / ("run/config.json" if beside else "given.json")
    if content == "FOLDER":
        file.mkdir()
    elif content is not None:
        file.write_text(content)
    arguments: dict[str, Any] = {} if beside else {"config": file}
    if content is None and beside:
        shutil.rmtree(tmp_path / "run")
        (tmp_path / "run").mkdir()
    with pytest.raises(ValueError, match=f"{re.escape(str(file))} {said}"):
        convert_checkpoint(tmp_path / "run", tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


# --- models without a head


@pytest.mark.parametrize(
    ("model_class", "config"), [(SkyworkModel, tiny_dense_config), (SkyworkMoeModel, tiny_moe_config)]
)
def test_a_base_model_is_refused_and_the_way_out_works(model_class, config, tmp_path):
    model_class(config()).save_pretrained(tmp_path / "base")
    assert "holds a base model" in refusal(tmp_path / "base")
    AutoModelForCausalLM.from_pretrained(tmp_path / "base").save_pretrained(tmp_path / "whole")
    whole = read_source(tmp_path / "whole")
    assert {product.name for recipe in whole.recipes for product in recipe.products} >= {HEAD, "model.norm.weight"}


# --- Llama


def as_llama(config: Any, model_class: Any, folder: Path, **changes: Any) -> Any:
    """A Llama of the shape of a Skywork model, saved by transformers."""
    shape = {k: v for k, v in config.to_dict().items() if k not in ("model_type", "architectures")}
    model = model_class(LlamaConfig(**{**shape, **changes})).eval()
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True},
        {"num_key_value_heads": 2, "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}},
        {"hidden_act": "swish", "rms_norm_eps": 1e-5, "pad_token_id": None},
    ],
)
def test_a_llama_is_read(changes, tmp_path):
    llama = as_llama(tiny_dense_config(), LlamaForCausalLM, tmp_path / "llama", **changes)
    source = read_source(tmp_path / "llama")
    assert (source.layout, type(source.config)) == ("llama", SkyworkConfig)
    assert "Llama layout" in inspect_checkpoint(tmp_path / "llama").layout
    folder = convert_checkpoint(tmp_path / "llama", tmp_path / "hub")
    skywork = AutoModelForCausalLM.from_pretrained(folder)
    assert type(skywork) is SkyworkForCausalLM
    ids = tokens()
    with torch.no_grad():
        assert torch.equal(skywork(ids).logits, llama(ids).logits)


def test_a_llama_that_classifies_is_read(tmp_path):
    llama = as_llama(tiny_dense_config(num_labels=3), LlamaForSequenceClassification, tmp_path / "llama")
    folder = convert_checkpoint(tmp_path / "llama", tmp_path / "hub")
    skywork = AutoModelForSequenceClassification.from_pretrained(folder)
    assert type(skywork) is SkyworkForSequenceClassification
    ids = tokens(batch=1)
    with torch.no_grad():
        assert torch.equal(skywork(ids).logits, llama(ids).logits)


def test_what_was_written_as_a_llama_is_read_back(dense, tmp_path):
    llama = convert_checkpoint(dense, tmp_path / "llama", to="llama")
    assert compare_checkpoints(dense, llama).is_equal
    back = convert_checkpoint(llama, tmp_path / "back")
    assert compare_checkpoints(dense, back).is_equal
    assert json.loads((back / "config.json").read_text())["architectures"] == ["SkyworkForCausalLM"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"attention_bias": True}, "`attention_bias` is True"),
        ({"mlp_bias": True}, "`mlp_bias` is True"),
        ({"hidden_act": "gelu"}, "`hidden_act` is 'gelu'"),
        ({"num_local_experts": 4}, "there are experts"),
        ({"rope_parameters": {"rope_type": "spiral", "rope_theta": 1e4}}, "`rope_type`='spiral'"),
    ],
)
def test_a_llama_that_no_skywork_model_is(changes, said, tmp_path):
    as_llama(tiny_dense_config(), LlamaForCausalLM, tmp_path)
    edit_config(tmp_path, **changes)
    message = refusal(tmp_path)
    assert str(tmp_path / "config.json") in message
    assert said in message


# --- adapters


def adapted(dense: Path, folder: Path, config: Any) -> Any:
    """An adapter of the checkpoint with random weights, saved; PEFT's model."""
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(dense), config(peft))
    stir(model)
    model.save_pretrained(folder)
    return model


Q = {"target_modules": ["q_proj"]}


@pytest.mark.parametrize(
    "config",
    [
        lambda peft: peft.AdaLoraConfig(**Q, total_step=10),
        lambda peft: peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
        lambda peft: peft.TrainableTokensConfig(target_modules=["embed_tokens"], token_indices=[5, 3]),
        lambda peft: peft.LoraConfig(**Q, layers_to_transform=[1]),
        lambda peft: peft.LoraConfig(**Q, init_lora_weights="pissa"),
    ],
    ids=["adalora", "ia3", "tokens", "one layer", "pissa"],
)
def test_kinds_of_adapters_that_are_merged(config, dense, tmp_path):
    merged = adapted(dense, tmp_path / "adapter", config).merge_and_unload()
    folder = convert_checkpoint(dense, tmp_path / "merged", adapter=tmp_path / "adapter")
    assert not compare_checkpoints(dense, folder).is_equal
    for name, tensor in load_file(folder / "model.safetensors").items():
        torch.testing.assert_close(tensor, merged.state_dict()[name], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (lambda peft: peft.VeraConfig(**Q, r=4), "'VERA' adapter: expected `peft_type` LORA"),
        (lambda peft: peft.LoHaConfig(**Q, r=4), "'LOHA' adapter"),
        (lambda peft: peft.OFTConfig(**Q, oft_block_size=8, r=0), "'OFT' adapter"),
        (lambda peft: peft.RandLoraConfig(**Q, r=4), "'RANDLORA' adapter"),
        (lambda peft: peft.FourierFTConfig(**Q, n_frequency=20), "'FOURIERFT' adapter"),
        (lambda peft: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3), "'PROMPT_TUNING' adapter"),
        (lambda peft: peft.LoraConfig(**Q, lora_bias=True), "`lora_bias`, which adds biases"),
        (lambda peft: peft.LoraConfig(**Q, layer_replication=[(0, 2), (1, 2)]), "`layer_replication`, which makes"),
        (lambda peft: peft.LoraConfig(**Q, alora_invocation_tokens=[5]), "`alora_invocation_tokens`, which"),
    ],
)
def test_kinds_of_adapters_that_are_not_merged(config, said, dense, tmp_path):
    adapted(dense, tmp_path / "adapter", config)
    with pytest.raises(ValueError, match=f"{tmp_path / 'adapter' / 'adapter_config.json'} .*{re.escape(said)}"):
        convert_checkpoint(dense, tmp_path / "merged", adapter=tmp_path / "adapter")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "dense"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "is not JSON"),
        ("{}", "is of a None adapter"),
        ('{"peft_type": "NEW"}', "is of a 'NEW' adapter"),
        ('{"peft_type": "LORA", "target_modules": "all-linear", "layers_pattern": "x"}', "is nothing that PEFT reads"),
    ],
)
def test_adapter_configs_that_are_none(content, said, dense, tmp_path):
    adapted(dense, tmp_path / "adapter", lambda peft: peft.LoraConfig(**Q))
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=f"{file} {said}"):
        convert_checkpoint(dense, tmp_path / "merged", adapter=tmp_path / "adapter")


def test_a_tensor_that_an_adapter_replaces_is_accounted_for(dense, tmp_path):
    adapted(dense, tmp_path / "adapter", lambda peft: peft.LoraConfig(**Q, modules_to_save=["lm_head"]))
    source = read_source(dense)
    merged = merge_adapter(source, tmp_path / "adapter")
    assert [tensor.name for tensor in merged.ignored] == [HEAD]
    before = {tensor for recipe in source.recipes for tensor in recipe.sources}
    after = {tensor for recipe in merged.recipes for tensor in recipe.sources} | set(merged.ignored)
    assert before <= after
