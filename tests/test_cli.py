"""The command line on wrong input: one sentence, never a traceback, nothing that a terminal obeys. `cli_fuzz.py` has
what is drawn at random; here is each kind by itself."""

from __future__ import annotations

import json
import os
import random
import shutil
import socket
import struct
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import cli_fuzz
import pytest
import torch
from cli_fuzz import ESCAPE, Outcome, call

from skywork_hf import SkyworkConfig, SkyworkMoeConfig
from skywork_hf.cli import main
from skywork_hf.untrusted import parse_json, printable

SAFETENSORS, PICKLE = "model.safetensors", "pytorch_model.bin"
GPU = ["--gpu", "1GiB", "--context", "16"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return cli_fuzz.seeds(tmp_path_factory.mktemp("whole"))


@pytest.fixture
def work(whole, tmp_path) -> Path:
    """Copies to spoil."""
    return Path(shutil.copytree(whole, tmp_path / "work"))


def refused(argv: list[Any], *words: Any) -> Outcome:
    """The call ends with one sentence that has these words."""
    outcome = call(list(map(str, argv)))
    assert not outcome.fault, outcome.fault
    assert isinstance(outcome.status, str), outcome.status
    for word in words:
        assert str(word) in outcome.status
    return outcome


def edit_config(folder: Path, **changes: Any) -> Path:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return file


def edit_header(file: Path, change: Any) -> None:
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = change(data[8 : 8 + length].decode()).encode()
    file.write_bytes(struct.pack("<Q", len(header)) + header + data[8 + length :])


def edit_pickle(folder: Path, change: Any) -> Path:
    state = torch.load(folder / PICKLE, weights_only=True)
    change(state)
    torch.save(state, folder / PICKLE)
    return folder / PICKLE


def rezip(file: Path, change: Any = lambda name, data: data, compression: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(file) as archive:
        records = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, data in records.items():
            archive.writestr(name, change(name, data))


# --- drawn at random


def test_spoilt_input(whole, tmp_path):
    found = [(words, one) for words, one in cli_fuzz.calls(whole, tmp_path / "work", seed=14, count=60) if one.fault]
    assert not found, cli_fuzz.report(found)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(4))
def test_spoilt_input_at_full_size(seed, whole, tmp_path):
    found = [(words, one) for words, one in cli_fuzz.calls(whole, tmp_path / "work", seed, count=800) if one.fault]
    assert not found, cli_fuzz.report(found)


def test_what_is_whole_is_read(whole, tmp_path):
    """Else a call that refused everything would pass."""
    draw = random.Random(0)
    for name in cli_fuzz.READ:
        work = shutil.copytree(whole, tmp_path / name)
        assert any(call(cli_fuzz.command(work, name, draw)).status == 0 for _ in range(6)), name


# --- JSON


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_size", "x"),
        ("num_attention_heads", [2]),
        ("bos_token_id", "x"),
        ("pad_token_id", 10**6),
        ("rope_scaling", [1]),
        ("rope_parameters", {"rope_type": {}}),
        ("num_experts", "x"),
        ("dtype", "banana"),
        ("to_dict", 5),
        ("quantization_config", {"quant_method": []}),
        ("quantization_config", {"quant_method": "skywork_int8", "modules_to_not_convert": 5}),
        ("quantization_config", {"quant_method": "fp8", "activation_scheme": "dynamic", "int8_devices": 5}),
    ],
)
def test_a_config_of_wrong_types(field, value, work):
    edit_config(work / "dense", **{field: value})
    refused(
        ["plan", work / "dense", *GPU], "dense" if field == "pad_token_id" else "config.json", "no model that can be"
    )


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 5000, '{"a": ' + "[" * 500 + "]" * 500 + "}"])
@pytest.mark.parametrize("argv", [["inspect"], ["plan"]])
def test_nested_json(argv, text, work):
    file = work / "dense" / "config.json"
    file.write_text(text)
    refused([*argv, work / "dense"], f"{file} is not JSON", "nested")


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999"])
def test_json_has_no_such_number(number):
    with pytest.raises(ValueError, match=r"no number of JSON|beyond the range"):
        parse_json(f'{{"a": {number}}}'.encode())


def test_infinite_offsets(work):
    file = work / "dense" / SAFETENSORS
    edit_header(file, lambda text: text.replace('"data_offsets":[0,', '"data_offsets":[1e999,'))
    refused(["inspect", work / "dense"], f"{file} is not a whole safetensors file", "1e999")


