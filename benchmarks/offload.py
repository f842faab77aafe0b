"""Decoding with experts on the disk: ours beside transformers' Mixtral with accelerate's offload, the same weights.

    python benchmarks/offload.py [--folder FOLDER] [--rounds 3] [--tokens 8]

Writes a random bfloat16 checkpoint of 10 layers of 16 experts (1.5 GiB). The dense part is on the CPU and a share of
the experts on the disk: of ours, that share of each layer's experts, which stay mapped from the files; of Mixtral,
whose experts of a layer are one parameter, all those of that share of the layers, which accelerate reads when they are
used, from an offload folder to which Mixtral first writes its merged experts.

Reports, for each decoded token: the bytes that came from the disk when none of the experts is in memory before the
token (Linux counts them), beside the floor, the bytes of those experts that the router chose and that are on the disk;
tokens per second then ("cold"); and tokens per second when the page cache holds everything ("warm"). Medians over the
rounds, in each of which both models decode the same tokens, which must come out equal.

To reach with 90 % of the experts on the disk: at most 1.05 of the floor, and 3 times the tokens per second of Mixtral,
cold, as with a model that does not fit into memory.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import mmap
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from load import write_mixtral
from transformers import AutoModelForCausalLM

from skywork_hf import SkyworkMoeConfig, SkyworkMoeForCausalLM
from skywork_hf.compat import CACHE
from skywork_hf.modeling_skywork_moe import SkyworkMoeExperts, SkyworkMoeGate

LAYERS, EXPERTS = 10, 16
SHAPE = {
    # a sixth of Skywork-MoE in each direction
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 6,
    "vocab_size": 4096,
    "max_position_embeddings": 512,
    "num_local_experts": EXPERTS,
    "moe_use_logits_norm": False,  # Mixtral has none
}
EXPERT_BYTES = 3 * 768 * 2048 * 2
SHARES = (0.0, 0.5, 0.9, 1.0)
GOAL_SHARE, GOAL_BYTES, GOAL_SPEED = 0.9, 1.05, 3.0
OURS, MIXTRAL = "skywork_hf", "transformers' Mixtral"
PROMPT = torch.arange(3, 11).view(1, -1)
DENSE_PARTS = ("self_attn", "input_layernorm", "post_attention_layernorm")


@dataclass
class Measured:
    """One model's figures; lists have one entry a round, and are of one token."""

    load_seconds: float
    rewritten: int
    warm_seconds: list[float] = field(default_factory=list)
    cold_seconds: list[float] = field(default_factory=list)
    cold_bytes: list[float] = field(default_factory=list)
    routed_bytes: float = 0.0
    generated: list[int] = field(default_factory=list)


def write_checkpoint(folder: Path) -> None:
    print("Writing the checkpoint ...", flush=True)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(SkyworkMoeConfig(**SHAPE), dtype=torch.bfloat16)
    model.save_pretrained(folder / "skywork", max_shard_size="300MB")
    # Mixtral maps its files while it merges them, and what is mapped cannot be dropped from the page cache.
    shutil.copytree(folder / "skywork", folder / "copy")
    write_mixtral(folder / "mixtral", folder / "copy")


def on_disk(share: float) -> set[tuple[int, int]]:
    """Layers and experts, so that each layer has its share, as evenly as whole experts allow."""
    bounds = [round(share * EXPERTS * layer) for layer in range(LAYERS + 1)]
    return {(layer, expert) for layer in range(LAYERS) for expert in range(bounds[layer + 1] - bounds[layer])}


def our_map(share: float) -> dict[str, str]:
    away = on_disk(share)
    places = dict.fromkeys(("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head"), "cpu")
    for layer in range(LAYERS):
        name = f"model.layers.{layer}"
        places |= {f"{name}.{part}": "cpu" for part in (*DENSE_PARTS, "block_sparse_moe.gate")}
        for expert in range(EXPERTS):
            places[f"{name}.block_sparse_moe.experts.{expert}"] = "disk" if (layer, expert) in away else "cpu"
    return places


