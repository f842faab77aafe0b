"""Tiny models of both families, and the same weights as transformers' Llama and Mixtral."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_dense_config, tiny_moe_config
from transformers import AutoTokenizer

from skywork_hf import SkyworkForCausalLM, SkyworkMoeForCausalLM
from skywork_hf.demo import trained_checkpoint

os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
PEERS = {"dense": ("llama", "LlamaForCausalLM"), "moe": ("mixtral", "MixtralForCausalLM")}


@pytest.fixture(scope="session")
def folders(tmp_path_factory: Any) -> Callable[[str], tuple[Path, Path]]:
    """By family: the folder of a model of ours and its tokenizer, and its peer's, which computes the same."""
    tokenizer = AutoTokenizer.from_pretrained(trained_checkpoint())
    made: dict[str, tuple[Path, Path]] = {}

    def make(family: str) -> tuple[Path, Path]:
        if family not in made:
            made[family] = _make(family, tokenizer, tmp_path_factory.mktemp(family))
        return made[family]

    return make


def _make(family: str, tokenizer: Any, folder: Path) -> tuple[Path, Path]:
    torch.manual_seed(0)
    shape: dict[str, Any] = {"vocab_size": len(tokenizer), "max_position_embeddings": 128}
    if family == "dense":
        model: Any = SkyworkForCausalLM(tiny_dense_config(**shape))
    else:  # Mixtral's gates do not normalise
        model = SkyworkMoeForCausalLM(tiny_moe_config(moe_use_logits_norm=False, **shape))
    ours, peer = folder / "ours", folder / "peer"
    model.save_pretrained(ours)
    tokenizer.save_pretrained(ours)
    shutil.copytree(ours, peer)
    config = json.loads((peer / "config.json").read_text())
    config["model_type"], architecture = PEERS[family]
    (peer / "config.json").write_text(json.dumps({**config, "architectures": [architecture]}))
    return ours, peer