@pytest.mark.parametrize("shape", [[2**70], [1] * 65, [-1], [1.5], [True]])
def test_shapes_that_no_tensor_has(shape, work):
    file = work / "dense" / SAFETENSORS

    def change(text: str) -> str:
        header = json.loads(text)
        header["model.norm.weight"]["shape"] = shape
        return json.dumps(header)

    edit_header(file, change)
    refused(["inspect", work / "dense"], f"`model.norm.weight` in {file} has the `shape`")


@pytest.mark.parametrize("place", ["header", "config", "index"])
def test_halves_of_surrogate_pairs(place, work):
    half = "\\ud800"
    if place == "header":
        folder = work / "dense"
        edit_header(folder / SAFETENSORS, lambda text: text.replace("model.norm", f"model.{half}norm"))
    else:
        folder = work / "sharded"
        file = folder / {"config": "config.json", "index": "model.safetensors.index.json"}[place]
        file.write_text(file.read_text().replace("model", f"model{half}"))
    refused(["inspect", folder], "surrogates not allowed")


@pytest.mark.parametrize(
    "content", [{"tokens": float("nan")}, {"counts": [[float("nan")] * 4] * 2}, {"counts": [[-1] * 4] * 2}]
)
def test_usage_that_is_no_count(content, work):
    file = work / "usage.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **content}))
    refused(["plan", work / "moe", *GPU, "--usage", file], f"{file} holds no expert usage")


def test_a_damaged_note_of_an_interrupted_run_is_written_again(work):
    main(["convert", str(work / "dense"), str(work / "once")])
    whole = (work / "once" / SAFETENSORS).read_bytes()
    fingerprint = json.loads((work / "once" / "conversion.json").read_text())["fingerprint"]
    unfinished = work / "again.unfinished"
    (unfinished / "notes").mkdir(parents=True)
    (unfinished / "fingerprint").write_text(fingerprint)
    (work / "once").rename(unfinished / "result")
    (unfinished / "notes" / f"{SAFETENSORS}.json").write_text('[["0"], 3]')
    main(["convert", str(work / "dense"), str(work / "again"), "--resume"])
    assert (work / "again" / SAFETENSORS).read_bytes() == whole
    assert "null" not in (work / "again" / "conversion.json").read_text()


# --- pickles


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda tensor: tensor.to("meta"), "without values, on the meta device"),
        (lambda tensor: torch.zeros(()).expand(tensor.shape), "stored as fewer values than it has"),
    ],
)
@pytest.mark.parametrize("source", ["bin", "megatron"])
def test_tensors_without_values(make, said, source, work):
    if source == "bin":
        name = "model.norm.weight"
        file = edit_pickle(work / "bin", lambda state: state.update({name: make(state[name])}))
    else:
        name, file = (
            "model/embedding/word_embeddings/weight",
            work / "megatron/iter_0000040/mp_rank_00/model_optim_rng.pt",
        )
        content = cli_fuzz.read_rank(file)
        content["model"]["embedding.word_embeddings.weight"] = make(torch.zeros(128, 16))
        name = "model/embedding.word_embeddings.weight"
        torch.save(content, file)
    refused(["convert", work / source, work / "target"], f"`{name}` in {file} is {said}")


@pytest.mark.parametrize("command", ["inspect", "convert"])
@pytest.mark.parametrize("how", ["cut", "longer", "compressed"])
def test_records_that_are_no_storages(how, command, work):
    """torch maps the bytes that a tensor should have, whatever is there."""
    file = work / "bin" / PICKLE
    last = {"cut": lambda data: data[:4], "longer": lambda data: data + b"\1" * 8, "compressed": lambda data: data}[
        how
    ]
    compression = zipfile.ZIP_DEFLATED if how == "compressed" else zipfile.ZIP_STORED
    rezip(file, lambda name, data: last(data) if name.endswith("/data/3") else data, compression)
    argv = [command, work / "bin", work / "target"][: 2 if command == "inspect" else 3]
    refused(argv, f"{file} holds records that are compressed, or not as long as its tensors")
    assert not (work / "target").exists()


def test_records_are_those_of_views_and_shared_storages(work, tmp_path):
    """What is whole is not refused: several tensors in one storage, columns of it, one without a value."""

    def change(state: dict[str, torch.Tensor]) -> None:
        shared = torch.cat([state["lm_head.weight"].flatten(), torch.ones(7)])
        state["lm_head.weight"] = shared[:-7].view(state["lm_head.weight"].shape)
        state["rotary_emb.inv_freq"] = torch.empty(0)
        state["model.layers.0.rotary_emb.inv_freq"] = shared[-3:]

    before = torch.load(work / "bin" / PICKLE, weights_only=True)["lm_head.weight"]
    edit_pickle(work / "bin", change)
    main(["convert", str(work / "bin"), str(tmp_path / "hub")])
    assert torch.equal(cli_fuzz.load_file(tmp_path / "hub" / SAFETENSORS)["lm_head.weight"], before)


