"""Converting a checkpoint beside copying its files with `cp`: throughput and peak memory.

    python benchmarks/convert.py [--folder FOLDER] [--rounds 3]

Writes a random bfloat16 Skywork-MoE checkpoint of 4 GiB in shards of 500 MB, then, in each round: copies it by `cp`
and `sync` (the floor: the same bytes read, written and on the disk), re-shards it to files of 300 MB, and converts it
to float16 and to int8, each without and with verification, which reads everything twice more. Each conversion is a
process of its own, from which the peak of its private memory (RssAnon) beyond that of the imports is taken; the page
cache is left as it is for all. Reports medians.

Then re-shards once more in a process that may have 1 GiB of address space beyond that of the interpreter with torch.

To reach: the plain re-shard at 0.7 of `cp`; private memory of one shard, one tensor and 300 MB.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from load import rss_anon  # beside this file

SHAPE = {
    # a third of Skywork-MoE in each direction
    "hidden_size": 1536,
    "intermediate_size": 4096,
    "num_hidden_layers": 7,
    "num_attention_heads": 12,
    "vocab_size": 8192,
}
SHARD = "300MB"
WAYS: dict[str, dict[str, Any]] = {
    "re-shard": {"verify": False},
    "re-shard, verified": {},
    "to float16": {"dtype": "float16", "verify": False},
    "to float16, verified": {"dtype": "float16"},
    "to int8": {"quantization": "int8", "verify": False},
    "to int8, verified": {"quantization": "int8"},
}
LIMIT = 2**30


def write_checkpoint(folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    from skywork_hf import SkyworkMoeConfig

    print("Writing the checkpoint ...", flush=True)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(SkyworkMoeConfig(**SHAPE), dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="500MB")


def convert_here(source: Path, target: Path, options: dict[str, Any], limited: bool) -> None:
    """Convert in this process and print seconds and the peak of private memory."""
    from skywork_hf.checkpoints.convert import convert_checkpoint

    torch.set_num_threads(2)
    if limited:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + LIMIT,) * 2)
    before, peak, done = rss_anon(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            peak[0] = max(peak[0], rss_anon())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    try:
        convert_checkpoint(source, target, max_shard_size=SHARD, **options)
    finally:
        done.set()
        watcher.join()
    print(json.dumps({"seconds": time.perf_counter() - start, "bytes": peak[0] - before}))


def convert(folder: Path, options: dict[str, Any], limited: bool = False) -> dict[str, float]:
    target = folder / "converted"
    arguments = [str(folder), "--here", json.dumps(options), *(["--limited"] if limited else [])]
    run = subprocess.run([sys.executable, __file__, "--folder", *arguments], capture_output=True, text=True)
    shutil.rmtree(target, ignore_errors=True)
    if run.returncode:
        raise RuntimeError(run.stderr[-2000:])
    return json.loads(run.stdout.splitlines()[-1])


def copy(folder: Path) -> float:
    """Seconds of `cp` and `sync`."""
    start = time.perf_counter()
    subprocess.run(["cp", "-r", str(folder / "source"), str(folder / "copied")], check=True)
    subprocess.run(["sync", *map(str, (folder / "copied").iterdir())], check=True)
    seconds = time.perf_counter() - start
    shutil.rmtree(folder / "copied")
    return seconds


def compare(folder: Path, rounds: int) -> None:
    size = sum(file.stat().st_size for file in (folder / "source").glob("*.safetensors"))
    print(f"{size / 2**30:.2f} GiB, {rounds} rounds")
    copies: list[float] = []
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in WAYS}
    for number in range(rounds):
        print(f"round {number + 1} of {rounds} ...", file=sys.stderr, flush=True)
        copies.append(copy(folder))
        for name, options in WAYS.items():
            runs[name].append(convert(folder, options))
    floor = statistics.median(copies)
    print(f"{'':24}{'seconds':>10}{'GB/s read':>12}{'of cp':>8}{'private GiB':>14}")
    print(f"{'cp and sync':24}{floor:10.2f}{size / floor / 1e9:12.2f}{1:8.2f}")
    for name, of in runs.items():
        seconds = statistics.median(run["seconds"] for run in of)
        private = statistics.median(run["bytes"] for run in of)
        print(f"{name:24}{seconds:10.2f}{size / seconds / 1e9:12.2f}{floor / seconds:8.2f}{private / 2**30:14.3f}")
    limited = convert(folder, WAYS["re-shard"], limited=True)
    print(f"with 1 GiB of address space beside the interpreter: converted in {limited['seconds']:.2f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where the checkpoint is or shall be; default: a temporary one")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--here", help=argparse.SUPPRESS)
    parser.add_argument("--limited", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.here:
        folder = arguments.folder
        convert_here(folder / "source", folder / "converted", json.loads(arguments.here), arguments.limited)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        if not (folder / "source").exists():
            write_checkpoint(folder / "source")
        compare(folder, arguments.rounds)


if __name__ == "__main__":
    main()
