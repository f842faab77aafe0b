"""`skywork-hf inspect`: every number against a count of its own, every fault by making it."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import checkpoint, tiny_dense_config, tiny_moe_config
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from skywork_hf import SkyworkForCausalLM, SkyworkForSequenceClassification, SkyworkMoeForCausalLM
from skywork_hf.checkpoints.inspection import CheckpointReport, inspect_checkpoint
from skywork_hf.cli import main

Q_PROJ = "model.layers.1.self_attn.q_proj"
PARTS = {
    "embed_tokens": "embeddings",
    "self_attn": "attention",
    "experts": "experts",
    "mlp": "dense feed-forward",
    "gate": "gate",
    "layernorm": "norms",
    "norm": "norms",
    "lm_head": "head",
}


def part_of(name: str) -> str:
    """Told by the name's components, from the left."""
    return next(part for key, part in PARTS.items() if any(piece.endswith(key) for piece in name.split(".")))


def counts(model: PreTrainedModel) -> dict[str, int]:
    """Parameters of a model in memory, by part."""
    result: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        result[part_of(name)] = result.get(part_of(name), 0) + parameter.numel()
    return result


def reported(report: CheckpointReport) -> dict[str, int]:
    return {part.name: part.parameters for part in report.parts if part.parameters is not None}


def data_bytes(folder: Path) -> int:
    """Bytes of the safetensors files of a checkpoint, less their headers."""
    files = list(folder.glob("model*.safetensors"))
    return sum(file.stat().st_size - 8 - int.from_bytes(file.read_bytes()[:8], "little") for file in files)


def parts(report: CheckpointReport) -> dict[str, Any]:
    return {part.name: part for part in report.parts}


def run(folder: Path, capsys) -> tuple[int, str]:
    """The command's exit status and what it printed."""
    try:
        main(["inspect", str(folder)])
    except SystemExit as stop:
        return stop.code, capsys.readouterr().out
    return 0, capsys.readouterr().out


def copy(name: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint(name), tmp_path / name))


def edit(file: Path, change) -> None:
    """Change the tensors of a safetensors file."""
    state = load_file(file)
    change(state)
    save_file(state, file)


def edit_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    config = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


@pytest.mark.parametrize(
    ("name", "family"), [("skywork-13b-tiny", "Skywork-13B (dense)"), ("skywork-moe-tiny", "Skywork-MoE")]
)
def test_golden_checkpoints_are_counted_as_the_loaded_model_is(name, family):
    report = inspect_checkpoint(checkpoint(name))
    model = AutoModelForCausalLM.from_pretrained(checkpoint(name))
    assert (report.family, report.is_whole, report.unexpected) == (family, True, ())
    assert report.layout == "Hub layout, float32"
    assert reported(report) == counts(model)
    assert report.parameters == model.num_parameters()
    assert sum(part.nbytes for part in report.parts) == 4 * model.num_parameters()
    assert report.quantization == "none"
    shape = {"hidden": model.config.hidden_size, "layers": len(model.model.layers), "vocabulary": 4007}
    assert shape.items() <= report.shape.items()


def test_active_parameters_are_those_that_a_token_meets():
    model = SkyworkMoeForCausalLM.from_pretrained(checkpoint("skywork-moe-tiny"))
    experts = [expert for layer in model.model.layers for expert in list(layer.block_sparse_moe.experts)[2:]]
    idle = sum(parameter.numel() for expert in experts for parameter in expert.parameters())
    report = inspect_checkpoint(checkpoint("skywork-moe-tiny"))
    assert report.active_parameters == model.num_parameters() - idle
    dense = inspect_checkpoint(checkpoint("skywork-13b-tiny"))
    assert dense.active_parameters == dense.parameters


def test_fp8_counts_elements_not_scales():
    folder = checkpoint("skywork-moe-tiny-fp8")
    report = inspect_checkpoint(folder)
    plain = inspect_checkpoint(checkpoint("skywork-moe-tiny"))
    assert (report.is_whole, report.unexpected) == (True, ())
    assert report.layout == "Hub layout, FP8"
    assert reported(report) == reported(plain)
    assert report.active_parameters == plain.active_parameters
    assert sum(part.nbytes for part in report.parts) == data_bytes(folder)
    assert report.file_bytes == sum(file.stat().st_size for file in folder.glob("model*.safetensors"))
    linears = 2 * (4 + 16 * 3)
    assert parts(report)["scales"].nbytes == linears * 2 * 4
    assert parts(report)["experts"].dtypes == ("float8_e4m3fn",)
    assert "static" in report.quantization
    assert report.quantization.endswith("Not quantised: embeddings, gate, norms, head.")


