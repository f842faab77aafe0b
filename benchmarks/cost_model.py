"""How far a plan's expected speed is from the measured one, on this machine's CPU and disk.

    python benchmarks/cost_model.py [--folder FOLDER] [--calibration FILE] [--rounds 3] [--threads 2]

Measures the machine as `skywork-hf calibrate` does, or takes what that wrote. Then writes random checkpoints of two
shapes, in bfloat16, int8 and FP8 (up to 3 GB at a time), plans each with none, a half and nine tenths of its experts
on the disk, loads it by the plan, and measures

* decoding: fixed tokens one by one, with a cache; experts on the disk are out of memory before each token,
* a prompt, before which experts on the disk are out of memory.

What is expected is reckoned with the experts that were chosen, so that what is compared is the time and not the
router's luck. Of the rounds the fastest counts, as in the calibration.

To reach: a median error of at most 15 %, and none above 30 %, in tokens a second.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM

from skywork_hf import SkyworkFp8Config, SkyworkInt8Config, SkyworkMoeConfig
from skywork_hf.compat import CACHE
from skywork_hf.modeling_skywork_moe import SkyworkMoeExperts, SkyworkMoeGate
from skywork_hf.placement import ExpertUsage, PlacementPlan, plan_device_map
from skywork_hf.placement.attempt import expected_of
from skywork_hf.placement.calibration import Calibration
from skywork_hf.placement.measure import measured_calibration
from skywork_hf.placement.pages import forget, pages_of
from skywork_hf.placement.speed import largest_share

COMMON = {"vocab_size": 4096, "max_position_embeddings": 512, "num_local_experts": 16}
SHAPES = {
    "10 layers of 768": {
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 10,
        "num_attention_heads": 6,
    },
    "1 layer of 2304": {
        "hidden_size": 2304,
        "intermediate_size": 6144,
        "num_hidden_layers": 1,
        "num_attention_heads": 18,
    },
}
FORMATS = {"bf16": None, "int8": SkyworkInt8Config(), "fp8": SkyworkFp8Config()}
SHARES = (0.0, 0.5, 0.9)
# Tokens of the prompt, and decoded after a short one.
PROMPT, DECODED, SHORT = 160, 24, 8
GIB = 2**30
GOAL_MEDIAN, GOAL_WORST = 0.15, 0.30


def write_checkpoint(folder: Path, shape: dict[str, int], name: str) -> None:
    """The bfloat16 one beside it must be there for the others."""
    if name == "bf16":
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(SkyworkMoeConfig(**COMMON, **shape), dtype=torch.bfloat16)
    else:
        source = folder.parent / "bf16"
        model = AutoModelForCausalLM.from_pretrained(source, quantization_config=FORMATS[name], dtype="bfloat16")
    model.save_pretrained(folder, max_shard_size="500MB")


def planned(folder: Path, share: float, calibration: Calibration) -> PlacementPlan:
    """With this share of each layer's experts on the disk."""

    def plan(budget: int) -> PlacementPlan:
        memory = {"cpu": budget, "disk": 1000 * GIB}
        return plan_device_map(folder, memory, context_tokens=PROMPT, calibration=calibration)

    everything = plan(1000 * GIB)
    kinds, experts = everything.bytes_per_device["cpu"], everything.experts_on("cpu")
    kept = round((1 - share) * experts) + 0.5  # a half, for what rounding takes
    others = sum(size for kind, size in kinds.items() if kind != "experts")
    return everything if not share else plan(int(others + kept * kinds["experts"] / experts))


class Runner:
    """A model that was loaded by a plan."""

    def __init__(self, folder: Path, plan: PlacementPlan) -> None:
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, device_map=plan).eval()
        self.files = list(folder.glob("*.safetensors"))
        blocks = [module for module in self.model.modules() if isinstance(module, SkyworkMoeExperts)]
        self.on_disk = [
            pages
            for experts, places in zip(blocks, plan.placement.experts, strict=True)
            for expert, place in zip(experts, places, strict=True)
            if place == "disk"
            for pages in pages_of(expert.parameters())
        ]

    def forget(self) -> None:
        """Experts on the disk leave the memory; what else is in use stays."""
        if not self.on_disk:
            return
        for file in self.files:
            descriptor = os.open(file, os.O_RDONLY)
            forget(self.on_disk, descriptor)
            os.close(descriptor)

    @torch.no_grad()
    def seconds(self, tokens: torch.Tensor, cache: Any = None) -> tuple[float, Any]:
        """Of reading `tokens` [1, tokens]; and the cache."""
        self.forget()
        start = time.perf_counter()
        outputs = self.model(tokens, use_cache=True, logits_to_keep=1, **{CACHE: cache})
        return time.perf_counter() - start, outputs[CACHE]

    def decode(self, tokens: torch.Tensor) -> float:
        """Mean seconds of a token after the first `SHORT`."""
        _, cache = self.seconds(tokens[:, :SHORT])
        times = []
        for token in tokens[0, SHORT:].split(1):
            seconds, cache = self.seconds(token[None], cache)
            times.append(seconds)
        return statistics.mean(times) if self.on_disk else statistics.median(times)


