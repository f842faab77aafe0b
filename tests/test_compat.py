"""Both ends of the range of transformers: no warning of what a later one drops, and nothing of it elsewhere."""

from __future__ import annotations

import re
import subprocess
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from tiny import tiny_dense_config, tiny_moe_config, tokens
from transformers import DynamicCache

from skywork_hf import SkyworkForCausalLM, SkyworkMoeForCausalLM
from skywork_hf.compat import CACHE

ROOT = Path(__file__).parents[1]


@pytest.fixture(params=["dense", "moe"])
def model(request):
    dense = request.param == "dense"
    made = SkyworkForCausalLM(tiny_dense_config()) if dense else SkyworkMoeForCausalLM(tiny_moe_config())
    return made.eval()


def test_generating_warns_of_nothing_that_goes(model):
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        model.generate(tokens(), max_new_tokens=3, **{CACHE: DynamicCache(config=model.config)})
        output = model(tokens(), use_cache=True)
    assert output[CACHE].get_seq_length() == 10


@torch.no_grad()
def test_either_name_of_the_cache_continues_a_text(model):
    ids = tokens()
    whole = model(ids).logits[:, 6:]
    for name in {CACHE, "past_key_values"}:
        past = model(ids[:, :6], use_cache=True)[CACHE]
        torch.testing.assert_close(model(ids[:, 6:], **{name: past}).logits, whole)


def test_both_ends_of_the_range_run():
    """The workflow and the Makefile name the range that pyproject.toml has."""
    pyproject = (ROOT / "pyproject.toml").read_text()
    major, oldest, beyond = re.search(r'"transformers>=(\d+)\.(\d+),<\1\.(\d+)"', pyproject).groups()
    matrix = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]["tests"]["strategy"][
        "matrix"
    ]
    assert matrix["transformers"] == [f"{major}.{oldest}.0", f"{major}.{int(beyond) - 1}.*"]
    oldest_torch = re.search(r'"torch>=([0-9.]+)"', pyproject)[1] + ".0"
    assert [(job["transformers"], job["torch"]) for job in matrix["include"]] == [
        (release, oldest_torch) for release in matrix["transformers"]
    ]
    assert matrix["torch"] == re.findall(r"torch==(\S+)", (ROOT / "constraints.txt").read_text())
    assert matrix["python"][0] == re.search(r'requires-python = ">=([0-9.]+)"', pyproject)[1]
    makefile = subprocess.run(
        ["make", "-n", "test-oldest"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert f"transformers-{major}.{oldest} " in makefile  # the folder that it is unpacked into
    assert all((ROOT / path).exists() for path in re.findall(r"tests/test_\w+\.py", makefile))