def test_fp8_schemes_ask_for_what_they_need(tmp_path):
    folder = copy("skywork-moe-tiny-fp8", tmp_path)
    for file in folder.glob("model*.safetensors"):
        edit(file, lambda state: [state.pop(name) for name in list(state) if name.endswith("act_scale")])
    static = inspect_checkpoint(folder)
    assert len(static.missing) == 2 * (4 + 16 * 3)
    assert f"{Q_PROJ}.input_scale" in static.missing
    edit_config(folder, quantization_config={"quant_method": "fp8", "activation_scheme": "dynamic"})
    assert inspect_checkpoint(folder).is_whole
    assert "dynamic" in inspect_checkpoint(folder).quantization
    weight_only = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_only": True}
    edit_config(folder, quantization_config=weight_only)
    assert "weight-only" in inspect_checkpoint(folder).quantization


@pytest.mark.parametrize("shape", [(2,), (64, 1)])
def test_fp8_scales_of_another_shape_contradict(shape, tmp_path):
    folder = copy("skywork-moe-tiny-fp8", tmp_path)
    name = f"{Q_PROJ}.weight_scale"
    file = folder / json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][name]
    edit(file, lambda state: state.update({name: torch.ones(shape)}))
    assert inspect_checkpoint(folder).contradictions == (f"`{name}` is {list(shape)}; expected [1].",)


def write_int8(folder: Path) -> PreTrainedModel:
    """A checkpoint with int8 linears, by hand; returns the model that it was made from."""
    model = SkyworkMoeForCausalLM(tiny_moe_config()).bfloat16()
    model.config.save_pretrained(folder)
    state = dict(model.state_dict())
    for name in [name for name in state if "self_attn" in name or "experts" in name]:
        rows = state[name].shape[0]
        state[name] = torch.ones(state[name].shape, dtype=torch.int8)
        state[f"{name}_scale"] = torch.ones(rows, dtype=torch.bfloat16)
    save_file(state, folder / "model.safetensors")
    edit_config(folder, quantization_config={"quant_method": "skywork_int8"})
    return model


def test_int8(tmp_path):
    model = write_int8(tmp_path)
    report = inspect_checkpoint(tmp_path)
    assert (report.is_whole, report.unexpected) == (True, ())
    assert report.layout == "Hub layout, int8"
    assert reported(report) == counts(model)
    assert sum(part.nbytes for part in report.parts) == data_bytes(tmp_path)
    assert parts(report)["experts"].nbytes == counts(model)["experts"]
    assert parts(report)["scales"].dtypes == ("bfloat16",)
    edit(tmp_path / "model.safetensors", lambda state: state.pop(f"{Q_PROJ}.weight_scale"))
    assert inspect_checkpoint(tmp_path).missing == (f"{Q_PROJ}.weight_scale",)


def test_a_linear_that_was_not_quantised_is_told(tmp_path):
    write_int8(tmp_path)

    def leave_out(state: dict[str, torch.Tensor]) -> None:
        state[f"{Q_PROJ}.weight"] = state[f"{Q_PROJ}.weight"].bfloat16()

    edit(tmp_path / "model.safetensors", leave_out)
    report = inspect_checkpoint(tmp_path)
    assert "attention (1 of 8 tensors)" in report.quantization
    assert report.unexpected == (f"{Q_PROJ}.weight_scale",)


@pytest.mark.parametrize("family", ["dense", "moe"])
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"load_in_8bit": True}, ("bitsandbytes 8-bit", "LLM.int8()")),
        ({"load_in_4bit": True}, ("bitsandbytes 4-bit", "fp4")),
        (
            {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
            ("bitsandbytes 4-bit", "nf4 with quantised scales"),
        ),
        ({"load_in_4bit": True, "bnb_4bit_quant_storage": torch.bfloat16}, ("bitsandbytes 4-bit", "weight-only")),
    ],
)
def test_bitsandbytes_as_transformers_writes_it(family, options, said, tmp_path):
    pytest.importorskip("bitsandbytes")
    config = (tiny_dense_config if family == "dense" else tiny_moe_config)(hidden_size=64, intermediate_size=96)
    plain = (SkyworkForCausalLM if family == "dense" else SkyworkMoeForCausalLM)(config)
    plain.save_pretrained(tmp_path / "plain")
    quantized = AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain", quantization_config=BitsAndBytesConfig(**options)
    )
    quantized.save_pretrained(tmp_path / "quantized")
    report = inspect_checkpoint(tmp_path / "quantized")
    assert (report.is_whole, report.unexpected) == (True, ())
    assert said[0] in report.layout
    assert said[1] in report.quantization
    assert reported(report) == counts(plain)
    assert sum(part.nbytes for part in report.parts) == data_bytes(tmp_path / "quantized")
    beside = f"{Q_PROJ}.SCB" if "load_in_8bit" in options else f"{Q_PROJ}.weight.absmax"
    edit(tmp_path / "quantized" / "model.safetensors", lambda state: state.pop(beside))
    assert inspect_checkpoint(tmp_path / "quantized").missing == (beside,)


