"""No code of a folder that our configs claim ever runs, with `trust_remote_code=True` and whatever its files say."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny import checkpoint, tiny_dense_config, tiny_moe_config, tokens
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    dynamic_module_utils,
    pipeline,
)

from skywork_hf import SkyworkForCausalLM, SkyworkMoeForCausalLM, SkyworkTokenizer

TOKENIZER_FILES = ("tokenizer.model", "special_tokens_map.json")
CLASSES = [..., None, "", "SkyworkTokenizer", "SkyworkTokenizerFast", "LlamaTokenizer", "LlamaTokenizerFast", "Nobody"]
CLASSES += ["GPT2Tokenizer", "PreTrainedTokenizerFast", "TokenizersBackend", "BloomTokenizer"]
TOKENIZER_MAPS: list[Any] = [
    {"AutoTokenizer": ["payload.Thing", None]},
    {"AutoTokenizer": [None, "payload.Thing"]},
    {"AutoTokenizer": ["payload.Thing", "payload.Thing"]},
    ["payload.Thing", None],
    [None, "payload.Thing"],
    {},
    ...,
]
MODEL_MAP = dict.fromkeys(
    ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoModelForSequenceClassification", "AutoTokenizer"),
    "payload.Thing",
)
PIPELINES = {"text-generation": {"impl": "payload.Thing", "pt": ["AutoModelForCausalLM"], "type": "text"}}


@pytest.fixture(autouse=True)
def modules(tmp_path, monkeypatch):
    """Where transformers copies code before it runs it."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """A tiny checkpoint of each family, with a tokenizer."""
    folders = {}
    for family, model in (
        ("dense", SkyworkForCausalLM(tiny_dense_config())),
        ("moe", SkyworkMoeForCausalLM(tiny_moe_config())),
    ):
        folders[family] = tmp_path_factory.mktemp(family)
        model.save_pretrained(folders[family])
        for file in TOKENIZER_FILES:
            shutil.copy(checkpoint("skywork-13b-tiny") / file, folders[family])
    return folders


def edit(file: Path, **changes: Any) -> None:
    """`...` takes a key away."""
    content = {**(json.loads(file.read_text()) if file.exists() else {}), **changes}
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


def arm(folder: Path, marker: Path) -> None:
    """Code under every name, which leaves a file when it runs."""
    code = f"open({str(marker)!r}, 'w').close()\nclass Thing: pass\ndef generate(model, **kwargs): return 'ran'\n"
    (folder / "custom_generate").mkdir()
    for file in ("payload.py", "custom_generate/generate.py"):
        (folder / file).write_text(code)


def ways_in(folder: Path, within: Path) -> dict[str, Any]:
    """All that a program may do with a folder, by name; each may raise."""
    trust = {"trust_remote_code": True}
    below = {"subfolder": str(within.relative_to(folder))} if within != folder else {}

    def generate() -> Any:
        model = AutoModelForCausalLM.from_pretrained(folder, **trust, **below)
        model.generate(tokens(1, 3), max_new_tokens=2, do_sample=False)
        return model.generate(tokens(1, 3), custom_generate=str(within), **trust)

    return {
        "config": lambda: AutoConfig.from_pretrained(folder, **trust, **below),
        "tokenizer": lambda: AutoTokenizer.from_pretrained(folder, **trust, **below),
        "tokenizer, as a string": lambda: AutoTokenizer.from_pretrained(
            f"{folder}/", use_fast=False, **trust, **below
        ),
        "tokenizer with a config": lambda: AutoTokenizer.from_pretrained(
            folder, config=AutoConfig.from_pretrained(folder, **below), **trust, **below
        ),
        "model": lambda: AutoModel.from_pretrained(folder, **trust, **below),
        "classifier": lambda: AutoModelForSequenceClassification.from_pretrained(folder, **trust, **below),
        "generate": generate,
        "pipeline": lambda: pipeline("text-generation", str(within), **trust),
        "pipeline of no task": lambda: pipeline(model=str(within), **trust),
    }


@pytest.mark.parametrize("seed", range(40))
def test_nothing_of_a_folder_runs(seed, models, tmp_path):
    draw = random.Random(seed)
    folder, marker = tmp_path / "folder", tmp_path / "ran"
    within = folder / draw.choice(["", "", "", "below", "a/b"])
    shutil.copytree(models[draw.choice(["dense", "moe"])], within)
    arm(within, marker)
    changes: dict[str, Any] = {
        "auto_map": draw.choice([MODEL_MAP, {"AutoConfig": "payload.Thing"}, ...]),
        "custom_pipelines": draw.choice([PIPELINES, ...]),
        "tokenizer_class": draw.choice(CLASSES),
        "model_name": draw.choice(["name", ...]),
        "model_type": draw.choice(["skywork", "skywork_moe"]),
        "num_attention_heads": draw.choice([4, 4, 4, 3]),  # 3 is refused, and AutoTokenizer goes on without a config
    }
    edit(within / "config.json", **changes)
    tokenizer = {"tokenizer_class": draw.choice(CLASSES), "auto_map": draw.choice(TOKENIZER_MAPS)}
    if draw.random() < 0.9:
        edit(within / "tokenizer_config.json", **tokenizer)
    edit(within / "generation_config.json", custom_generate=draw.choice([str(within), ...]))
    for name, enter in ways_in(folder, within).items():
        with contextlib.suppress(Exception):
            enter()
        assert not marker.exists(), f"{name} ran it: {changes} {tokenizer}"


def test_what_would_run_it_is_seen(models, tmp_path):
    """The same folder under another model type: so the test above can fail."""
    folder = tmp_path / "folder"
    shutil.copytree(models["dense"], folder)
    edit(folder / "config.json", model_type="llama", architectures=["LlamaForCausalLM"], auto_map=...)
    edit(folder / "tokenizer_config.json", auto_map=TOKENIZER_MAPS[0])
    for name in ("tokenizer", "generate"):
        arm(folder, tmp_path / name)
        with pytest.raises(AttributeError) if name == "tokenizer" else pytest.raises(Exception):  # noqa: PT011
            ways_in(folder, folder)[name]()
        assert (tmp_path / name).exists()
        shutil.rmtree(folder / "custom_generate")


def test_the_refusal_names_the_file_and_a_way_that_works(models, tmp_path):
    folder = tmp_path / "folder"
    shutil.copytree(models["dense"], folder)
    edit(folder / "tokenizer_config.json", tokenizer_class="LlamaTokenizer", auto_map=TOKENIZER_MAPS[0])
    with pytest.raises(ValueError, match=rf"{folder}/tokenizer_config.json .*'LlamaTokenizer'.*SkyworkTokenizer"):
        AutoTokenizer.from_pretrained(folder)
    assert type(AutoModelForCausalLM.from_pretrained(folder)) is SkyworkForCausalLM
    assert SkyworkTokenizer.from_pretrained(folder)("陕西").input_ids
    edit(folder / "tokenizer_config.json", tokenizer_class="SkyworkTokenizer")
    assert type(AutoTokenizer.from_pretrained(folder, trust_remote_code=True)) is SkyworkTokenizer


def test_a_custom_generate_of_another_repository_is_the_users_choice(models, tmp_path):
    arm(tmp_path, tmp_path / "ran")
    model = AutoModelForCausalLM.from_pretrained(models["dense"])
    assert model.generate(tokens(1, 3), custom_generate=str(tmp_path), trust_remote_code=True) == "ran"
    with pytest.raises(OSError, match=r"`custom_generate` of .* is not run"):
        model.generate(tokens(1, 3), custom_generate=str(models["moe"]), trust_remote_code=True)


def test_another_revision_of_a_repository(models, tmp_path):
    """From the cache: the tokenizer of the revision that is asked for is hostile, and that of the default is not."""
    snapshots = tmp_path / "hub" / "models--some--one" / "snapshots"
    for commit in ("a" * 40, "b" * 40):
        shutil.copytree(models["dense"], snapshots / commit)
    arm(snapshots / ("b" * 40), tmp_path / "ran")
    edit(snapshots / ("a" * 40) / "tokenizer_config.json", tokenizer_class="SkyworkTokenizer")
    edit(snapshots / ("b" * 40) / "tokenizer_config.json", auto_map=TOKENIZER_MAPS[0])
    (snapshots.parent / "refs").mkdir()
    (snapshots.parent / "refs" / "main").write_text("a" * 40)
    code = (
        "import skywork_hf, sys; from transformers import AutoTokenizer\n"
        "AutoTokenizer.from_pretrained('some/one', revision='b' * 40, trust_remote_code=True)"
    )
    environment = {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert "tokenizer_config.json of some/one names code of the checkpoint" in run.stderr
    assert not (tmp_path / "ran").exists()