# --- files that are none


def spoil_kind(file: Path, kind: str) -> None:
    file.unlink(missing_ok=True)
    if kind == "a pipe":
        os.mkfifo(file)
    elif kind == "a folder":
        file.mkdir()
    elif kind == "a device":
        file.symlink_to("/dev/zero")
    else:
        with socket.socket(socket.AF_UNIX) as bound, cli_fuzz.contextlib.chdir(file.parent):
            bound.bind(file.name)


@pytest.mark.parametrize("kind", ["a pipe", "a folder", "a device", "a socket"])
@pytest.mark.parametrize(
    ("argv", "name"),
    [
        (["inspect", "dense"], "dense/config.json"),
        (["plan", "dense"], "dense/config.json"),
        (["inspect", "dense"], "dense/model.safetensors"),
        (["convert", "sharded", "target"], "sharded/model.safetensors.index.json"),
        (["convert", "sharded", "target"], "sharded/model-00001-of-00004.safetensors"),
        (["inspect", "bin"], "bin/pytorch_model.bin"),
        (["convert", "dense", "target"], "dense/generation_config.json"),
        (["convert", "dense", "target"], "dense/tokenizer_config.json"),
        (["convert", "dense", "target"], "dense/LICENSE"),
        (["convert", "dense", "target", "--adapter", "adapter"], "adapter/adapter_config.json"),
        (["convert", "dense", "target", "--adapter", "adapter"], "adapter/adapter_model.safetensors"),
        (["convert", "megatron", "target"], "megatron/latest_checkpointed_iteration.txt"),
        (["convert", "megatron", "target"], "megatron/iter_0000040/mp_rank_00/model_optim_rng.pt"),
        (["convert", "megatron", "target", "--config", "dense/config.json"], "dense/config.json"),
        (["plan", "moe", "--usage", "usage.json"], "usage.json"),
    ],
)
def test_what_is_no_file_is_not_opened(argv, name, kind, work, monkeypatch):
    monkeypatch.chdir(work)
    (work / "dense" / "tokenizer.model").touch()
    spoil_kind(work / name, kind)
    refused(argv, f"{name} is {kind}: expected a file")
    assert not (work / "target").exists()


def test_a_pipe_among_shards_that_no_index_names(work):
    (work / "sharded" / "model.safetensors.index.json").unlink()
    os.mkfifo(work / "sharded" / "more.safetensors")
    refused(["inspect", work / "sharded"], "more.safetensors is a pipe: expected a file", "No index names the shards")


# --- sizes


@pytest.mark.parametrize("command", ["plan", "inspect"])
@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("dense", "num_hidden_layers", 10**9),
        ("dense", "num_hidden_layers", True),
        ("dense", "hidden_size", 10**30),
        ("dense", "vocab_size", -1),
        ("moe", "num_experts", 10**9),
    ],
)
def test_sizes_that_no_model_has(name, field, value, command, work):
    raw = json.loads((work / name / "config.json").read_text())
    if field == "num_experts":
        field = next(key for key in ("num_experts", "num_local_experts") if key in raw)
    file = edit_config(work / name, **{field: value})
    refused([command, work / name], file, value)


@pytest.mark.parametrize("fields", [{"num_hidden_layers": 1024}, {"num_hidden_layers": 32, "num_experts": 256}])
def test_the_largest_models_are_configs(fields):
    config = SkyworkMoeConfig(**fields) if "num_experts" in fields else SkyworkConfig(**fields)
    assert config.num_hidden_layers == fields["num_hidden_layers"]
    with pytest.raises(
        ValueError, match=r"`num_hidden_layers`=1025: expected an integer from 1 to 1,024|experts in all"
    ):
        type(config)(**{**fields, "num_hidden_layers": fields["num_hidden_layers"] + 1})


# --- arguments


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--bandwidth 0=1e308", "`bandwidth` of 0 is 1e+308: expected GB/s from 0.001 to 1,000,000"),
        ("--bandwidth 0=1e-320", "`bandwidth` of 0 is 1e-320: expected GB/s"),
        ("--bandwidth 0=-inf", "`bandwidth` of 0 is -inf: expected GB/s"),
        (f"--context {10**30}", "`context_tokens`="),
        (f"--batch {10**30}", "`batch_size`="),
        ("--batch -1", "`batch_size`=-1"),
        (f"--ram {10**30}GiB", "`max_memory` of 'cpu' is"),
        ("--ram nan", "`max_memory` of 'cpu' is 'nan'"),
        ("--gpu 1000000000xrtx4090", "--gpu 1000000000xrtx4090: expected a card or a size"),
    ],
)
def test_numbers_that_nothing_can_be_counted_with(options, said, work):
    refused(["plan", work / "moe", *GPU, *options.split()], said)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--noise", "nan"], "`noise`=nan"),
        (["--noise", "1e308"], "`noise`=1e+308"),
        (["--noise=-1"], "`noise`=-1.0"),
        (["--experts", str(10**9)], "experts in all"),
        (["--max-shard-size", "1e999GB"], "--max-shard-size"),
        (["--max-shard-size", "nan"], "--max-shard-size"),
    ],
)
def test_numbers_that_nothing_can_be_made_with(options, said, work):
    refused(["upcycle", work / "dense", work / "target", *options], said)
    assert not (work / "target").exists()