def test_packed_weights_of_another_size_contradict(tmp_path):
    pytest.importorskip("bitsandbytes")
    SkyworkForCausalLM(tiny_dense_config(hidden_size=64)).save_pretrained(tmp_path)
    options = BitsAndBytesConfig(load_in_4bit=True)
    AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=options).save_pretrained(tmp_path)
    packed = torch.zeros(64 * 64 // 2 - 1, 1, dtype=torch.uint8)
    edit(tmp_path / "model.safetensors", lambda state: state.update({f"{Q_PROJ}.weight": packed}))
    (contradiction,) = inspect_checkpoint(tmp_path).contradictions
    assert f"{Q_PROJ}.weight" in contradiction
    assert "4,094" in contradiction


def training_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    letters = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
    renamed = {}
    for name, tensor in state.items():
        pieces = ["mlp.moe" if piece == "block_sparse_moe" else letters.get(piece, piece) for piece in name.split(".")]
        if "mlp.moe" in pieces:
            at = pieces.index("mlp.moe") + 1
            pieces[at] = {"gate": "gate.wg", "experts": "experts.experts"}[pieces[at]]
        renamed[".".join(pieces)] = tensor
    return renamed


@pytest.mark.parametrize("two_layer", [False, True])
@pytest.mark.parametrize("file", ["pytorch_model.bin", "weights-of-step-100.pt"])
def test_the_training_layout_is_recognised(file, two_layer, tmp_path, capsys):
    config = tiny_moe_config(num_hidden_layers=4, moe_expert_interval=2, moe_2layer_gate=two_layer)
    model = SkyworkMoeForCausalLM(config)
    config.save_pretrained(tmp_path)
    state = training_names(model.state_dict())
    gate = "wg.2" if two_layer else "wg"
    assert {f"model.layers.1.mlp.moe.gate.{gate}.weight", "model.layers.0.mlp.up_proj.weight"} <= state.keys()
    torch.save(state, tmp_path / file)
    report = inspect_checkpoint(tmp_path)
    assert report.layout.startswith("training layout")
    assert (report.is_whole, report.unexpected) == (True, ())
    assert reported(report) == counts(model)
    lost = "model.layers.3.mlp.moe.experts.experts.2.down_proj.weight"
    torch.save({name: tensor for name, tensor in state.items() if name != lost}, tmp_path / file)
    status, printed = run(tmp_path, capsys)
    assert status == 1
    assert f"missing        {lost}\n" in printed


def test_base_models_and_other_heads(tmp_path):
    model = SkyworkForCausalLM(tiny_dense_config())
    model.model.save_pretrained(tmp_path / "base")
    base = inspect_checkpoint(tmp_path / "base")
    assert "base model" in base.layout
    assert (base.is_whole, base.unexpected) == (True, ())
    assert base.parameters == model.model.num_parameters()
    edit(tmp_path / "base" / "model.safetensors", lambda state: state.pop("norm.weight"))
    assert inspect_checkpoint(tmp_path / "base").missing == ("norm.weight",)

    classifier = SkyworkForSequenceClassification(tiny_dense_config(num_labels=3))
    classifier.save_pretrained(tmp_path / "classifier")
    report = inspect_checkpoint(tmp_path / "classifier")
    assert (report.is_whole, report.unexpected) == (True, ())
    assert parts(report)["head"].parameters == 3 * 32

    SkyworkForCausalLM(tiny_dense_config(tie_word_embeddings=True)).save_pretrained(tmp_path / "tied")
    assert inspect_checkpoint(tmp_path / "tied").is_whole
    edit_config(tmp_path / "tied", tie_word_embeddings=False)
    assert inspect_checkpoint(tmp_path / "tied").missing == ("lm_head.weight",)


# Faults


@pytest.fixture
def whole(tmp_path):
    SkyworkMoeForCausalLM(tiny_moe_config()).save_pretrained(tmp_path)
    assert inspect_checkpoint(tmp_path).is_whole
    return tmp_path


def test_missing_unexpected_and_ignored_tensors(whole, capsys):
    def change(state: dict[str, torch.Tensor]) -> None:
        del state[f"{Q_PROJ}.weight"]
        state["model.layers.1.self_attn.surprise"] = torch.ones(5)
        state["model.layers.1.self_attn.rotary_emb.inv_freq"] = torch.ones(4)

    before = inspect_checkpoint(whole)
    edit(whole / "model.safetensors", change)
    report = inspect_checkpoint(whole)
    assert report.missing == (f"{Q_PROJ}.weight",)
    assert report.unexpected == ("model.layers.1.self_attn.surprise",)
    assert report.parameters == before.parameters - 32 * 32
    assert (parts(report)["other"].parameters, parts(report)["other"].nbytes) == (None, 4 * (5 + 4))
    status, printed = run(whole, capsys)
    assert status == 1
    assert f"missing        {Q_PROJ}.weight\n" in printed
    assert "unexpected     model.layers.1.self_attn.surprise\n" in printed


def test_what_is_unexpected_fails_nothing(whole, capsys):
    edit(whole / "model.safetensors", lambda state: state.update(surprise=torch.ones(2)))
    assert inspect_checkpoint(whole).unexpected == ("surprise",)
    assert run(whole, capsys)[0] == 0


def test_long_lists_are_cut(whole, capsys):
    def change(state: dict[str, torch.Tensor]) -> None:
        for name in [name for name in state if ".experts." in name][:11]:
            del state[name]

    edit(whole / "model.safetensors", change)
    _, printed = run(whole, capsys)
    assert len(inspect_checkpoint(whole).missing) == 11
    assert sum(".experts." in line for line in printed.splitlines()) == 8
    assert "               and 3 more\n" in printed


def test_shapes_that_contradict_the_config(whole, capsys):
    edit(whole / "model.safetensors", lambda state: state.update({"model.norm.weight": torch.ones(31)}))
    assert inspect_checkpoint(whole).contradictions == ("`model.norm.weight` is [31]; config.json says [32].",)
    status, printed = run(whole, capsys)
    assert status == 1
    assert "`model.norm.weight` is [31]; config.json says [32]." in printed


def test_a_config_of_another_shape_contradicts(whole):
    edit_config(whole, num_local_experts=5)
    report = inspect_checkpoint(whole)
    lost = [f"model.layers.{n}.block_sparse_moe.experts.4.{w}.weight" for n in (0, 1) for w in ("w1", "w2", "w3")]
    assert sorted(report.missing) == lost
    assert len(report.contradictions) == 2  # the gates


@pytest.mark.parametrize(
    ("name", "config", "said"),
    [
        ("skywork-moe-tiny-fp8", None, "as FP8, and config.json has no `quantization_config`"),
        ("skywork-moe-tiny", {"quant_method": "fp8", "activation_scheme": "static"}, "no weight is stored so"),
        ("skywork-moe-tiny-fp8", {"quant_method": "skywork_int8"}, "says int8, and the weights are stored as FP8"),
    ],
)
def test_a_config_that_says_another_storage_contradicts(name, config, said, tmp_path, capsys):
    folder = copy(name, tmp_path)
    edit_config(folder, quantization_config=config)
    (contradiction,) = inspect_checkpoint(folder).contradictions
    assert said in contradiction
    assert run(folder, capsys)[0] == 1


@pytest.mark.parametrize(
    ("quantization", "method"),
    [
        ({"quant_method": "compressed-tensors"}, "`compressed-tensors`"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "`fp8`"),
    ],
)
def test_an_unknown_method_is_named_and_no_scales_are_asked_for(quantization, method, tmp_path):
    folder = copy("skywork-moe-tiny-fp8", tmp_path)
    edit_config(folder, quantization_config=quantization)
    for file in folder.glob("model*.safetensors"):
        edit(file, lambda state: [state.pop(name) for name in list(state) if name.endswith("_scale")])
    report = inspect_checkpoint(folder)
    assert report.is_whole
    assert f"names {method}, in a form that this command does not know" in report.quantization


@pytest.mark.parametrize("name", ["skywork-moe-tiny", "skywork-13b-tiny"])
def test_a_shard_that_is_not_there(name, tmp_path, capsys):
    folder = copy(name, tmp_path)
    index = next(folder.glob("*.index.json"))
    weights = json.loads(index.read_text())["weight_map"]
    shard = sorted(set(weights.values()))[0]
    (folder / shard).unlink()
    report = inspect_checkpoint(folder)
    assert report.missing_shards == (shard,)
    assert set(report.missing) == {tensor for tensor, file in weights.items() if file == shard}
    status, printed = run(folder, capsys)
    assert status == 1
    assert f"missing files  {shard}\n" in printed


def test_shards_without_an_index_are_found(tmp_path):
    folder = copy("skywork-13b-tiny", tmp_path)
    (folder / "pytorch_model.bin.index.json").unlink()
    (folder / "golden.safetensors").unlink()
    report = inspect_checkpoint(folder)
    assert report.is_whole
    assert "named by no index file" in str(report)


def truncate(file: Path) -> Path:
    os.truncate(file, file.stat().st_size - 100)
    return file


def error(folder: Path) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011  # the callers look at the text
        inspect_checkpoint(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_path_that_is_no_folder(tmp_path):
    assert "`hf download OWNER/NAME`" in error(tmp_path / "nowhere")
    assert "is not a folder" in error(checkpoint("skywork-moe-tiny") / "config.json")
    with pytest.raises(SystemExit, match=r"skywork-hf: Skywork/Skywork-13B-base is not a folder"):
        main(["inspect", "Skywork/Skywork-13B-base"])


@pytest.mark.parametrize(
    ("name", "shard"),
    [
        ("skywork-moe-tiny", "model-00002-of-00003.safetensors"),
        ("skywork-13b-tiny", "pytorch_model-00001-of-00002.bin"),
    ],
)
def test_a_file_that_is_cut_off_is_named(name, shard, tmp_path):
    file = copy(name, tmp_path) / shard
    os.truncate(file, file.stat().st_size - 100)
    assert str(file) in error(file.parent)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "llama"}, "'llama'"),
        ({"model_type": None}, "of a None model"),
        ({"num_experts": [16, 8]}, "`num_experts`=[16, 8]"),
        ({"num_attention_heads": 0}, "describes no model that can be built"),
        ({"hidden_act": "unheard-of"}, "unheard-of"),
        ({"quantization_config": "fp8"}, "`quantization_config` of"),
    ],
)
def test_a_config_that_is_not_right_is_named(changes, said, tmp_path):
    folder = copy("skywork-moe-tiny", tmp_path)
    edit_config(folder, **changes)
    message = error(folder)
    assert str(folder / "config.json") in message
    assert said in message


