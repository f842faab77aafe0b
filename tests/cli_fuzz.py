"""Wrong input for the command line: whole checkpoints, and seeded ways to spoil them.

A call must end within its bounds with status 0 or with one sentence and another status, print nothing that a terminal
would obey, and leave nothing half-written behind.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import logging
import os
import random
import re
import resource
import shutil
import signal
import socket
import struct
import traceback
import warnings
import zipfile
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from test_megatron import Writer
from tiny import tiny_dense_config, tiny_moe_config

from skywork_hf import SkyworkForCausalLM, SkyworkMoeForCausalLM
from skywork_hf.checkpoints.convert import convert_checkpoint, quantize_checkpoint
from skywork_hf.cli import main
from skywork_hf.placement import ExpertUsage

SECONDS, NEW_BYTES = 15, 2**31  # of one call
ESCAPE = "\x1b[31m\x1b]0;owned\x07"
# What a terminal would obey, or what no encoding has.
OBEYED = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
SHAPE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
NUMBERS = [
    "0",
    "-1",
    "1",
    "1.5",
    "nan",
    "inf",
    "-inf",
    "1e308",
    "1e-320",
    "1e999",
    str(10**9),
    str(10**30),
    "9" * 5000,
]
TEXTS = ["", " ", "x", "\u00b2", "\u0663", ESCAPE, "a\nb", "\udcff", "=", "..", "/dev/zero", "x" * 5000]
VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 3, 2**31, 2**63, 10**9, 10**30, 0.5, -1.5, 1e308, 1e-320, "", "x", "1", ESCAPE,
    "a\nb", "\ud800", "x" * 5000, [], {}, [1], ["x"], [[]], [None], {"x": 1}, [16, 8],
    {"type": "linear", "factor": "x"}, {"type": [], "factor": 0}, {"quant_method": "fp8"}, {"quant_method": []},
    {"load_in_8bit": 1}, "bfloat16", "..", {"quant_method": "skywork_int8", "modules_to_not_convert": 5},
    "llama", "skywork_moe", "int8", "/dev/zero",
]  # fmt: skip
KEYS = ["to_dict", "__class__", "_name_or_path", "dtype", "quantization_config", "rope_scaling", "num_experts", ESCAPE]
# In the place of a value of JSON: what Python's encoder does not write.
RAW = [
    "NaN",
    "Infinity",
    "-Infinity",
    "1e999",
    "-1e999",
    "[" * 100_000,
    "[" * 500 + "]" * 500,
    '{"a":' * 5000,
    '"\\udc00"',
]


# --- whole checkpoints, once


def seeds(folder: Path) -> Path:
    """One of each kind of input, all of them right."""
    torch.manual_seed(0)
    dense, moe = tiny_dense_config(**SHAPE), tiny_moe_config(**SHAPE)
    model = SkyworkForCausalLM(dense)
    model.save_pretrained(folder / "dense")
    SkyworkMoeForCausalLM(moe).save_pretrained(folder / "moe")
    SkyworkForCausalLM(dense).save_pretrained(folder / "sharded", max_shard_size="8KB")
    SkyworkForCausalLM(dense).to(torch.float64).save_pretrained(folder / "double")
    model.to(torch.bfloat16).save_pretrained(folder / "half")
    quantize_checkpoint(folder / "moe", folder / "int8", "int8")
    quantize_checkpoint(folder / "moe", folder / "fp8", "fp8")
    convert_checkpoint(folder / "moe", folder / "training", to="training")
    tensors = load_file(folder / "dense" / "model.safetensors")
    (folder / "bin").mkdir()
    torch.save(tensors, folder / "bin" / "pytorch_model.bin")
    shutil.copy(folder / "dense" / "config.json", folder / "bin")
    experts = load_file(folder / "moe" / "model.safetensors")
    Writer(tensors, dense, tp=2).write(folder / "megatron")
    Writer(experts, moe, ep=2).write(folder / "megatron-moe")
    _adapter(folder / "adapter", tensors)
    counts = torch.tensor([[5, 3, 2, 2], [4, 4, 2, 2]])
    ExpertUsage([0, 1], counts, torch.diag_embed(counts), 6).save(folder / "usage.json")
    return folder


def _adapter(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    pairs = {}
    for name, weight in tensors.items():
        if "q_proj" in name:
            path = f"base_model.model.{name.removesuffix('.weight')}"
            pairs[f"{path}.lora_A.weight"] = torch.randn(2, weight.shape[1])
            pairs[f"{path}.lora_B.weight"] = torch.randn(weight.shape[0], 2)
    save_file(pairs, folder / "adapter_model.safetensors")


# --- ways to spoil them


def _places(content: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if path:
        yield path
    pairs = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in pairs:
        yield from _places(value, (*path, key))


def spoil_value(content: Any, draw: random.Random) -> Any:
    """Change one place of nested dicts and lists."""
    content = copy.deepcopy(content)
    *parents, last = draw.choice(list(_places(content)) or [(None,)])
    if last is None:
        return draw.choice(VALUES)
    holder = content
    for key in parents:
        holder = holder[key]
    kind = draw.randrange(8)
    if kind == 0:
        del holder[last]
    elif kind == 1 and isinstance(holder, dict):
        holder[draw.choice([*KEYS, "\ud800"])] = holder.pop(last)
    elif kind == 2 and isinstance(holder, dict):
        holder[draw.choice(KEYS)] = draw.choice(VALUES)
    else:
        holder[last] = draw.choice(VALUES)
    return content


def spoil_json(text: str, draw: random.Random) -> bytes:
    kind = draw.randrange(10)
    if kind == 0:
        return spoil_bytes(text.encode(), draw)
    if kind == 1:
        return draw.choice([b"", b"\xef\xbb\xbf" + text.encode(), b"\xff\xfe\x00", b"[]", b"3", b"null", b"\0" * 99])
    content = json.loads(text)
    for _ in range(draw.choice([1, 1, 2, 5])):
        content = spoil_value(content, draw)
    written = json.dumps(content)
    if kind == 2 and (values := list(re.finditer(r"(?<=[:,\[] )[^\s,{}\[\]]+", written))):
        found = draw.choice(values)
        written = written[: found.start()] + draw.choice(RAW) + written[found.end() :]
    return written.encode()


def spoil_bytes(data: bytes, draw: random.Random) -> bytes:
    changed = bytearray(data)
    kind = draw.randrange(4)
    if kind == 0:
        return data[: draw.randrange(len(data) + 1)]
    if kind == 1:
        return data + draw.randbytes(draw.choice([1, 8, 4096]))
    for _ in range(draw.choice([1, 4, 64])):
        if changed:
            place = draw.randrange(len(changed) if kind == 2 else min(len(changed), 200))
            changed[place] = draw.randrange(256)
    return bytes(changed)


def spoil_safetensors(file: Path, draw: random.Random) -> None:
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    if draw.random() < 0.3:
        file.write_bytes(spoil_bytes(data, draw))
        return
    header = spoil_json(data[8 : 8 + length].decode(), draw)
    claimed = len(header) if draw.random() < 0.9 else draw.choice([0, 1, 2**40, 2**64 - 1])
    file.write_bytes(struct.pack("<Q", claimed) + header + data[8 + length :])


def _strange_tensors(tensor: torch.Tensor) -> list[Any]:
    tensor = tensor.clone()
    cyclic: dict[str, Any] = {}
    cyclic["a"] = cyclic
    return [
        tensor.to("meta"), tensor.to_sparse(), tensor.to(torch.complex64), tensor.double(), tensor.to(torch.int64),
        tensor.flatten(), tensor.t() if tensor.dim() == 2 else tensor[None], (tensor * torch.nan).to(tensor.dtype),
        torch.zeros(()).expand(tensor.shape), torch.zeros(()).expand(2**40), torch.empty(0), tensor.bool(),
        torch.quantize_per_tensor(tensor.float(), 0.1, 0, torch.qint8), torch.nn.Parameter(tensor, False), cyclic,
        [tensor], {"x": tensor}, 3, None, "x", torch.float32,
    ]  # fmt: skip


def spoil_state(content: dict[Any, Any], draw: random.Random) -> None:
    name = draw.choice(list(content))
    tensor = content[name] if isinstance(content[name], torch.Tensor) else torch.zeros(2, 2)
    kind = draw.randrange(4)
    if kind == 0:
        content[draw.choice([ESCAPE, "\ud800", "a\nb", 3, None, (1, 2), "x" * 5000, "state_dict"])] = content.pop(name)
    elif kind == 1:
        del content[name]
    else:
        content[name] = draw.choice(_strange_tensors(tensor))


def spoil_records(file: Path, draw: random.Random) -> None:
    """Write the zip of a pickle again: one record cut, lengthened, dropped, or all of them compressed."""
    with zipfile.ZipFile(file) as archive:
        records = {info.filename: archive.read(info) for info in archive.infolist()}
    storages = [name for name in records if "/data/" in name]
    name = draw.choice(storages)
    kind = draw.randrange(4)
    if kind == 0:
        records[name] = records[name][: len(records[name]) // 2]
    elif kind == 1:
        records[name] += b"\1" * 64
    elif kind == 2:
        del records[name]
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED if kind == 3 else zipfile.ZIP_STORED) as archive:
        for name, data in records.items():
            archive.writestr(name, data)


def read_rank(file: Path) -> Any:
    """A pickle's content in memory, not mapped: it is written again."""
    with torch.serialization.safe_globals([Namespace]):
        return torch.load(file, weights_only=True)