def compare(folder: Path, calibration: Calibration, rounds: int) -> list[float]:
    """Print a row for each case of one format; the errors."""
    torch.manual_seed(1)
    tokens = {"decode": SHORT + DECODED, "prompt": PROMPT}
    texts = {phase: torch.randint(3, COMMON["vocab_size"], (1, number)) for phase, number in tokens.items()}
    errors = []
    for share in SHARES:
        for phase, text in texts.items():
            plan = planned(folder, share, calibration)
            measured, usage = fastest(folder, plan, phase, text, rounds)
            expected = expected_of(replace(plan.request, usage=usage), plan.placement)
            errors.append(print_row(share, phase, plan, getattr(expected, phase), measured))
            gc.collect()  # what is mapped could not be dropped from the page cache
    return errors


def fastest(
    folder: Path, plan: PlacementPlan, phase: str, text: torch.Tensor, rounds: int
) -> tuple[float, ExpertUsage]:
    """Seconds of a token, or of the prompt; and which experts were chosen."""
    runner = Runner(folder, plan)

    def run() -> float:
        return runner.decode(text) if phase == "decode" else runner.seconds(text)[0]

    with counted(runner.model, 1 if phase == "decode" else PROMPT) as counts:
        run()
    usage = ExpertUsage(list(range(len(counts))), counts, torch.zeros(0), 1)
    return min(run() for _ in range(rounds)), usage


@contextmanager
def counted(model: Any, rows: int) -> Iterator[torch.Tensor]:
    """How often each expert of each layer [layers, experts] is chosen in calls with so many rows."""
    gates = [module for module in model.modules() if isinstance(module, SkyworkMoeGate)]
    counts = torch.zeros(len(gates), model.config.num_local_experts, dtype=torch.int64)

    def count(layer: int, outputs: Any) -> None:
        if len(outputs[2]) == rows:
            counts[layer] += torch.bincount(outputs[2].flatten(), minlength=counts.shape[1])

    handles = [
        gate.register_forward_hook(lambda module, inputs, outputs, layer=layer: count(layer, outputs))
        for layer, gate in enumerate(gates)
    ]
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


def print_row(share: float, phase: str, plan: PlacementPlan, seconds: dict[Any, float], measured: float) -> float:
    """The error."""
    expected, (kind, key, _) = sum(seconds.values()), largest_share(seconds)
    tokens = 1 if phase == "decode" else PROMPT
    bound = f"{plan.tokens_per_second:.1f}" if phase == "decode" else "-"
    cells = f"{share:8.0%}{phase:>8}{bound:>10}{tokens / expected:10.1f}{tokens / measured:10.1f}"
    print(f"{cells}{measured / expected - 1:+8.0%}  {kind} on {key}", flush=True)
    return abs(measured / expected - 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="for the checkpoints, on the disk that is measured")
    parser.add_argument("--calibration", type=Path, help="what `skywork-hf calibrate` wrote; default: measured now")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    logging.getLogger("accelerate").setLevel(logging.ERROR)  # that some experts are on the disk
    torch.set_num_threads(arguments.threads)
    if arguments.folder:
        arguments.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
        folder = Path(temporary)
        calibration = (
            Calibration.load(arguments.calibration)
            if arguments.calibration
            else measured_calibration(folder, lambda text: print(text, flush=True))
        )
        errors = []
        print("\ntokens a second, error of the expected time, and what takes most of it")
        print(f"{'on disk':>8}{'phase':>8}{'at most':>10}{'expected':>10}{'measured':>10}{'time':>8}")
        for shape_name, shape in SHAPES.items():
            for name in FORMATS:
                print(f"{shape_name}, {name}")
                write_checkpoint(folder / name, shape, name)
                errors += compare(folder / name, calibration, arguments.rounds)
            for name in FORMATS:
                shutil.rmtree(folder / name)
    print(f"\n{len(errors)} cases: median error {statistics.median(errors):.0%}, to reach: {GOAL_MEDIAN:.0%}")
    print(f"largest error {max(errors):.0%}, to reach: {GOAL_WORST:.0%}")


if __name__ == "__main__":
    main()
