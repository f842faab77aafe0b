"""Loading a MoE checkpoint: `from_pretrained` of skywork_hf beside that of transformers' own Mixtral, same files.

    python benchmarks/load.py [--folder FOLDER] [--rounds 3]

Writes a random bfloat16 checkpoint of 16 experts a layer (2.9 GB; Skywork-MoE's tensor names are Mixtral's), then
loads it in fresh processes, one class after the other in each round. Reports medians and their ratios: the wall time
of `from_pretrained`, and the private memory (RssAnon) that it added. The floor of both is near zero: weights that stay
mapped from the files are neither read nor copied before they are used.

To reach: at most 0.2 of Mixtral's time, at most 5 % of the checkpoint in private memory.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

SHAPE = {
    # half of Skywork-MoE in each direction, as each tensor costs some time whatever its size
    "hidden_size": 2304,
    "intermediate_size": 6144,
    "num_hidden_layers": 2,
    "num_attention_heads": 18,
    "num_key_value_heads": 18,
    "vocab_size": 8192,
    "max_position_embeddings": 2048,
    "num_local_experts": 16,
    "num_experts_per_tok": 2,
}
CLASSES = {"skywork_hf, modular": "skywork", "skywork_hf, fused": "skywork-fused", "transformers' Mixtral": "mixtral"}


def write_checkpoint(folder: Path) -> None:
    """The same weights for both: two configs beside one set of files."""
    from skywork_hf import SkyworkMoeConfig, SkyworkMoeForCausalLM

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    SkyworkMoeForCausalLM(SkyworkMoeConfig(**SHAPE)).save_pretrained(folder / "skywork", max_shard_size="500MB")
    write_mixtral(folder / "mixtral", folder / "skywork")


def write_mixtral(folder: Path, source: Path) -> None:
    """The checkpoint of `source` as transformers' Mixtral: another config beside links to the same files."""
    folder.mkdir()
    for file in source.iterdir():
        if file.name == "config.json":
            config = json.loads(file.read_text())
            config.update(model_type="mixtral", architectures=["MixtralForCausalLM"])
            (folder / file.name).write_text(json.dumps(config))
        else:
            (folder / file.name).symlink_to(file.resolve())


def measure_here(folder: Path, kind: str) -> None:
    """Load in this process, run one token so that what is loaded works, print seconds and bytes."""
    import transformers
    from transformers import AutoModelForCausalLM

    import skywork_hf  # noqa: F401

    transformers.logging.disable_progress_bar()
    options = {"experts_layout": "fused"} if kind == "skywork-fused" else {}
    before, start = rss_anon(), time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(folder / kind.removesuffix("-fused"), **options)
    seconds, added = time.perf_counter() - start, rss_anon() - before
    assert model.dtype == torch.bfloat16
    with torch.no_grad():
        assert model(torch.tensor([[1]])).logits.isfinite().all()
    print(json.dumps({"seconds": seconds, "bytes": added}))


def rss_anon() -> int:
    """The private memory of this process in bytes, as Linux counts it."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("this kernel does not report RssAnon")


def measure(folder: Path, kind: str) -> dict[str, float]:
    command = [sys.executable, __file__, "--folder", str(folder), "--here", kind]
    run = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(run.stdout.splitlines()[-1])


def compare(folder: Path, rounds: int) -> None:
    files = list((folder / "skywork").glob("*.safetensors"))
    size = sum(file.stat().st_size for file in files)
    print(f"{size / 2**30:.2f} GiB in {len(files)} files, {torch.get_num_threads()} threads, {rounds} rounds")
    for file in files:
        file.read_bytes()  # from the page cache for all
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in CLASSES}
    for _ in range(rounds):
        for name, kind in CLASSES.items():
            runs[name].append(measure(folder, kind))
    seconds = {name: statistics.median(run["seconds"] for run in of) for name, of in runs.items()}
    added = {name: statistics.median(run["bytes"] for run in of) for name, of in runs.items()}
    mixtral = seconds["transformers' Mixtral"]
    print(f"{'':24}{'seconds':>10}{'of Mixtral':>12}{'private GiB':>14}{'of the files':>14}")
    for name in CLASSES:
        print(
            f"{name:24}{seconds[name]:10.2f}{seconds[name] / mixtral:12.3f}"
            f"{added[name] / 2**30:14.3f}{added[name] / size:14.1%}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where the checkpoint is or shall be; default: a temporary one")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--here", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.here:
        measure_here(arguments.folder, arguments.here)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        if not (folder / "skywork").exists():
            write_checkpoint(folder)
        compare(folder, arguments.rounds)


if __name__ == "__main__":
    main()
