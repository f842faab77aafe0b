"""How the Triton kernels cut their work: a table by card, and for other cards a choice by measurement.

The table is by count, and no card has confirmed it yet: what has to be on its way from memory at any time is bandwidth
times latency, some 0.8 MB on a 3090 and 2.7 MB on an H100, over programs that fit beside each other.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from transformers.utils import logging
from triton.testing import do_bench

logger = logging.get_logger(__name__)


class Blocks(NamedTuple):
    """How many rows of a weight a program takes, how many bytes of each at a time, with how many warps, and how many
    such tiles are on their way at the same time."""

    rows: int
    nbytes: int
    warps: int
    stages: int


# For w1 with w3 and for all other weights; for one token, and for several beside a tile.
ALONE, TOGETHER = True, False
KINDS = [(name, is_alone) for name in ("gate_up", "down") for is_alone in (ALONE, TOGETHER)]

_CONSUMER = dict(zip(KINDS, (Blocks(8, 512, 4, 3), Blocks(32, 256, 4, 3)) * 2, strict=True))
_SERVER = dict(zip(KINDS, (Blocks(8, 512, 4, 4), Blocks(32, 256, 4, 4)) * 2, strict=True))
# By a part of the name that the driver gives.
CARDS = {"RTX 3090": _CONSUMER, "RTX 4090": _CONSUMER, "A100": _SERVER, "H100": _SERVER}
# What is tried on other cards. The first of each is what runs where nothing was measured.
CANDIDATES = {
    ALONE: [Blocks(8, 512, 4, 3), Blocks(8, 512, 4, 1), Blocks(16, 512, 8, 3), Blocks(4, 1024, 4, 3)],
    TOGETHER: [Blocks(32, 256, 4, 3), Blocks(32, 128, 4, 4), Blocks(64, 128, 4, 3), Blocks(16, 256, 4, 3)],
}
# Triton's interpreter, which is slow, is for small weights.
_INTERPRETED = dict.fromkeys(KINDS, Blocks(32, 64, 4, 1))


def blocks_of(name: str, is_alone: bool, device: torch.device) -> Blocks:
    """How "gate_up" or "down" is cut on a device."""
    return _blocks_on(device)[name, is_alone]


@cache
def _blocks_on(device: torch.device) -> dict[tuple[str, bool], Blocks]:
    """Those of a device, which `tune` changes."""
    if device.type != "cuda":
        return _INTERPRETED
    return dict(blocks_for(torch.cuda.get_device_name(device)))


def blocks_for(card: str) -> dict[tuple[str, bool], Blocks]:
    """Those of the table for a card by the driver's name, or the first candidates."""
    known = next((blocks for part, blocks in CARDS.items() if part in card), None)
    return known or {kind: CANDIDATES[kind[1]][0] for kind in KINDS}


def tune(device: torch.device, run: Callable[[bool], object]) -> None:
    """Find the fastest candidates for a card that the table does not know: once for each card and version of Triton,
    as they are kept in Triton's cache folder.

    Args:
        device: a GPU.
        run: launches the kernels for one token, or for several.
    """
    card = torch.cuda.get_device_name(device)
    if any(part in card for part in CARDS):
        return
    cache_file = Path(triton.knobs.cache.dir) / "skywork_hf_blocks.json"
    key = f"{card}, Triton {triton.__version__}"
    found = _read(cache_file)
    if len(found.get(key, ())) != len(KINDS):
        logger.warning(f"Choosing block sizes of kernels for {card} by measurement, once; this takes about a minute.")
        found[key] = _measured(_blocks_on(device), run)
        _write(cache_file, found)
    _blocks_on(device).update(zip(KINDS, found[key], strict=True))


def _measured(blocks: dict[tuple[str, bool], Blocks], run: Callable[[bool], object]) -> list[Blocks]:
    """The fastest of the candidates for each kind. Changes `blocks`, which is what runs, on the way."""
    for kind in KINDS:
        seconds = {}
        for candidate in CANDIDATES[kind[1]]:
            blocks[kind] = candidate
            try:
                seconds[candidate] = do_bench(lambda is_alone=kind[1]: run(is_alone))
            except triton.OutOfResources:  # more shared memory than this card has
                continue
        blocks[kind] = min(seconds, key=seconds.__getitem__, default=CANDIDATES[kind[1]][0])
    return [blocks[kind] for kind in KINDS]


def _read(file: Path) -> dict[str, list[Blocks]]:
    try:
        return {key: [Blocks(*values) for values in found] for key, found in json.loads(file.read_text()).items()}
    except (OSError, ValueError, AttributeError, TypeError):  # none yet, or not ours
        return {}


def _write(file: Path, found: dict[str, list[Blocks]]) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(found))
    except OSError:
        logger.warning(f"The block sizes could not be written to {file}: they are measured again next time.")