def mixtral_map(share: float) -> dict[str, str]:
    places = dict.fromkeys(("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head"), "cpu")
    for layer in range(LAYERS):
        name = f"model.layers.{layer}"
        places |= {f"{name}.{part}": "cpu" for part in (*DENSE_PARTS, "mlp.gate")}
        places[f"{name}.mlp.experts"] = "disk" if layer < round(share * LAYERS) else "cpu"
    return places


def load(folder: Path, kind: str, share: float) -> tuple[Any, Measured, list[Path]]:
    """The model, its loading time, and the files that it reads from while it runs."""
    offload = Path(tempfile.mkdtemp(dir=folder))
    options: dict[str, Any] = {"offload_folder": offload}
    if kind == MIXTRAL:
        options |= {"device_map": mixtral_map(share), "experts_implementation": "grouped_mm"}
    else:
        options |= {"device_map": our_map(share)}
    start = time.perf_counter()
    source = folder / ("mixtral" if kind == MIXTRAL else "skywork")
    model = AutoModelForCausalLM.from_pretrained(source, **options)
    seconds = time.perf_counter() - start
    written = [file for file in offload.rglob("*") if file.is_file()]
    files = [*(folder / "skywork").glob("*.safetensors"), *written]
    return model.eval(), Measured(seconds, sum(file.stat().st_size for file in written)), files


@torch.no_grad()
def decode(model: Any, tokens: int, forget: Callable[[], None] | None = None) -> tuple[list[int], float, int]:
    """Greedy tokens after the prompt, and the seconds and the bytes from the disk that they took; `forget` is called
    before each."""
    step = model(PROMPT, use_cache=True)
    generated, seconds, read = [], 0.0, 0
    for _ in range(tokens):
        token = step.logits[:, -1:].argmax(-1)
        generated.append(int(token))
        if forget:
            forget()
        before, start = bytes_from_disk(), time.perf_counter()
        step = model(token, use_cache=True, **{CACHE: step[CACHE]})
        seconds += time.perf_counter() - start
        read += bytes_from_disk() - before
    return generated, seconds, read


def forget_experts(model: Any, files: list[Path], away: set[tuple[int, int]]) -> None:
    """Empty the page cache of `files`, after taking those of our experts that are `away` out of the process: pages
    that are in use stay, as do those of everything else."""
    for layer, experts in enumerate(m for m in model.modules() if isinstance(m, SkyworkMoeExperts)):
        for number, expert in enumerate(experts):
            for parameter in expert.parameters() if (layer, number) in away else ():
                unmap(parameter)
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def unmap(tensor: torch.Tensor) -> None:
    """Give back the pages of a tensor that is mapped from a file; they are read from it again when they are used."""
    start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    length = (tensor.data_ptr() + tensor.nbytes - start) // mmap.PAGESIZE * mmap.PAGESIZE
    ctypes.CDLL(None, use_errno=True).madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), mmap.MADV_DONTNEED)


def bytes_from_disk() -> int:
    """What this process has had the kernel fetch from storage so far."""
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(lines["read_bytes"])


@contextmanager
def counted_routes(model: Any, away: set[tuple[int, int]]) -> Iterator[list[int]]:
    """For each call of a gate, how many of the experts that it chose are `away`."""
    chosen: list[int] = []
    handles = []
    for layer, module in enumerate(m for m in model.modules() if isinstance(m, SkyworkMoeGate)):

        def count(module: Any, inputs: Any, outputs: Any, layer: int = layer) -> None:
            chosen.append(sum((layer, expert) in away for expert in set(outputs[2].flatten().tolist())))

        handles.append(module.register_forward_hook(count))
    try:
        yield chosen
    finally:
        for handle in handles:
            handle.remove()