def test_files_that_are_not_there_or_hold_something_else(tmp_path):
    source = copy("skywork-13b-tiny", tmp_path)
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    config, index = folder / "config.json", folder / "pytorch_model.bin.index.json"
    assert f"{config} is not there" in error(folder)
    for text in ("{", "[]"):
        config.write_text(text)
        assert str(config) in error(folder)
    shutil.copy(source / config.name, config)
    assert f"{folder} holds no weight files" in error(folder)
    shutil.copy(source / index.name, index)
    assert f"None of the 2 files that {index} names is there" in error(folder)
    for text in ("{", "{}", '{"weight_map": {"x": 1}}'):
        index.write_text(text)
        assert str(index) in error(folder)
    index.unlink()
    torch.save({"step": 3}, folder / "pytorch_model.bin")
    assert f"{folder / 'pytorch_model.bin'} holds something else" in error(folder)


def test_no_weights_are_read(tmp_path):
    """A file of half a TiB, all hole: what reads it, or makes such a model, does not come back."""
    config = tiny_dense_config(vocab_size=2**31, num_hidden_layers=1)
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        state = SkyworkForCausalLM(config).state_dict()
    header: dict[str, Any] = {}
    end = 0
    for name, tensor in state.items():
        start, end = end, end + 4 * tensor.numel()
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text)
    try:
        os.truncate(file, 8 + len(text) + end)
    except OSError:
        pytest.skip("the file system has no files of that size")
    report = inspect_checkpoint(tmp_path)
    assert report.is_whole
    assert report.parameters == sum(tensor.numel() for tensor in state.values())


def test_what_is_printed(capsys):
    status, printed = run(checkpoint("skywork-moe-tiny-fp8"), capsys)
    assert status == 0
    for line in (
        "family         Skywork-MoE\n",
        "experts        16 in 2 of 2 layers, 2 for each token\n",
        "parameters     1,334,464 (1.334 million), active 646,336\n",
        "missing        none\n",
    ):
        assert line in printed
    (experts,) = [line for line in printed.splitlines() if line.endswith("float8_e4m3fn") and "experts" in line]
    _, parameters, size, _ = experts.split()
    assert int(parameters.replace(",", "")) == 2 * 16 * 3 * 64 * 128
    assert float(size) == pytest.approx(2 * 16 * 3 * 64 * 128 / 2**30, rel=1e-3)
    assert not any(line.endswith(" ") for line in printed.splitlines())