def spoil_pickle(file: Path, draw: random.Random) -> None:
    kind = draw.randrange(4)
    if kind == 0:
        file.write_bytes(spoil_bytes(file.read_bytes(), draw))
    elif kind == 1:
        spoil_records(file, draw)
    else:
        content = read_rank(file)
        if "args" in content and draw.random() < 0.7:
            args = vars(content["args"])
            args[draw.choice([*args, "num_experts", "moe_router_topk", "window_size"])] = draw.choice(
                [*VALUES, torch.zeros(3), float("nan"), float("inf"), 10**400, (1, [2])]
            )
        elif "args" in content and draw.random() < 0.3:
            content[draw.choice(list(content))] = draw.choice(VALUES)
        else:
            spoil_state(content.get("model", content), draw)
        torch.save(content, file, _use_new_zipfile_serialization=draw.random() < 0.8)


def spoil_kind(file: Path, draw: random.Random) -> None:
    """Make something else of a file."""
    file.unlink()
    kind = draw.randrange(6)
    if kind == 0:
        os.mkfifo(file)
    elif kind == 1:
        file.mkdir()
    elif kind == 2:
        file.symlink_to(draw.choice(["/dev/zero", "nowhere", file.name]))
    elif kind == 3:
        with socket.socket(socket.AF_UNIX) as bound, contextlib.chdir(file.parent):  # such names must be short
            bound.bind(file.name)
    elif kind == 4:
        file.write_bytes(b"")