def measure(model: Any, measured: Measured, files: list[Path], share: float, tokens: int) -> None:
    """One round."""
    decode(model, 1)
    measured.generated, seconds, _ = decode(model, tokens)
    measured.warm_seconds.append(seconds / tokens)
    if isinstance(model, SkyworkMoeForCausalLM):
        with counted_routes(model, on_disk(share)) as chosen:
            decode(model, tokens)
        measured.routed_bytes = EXPERT_BYTES * sum(chosen[LAYERS:]) / tokens
    if share:
        generated, seconds, came = decode(model, tokens, lambda: forget_experts(model, files, on_disk(share)))
        measured.cold_seconds.append(seconds / tokens)
        measured.cold_bytes.append(came / tokens)
        assert generated == measured.generated


def compare(folder: Path, rounds: int, tokens: int) -> None:
    """Print the table, and how far the goals are reached."""
    print(f"\n{rounds} rounds of {tokens} tokens, {torch.get_num_threads()} threads; per decoded token")
    header = ("on disk", "who", "GiB read", "of floor", "cold/s", "of Mixtral", "warm/s", "of Mixtral", "load s")
    print("{:>8} {:22}{:>10}{:>10}{:>10}{:>12}{:>10}{:>12}{:>8}".format(*header))
    for share in SHARES:
        loaded = {kind: load(folder, kind, share) for kind in (OURS, MIXTRAL)}
        for _ in range(rounds):
            for model, measured, files in loaded.values():
                measure(model, measured, files, share, tokens)
        results = {kind: measured for kind, (_, measured, _) in loaded.items()}
        print_rows(share, results)
        if share == GOAL_SHARE:
            reached = goals(**dict(zip(("ours", "mixtral"), results.values(), strict=True)))
        del loaded, model
        gc.collect()  # what is mapped could not be dropped from the page cache
    print(reached)


def print_rows(share: float, results: dict[str, Measured]) -> None:
    ours, mixtral = results.values()
    if ours.generated != mixtral.generated:
        print(f"Different tokens: {ours.generated} and {mixtral.generated}.")
    for kind, measured in results.items():
        read = statistics.median(measured.cold_bytes or [0])
        floor = f"{read / ours.routed_bytes:.3f}" if ours.routed_bytes else "-"
        speeds = ""
        for theirs, times in (
            (mixtral.cold_seconds, measured.cold_seconds),
            (mixtral.warm_seconds, measured.warm_seconds),
        ):
            seconds = statistics.median(times) if times else 0
            ratio = statistics.median(theirs) / seconds if seconds else 0
            speeds += f"{1 / seconds:10.2f}{ratio:12.2f}" if seconds else f"{'-':>10}{'-':>12}"
        print(f"{share:8.0%} {kind:22}{read / 2**30:10.3f}{floor:>10}{speeds}{measured.load_seconds:8.2f}", flush=True)


def speed_cells(seconds: list[float], mixtral_seconds: list[float]) -> str:
    """Tokens per second, and over Mixtral's."""
    if not seconds:
        return f"{'-':>10}{'-':>12}"
    median = statistics.median(seconds)
    return f"{1 / median:10.2f}{statistics.median(mixtral_seconds) / median:12.2f}"


def goals(ours: Measured, mixtral: Measured) -> str:
    read = statistics.median(ours.cold_bytes) / ours.routed_bytes
    speed = statistics.median(mixtral.cold_seconds) / statistics.median(ours.cold_seconds)
    return (
        f"\nWith {GOAL_SHARE:.0%} of the experts on the disk, and none in memory:\n"
        f"  bytes from the disk over those of the routed experts: {read:.3f}, to reach: at most {GOAL_BYTES}\n"
        f"  tokens a second over Mixtral's: {speed:.2f}, to reach: {GOAL_SPEED}\n"
        f"  written while loading: Mixtral {mixtral.rewritten / 2**30:.2f} GiB, ours {ours.rewritten / 2**30:.2f} GiB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where the checkpoint is or shall be; default: a temporary one")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=8, help="decoded in each round")
    arguments = parser.parse_args()
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        if not (folder / "skywork").exists():
            write_checkpoint(folder)
        compare(folder, arguments.rounds, arguments.tokens)


if __name__ == "__main__":
    main()