def test_many_sequences_are_planned_in_time(work):
    outcome = call(
        ["plan", str(work / "moe"), "--gpu", "80GiB", "--bandwidth", "0=900", "--context", "1", "--batch", "1000000"]
    )
    assert (outcome.status, outcome.fault) == (0, "")
    assert "tokens a second" in outcome.output


@pytest.mark.parametrize(("first", "second"), [("double", "dense"), ("half", "double"), ("double", "half")])
def test_float64_is_compared_with_the_others(first, second, work):
    outcome = call(["verify", str(work / first), str(work / second)])
    assert not outcome.fault, outcome.fault
    assert outcome.status in (0, 1)
    assert "largest relative error" in outcome.output


# --- what reaches the terminal


@pytest.mark.parametrize("where", ["header", "index", "pickle", "config", "folder"])
def test_escapes_in_names_do_not_reach_the_terminal(where, work):
    folder = work / {"index": "sharded", "pickle": "bin"}.get(where, "dense")
    if where == "header":
        edit_header(
            folder / SAFETENSORS, lambda text: text.replace("model.norm", f"model.{json.dumps(ESCAPE)[1:-1]}norm")
        )
    elif where == "index":
        file = folder / "model.safetensors.index.json"
        file.write_text(file.read_text().replace("00001-of", json.dumps(ESCAPE)[1:-1]))
    elif where == "pickle":
        edit_pickle(folder, lambda state: state.update({ESCAPE: state.pop("model.norm.weight")}))
    elif where == "config":
        edit_config(folder, quantization_config={"quant_method": ESCAPE}, model_type="skywork")
    else:
        folder = folder.rename(folder.with_name(f"dense {ESCAPE}"))
    outcome = call(["inspect", str(folder)])
    assert not outcome.fault, outcome.fault
    if where in ("config", "folder"):
        assert r"\x1b[31m" in outcome.output


def test_escapes_in_arguments_do_not_reach_the_terminal(capsys):
    with pytest.raises(SystemExit):
        main(["inspect", "x", ESCAPE])
    assert r"unrecognized arguments: \x1b[31m" in capsys.readouterr().err


def test_what_a_terminal_obeys_is_spelled_out():
    assert printable("天工 a\tb\nc\x1b[0m\u202e\ud800\x9b") == "天工 a\\tb\nc\\x1b[0m\\u202e\\ud800\\x9b"


# --- the command itself


def test_what_nobody_foresaw_is_a_sentence_too(monkeypatch, work):
    def broken(_: Any) -> None:
        raise RuntimeError("of two\nlines")

    monkeypatch.setattr("skywork_hf.checkpoints.inspection.inspect_checkpoint", broken)
    with pytest.raises(SystemExit, match="skywork-hf: RuntimeError: of two lines This was not foreseen") as stop:
        main(["inspect", str(work / "dense")])
    file = Path(str(stop.value).partition("with ")[2].partition(",")[0])
    assert "inspect_checkpoint" in file.read_text()
    file.unlink()


def test_an_interruption_is_no_traceback(monkeypatch, work):
    def interrupted(_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("skywork_hf.checkpoints.inspection.inspect_checkpoint", interrupted)
    with pytest.raises(SystemExit, match="skywork-hf: interrupted"):
        main(["inspect", str(work / "dense")])


def test_help_and_wrong_arguments_import_neither_torch_nor_transformers():
    """And a reader that has seen enough is no error."""
    program = """
import sys
from skywork_hf.cli import main
for argv in (["--help"], ["plan", "--help"], ["convert"], ["upcycle", "a", "b", "--experts", "x"], ["nothing"]):
    try:
        main(argv)
    except SystemExit:
        pass
print(sorted({"torch", "transformers", "numpy", "safetensors"} & sys.modules.keys()))
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-1] == "[]"
    help_ = "from skywork_hf.cli import main; main(['--help'])"
    piped = subprocess.run(f'{sys.executable} -c "{help_}" | true', shell=True, capture_output=True, text=True)
    assert not piped.stderr