def spoil(folder: Path, draw: random.Random) -> str:
    """Spoil one file of a checkpoint, or add one. Returns what was done, for the report."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "conversion.json")
    file = draw.choice(files)
    if draw.random() < 0.12:
        spoil_kind(file, draw)
    elif draw.random() < 0.05:
        odd = file.with_name(draw.choice(["extra.safetensors", "model.safetensors", f"{ESCAPE}.safetensors", "a.bin"]))
        if not odd.exists():
            os.mkfifo(odd)
    elif file.suffix == ".json":
        file.write_bytes(spoil_json(file.read_text(), draw))
    elif file.suffix == ".safetensors":
        spoil_safetensors(file, draw)
    elif file.suffix in (".bin", ".pt"):
        spoil_pickle(file, draw)
    else:
        file.write_bytes(
            draw.choice([b"", b"\xff\xfe", b"9" * 5000, "\u00b2".encode(), b"-1", ESCAPE.encode(), b"release"])
        )
    return str(file.relative_to(folder.parent))


# --- one call


@dataclass
class Outcome:
    """What a call came to; `fault` says what it must not, or is empty."""

    argv: list[str]
    status: Any
    output: str
    errors: str
    fault: str = ""


class TooLong(BaseException):
    """The alarm."""


def call(argv: list[str]) -> Outcome:
    """Run the command in this process, within `SECONDS`."""

    def ring(*_: Any) -> None:
        raise TooLong

    output, errors = io.StringIO(), io.StringIO()
    handler = logging.getLogger("transformers").handlers
    streams = [(one, one.setStream(errors)) for one in handler if isinstance(one, logging.StreamHandler)]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    previous = signal.signal(signal.SIGALRM, ring)
    signal.alarm(SECONDS)
    outcome = Outcome(argv, 0, "", "")
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors), warnings.catch_warnings():
            warnings.simplefilter("always")
            main(argv)
    except SystemExit as stop:
        outcome.status = stop.code or 0
    except TooLong:
        outcome.fault = f"longer than {SECONDS} s\n{''.join(traceback.format_exc().splitlines(True)[-25:])}"
    except BaseException:
        outcome.fault = traceback.format_exc()
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
        for one, stream in streams:
            one.setStream(stream)
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    outcome.output, outcome.errors = output.getvalue(), errors.getvalue()
    outcome.fault = outcome.fault or _fault(outcome, grown)
    return outcome


def _fault(outcome: Outcome, grown: int) -> str:
    said = outcome.status if isinstance(outcome.status, str) else outcome.errors
    if grown > NEW_BYTES:
        return f"took {grown:,} bytes"
    if found := OBEYED.search(outcome.output + said + outcome.errors):
        return f"printed {found[0]!r}"
    if isinstance(outcome.status, str) and ("\n" in said or not said.startswith("skywork-hf: ") or len(said) > 5000):
        return f"no sentence: {said!r}"
    if "This was not foreseen" in said:
        return said
    return "" if outcome.status == 0 or said or outcome.output else f"status {outcome.status} without a word"


def _spoil_arguments(argv: list[str], draw: random.Random) -> list[str]:
    place = draw.randrange(1, len(argv))
    key, separator, _ = argv[place].rpartition("=")
    return [*argv[:place], key + separator + draw.choice(NUMBERS + TEXTS), *argv[place + 1 :]]


READ = ["dense", "moe", "sharded", "bin", "half", "double", "int8", "fp8", "training", "megatron", "megatron-moe"]


def command(folder: Path, source: str, draw: random.Random) -> list[str]:
    """A call that reads the copy of `source`."""
    given, target = str(folder / source), str(folder / "target")
    experts = ["--experts", "4", "--top-k", "2", "--seed", "1", "--noise", "0.1", "--layers", "2"]
    size = ["--max-shard-size", draw.choice(["9KB", "5GB"])]
    devices = draw.choice(
        [
            ["--gpu", "2x1GiB", "--ram", "4GiB", "--bandwidth", "cpu=60", "0=100", "1=90"],
            ["--max-memory", "0=2GiB", "cpu=4GiB", "--bandwidth", "cpu=9", "--quantization", "gpu=fp8", "cpu=int8"],
            ["--gpu", "rtx3090", "--will-it-help", "24GiB", "--context", "64", "--batch", "2"],
        ]
    )
    plan = ["plan", given, *devices, "--save", str(folder / "plan.json")]
    calls = {
        "inspect": ["inspect", given],
        "plan": plan,
        "usage": ["plan", str(folder / "moe"), *devices, "--usage", str(folder / "usage.json")],
        "convert": ["convert", given, target, *size, "--to", draw.choice(["hub", "training", "llama"])],
        "cast": ["convert", given, target, "--dtype", draw.choice(["float16", "float32"])],
        "config": ["convert", given, target, "--config", str(folder / "dense" / "config.json")],
        "adapter": ["convert", str(folder / "dense"), target, "--adapter", str(folder / "adapter")],
        "resume": ["convert", given, target, "--resume"],
        "quantize": ["quantize", given, target, "--method", draw.choice(["int8", "fp8", "fp8-weight-only"])],
        "upcycle": ["upcycle", given, target, *experts],
        "verify": ["verify", given, str(folder / draw.choice([source, "dense", "moe", "double"]))],
        "demo": ["demo", "--fast"],
    }  # fmt: skip
    weights = {"inspect": 4, "plan": 4, "usage": 2, "convert": 3, "adapter": 3, "demo": 0.2}
    return calls[draw.choices(list(calls), [weights.get(name, 1) for name in calls])[0]]


def calls(whole: Path, work: Path, seed: int, count: int) -> Iterator[tuple[str, Outcome]]:
    """`count` calls with spoilt files or arguments; each with the words that make it again."""
    for number in range(count):
        draw = random.Random(f"{seed} {number}")
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(whole, work)
        source = draw.choice(READ)
        argv = command(work, source, draw)
        if draw.random() < 0.2 or argv[0] == "demo":
            argv, spoilt = _spoil_arguments(argv, draw), "arguments"
        else:
            spoilt = _spoil_what_is_read(work, source, argv, draw)
        with contextlib.chdir(work):  # spoilt arguments may be names of files to write
            outcome = call(argv)
        outcome.fault = outcome.fault or _left_behind(work / "target", outcome)
        yield f"seed {seed} number {number}: {spoilt}: {' '.join(argv)!r:.300}", outcome


def _spoil_what_is_read(work: Path, source: str, argv: list[str], draw: random.Random) -> str:
    if "--adapter" in argv:
        return spoil(work / "adapter", draw)
    if "--usage" in argv:
        file = work / "usage.json"
        spoil_kind(file, draw) if draw.random() < 0.1 else file.write_bytes(spoil_json(file.read_text(), draw))
        return "usage.json"
    if "--resume" in argv:
        return _spoil_what_is_resumed(work, argv, draw)
    return spoil(work / ("dense" if "--config" in argv and draw.random() < 0.7 else source), draw)


def _spoil_what_is_resumed(work: Path, argv: list[str], draw: random.Random) -> str:
    """Spoil the manifest of a whole result, or the notes of an interrupted run."""
    call(argv)
    target = work / "target"
    if not target.exists():
        return "nothing"
    manifest = target / "conversion.json"
    if draw.random() < 0.5:
        spoil_kind(manifest, draw) if draw.random() < 0.2 else manifest.write_bytes(
            spoil_json(manifest.read_text(), draw)
        )
        return "manifest"
    unfinished = target.with_name("target.unfinished")
    content = json.loads(manifest.read_text())
    (unfinished / "notes").mkdir(parents=True)
    (unfinished / "fingerprint").write_text(content["fingerprint"])
    target.rename(unfinished / "result")
    notes = json.dumps([[product["crc32"] for product in entry["products"]] for entry in content["tensors"]])
    note = unfinished / "notes" / "model.safetensors.json"
    note.write_bytes(spoil_json(notes, draw))
    if draw.random() < 0.2:
        spoil_kind(note, draw)
    return "notes"


def _left_behind(target: Path, outcome: Outcome) -> str:
    """What is under the target's name is whole, or not there."""
    if outcome.status != 0 and "is there already" not in str(outcome.status) and target.exists():
        return f"{outcome.status!r}, and {target} is there"
    if target.exists() and not ((target / "config.json").is_file() and any(target.glob("*.safetensors"))):
        return f"{target} is not whole"
    return ""


def report(found: list[tuple[str, Outcome]]) -> str:
    """The faults, those that end in the same line once."""
    kinds: dict[str, list[str]] = {}
    for words, outcome in found:
        lines = outcome.fault.strip().splitlines()
        kinds.setdefault(" / ".join(lines[-3:])[:300], []).append(f"{words}\n{outcome.fault}")
    return "\n\n".join(
        f"{len(each)} x {kind}\n{each[0]}" for kind, each in sorted(kinds.items(), key=lambda k: -len(k[1]))
    )
