"""What is read as a checkpoint and what is refused, each with one sentence and before anything is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_dense_config

from skywork_hf import SkyworkForCausalLM
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
