"""The adaptive auxiliary loss beside fixed coefficients: the table of docs/finetuning.md.

    python benchmarks/adaptive_loss.py                            # three seeds, two minutes of a CPU
    python benchmarks/adaptive_loss.py --seeds 5 --steps 400

For each seed a dense parent learns the example's sentences (examples/pretrain_upcycled_moe.py) and is upcycled. Then
it trains on as it is, and the mixture of experts trains once for each rule of the coefficients, always from the same
weights, on the same rows in the same order. Held-out loss in nats a token; drop rate and coefficient as logged last,
means over the layers and seeds. Seeds differ more than rules do, so that rules are compared within a seed: "above
adaptive" is how much higher a loss is than that of the adaptive run, mean and standard deviation.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from transformers import AutoModelForCausalLM, set_seed

from skywork_hf import SkyworkConfig, SkyworkForCausalLM
from skywork_hf.checkpoints.convert import upcycle_checkpoint

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import pretrain_upcycled_moe as example

SHAPE = {**example.TINY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
EXPERTS, TOP_K, BATCH = 8, 2, 16
ADAPTIVE = "adaptive"
FIXED = 1 - 1e-9  # beta with which a coefficient stays what it was
# The drop rate that takes them to their ceiling, alpha_max / xi, stays the same.
HUNDREDFOLD = {"router_aux_loss_coef": 1.0, "router_aux_loss_alpha_max": 1.0, "router_aux_loss_xi": 20.0}
RULES: dict[str, dict[str, float]] = {ADAPTIVE: {}, "adaptive, all of it x 100": HUNDREDFOLD} | {
    f"fixed {value:g}": {"router_aux_loss_coef": value, "router_aux_loss_beta": FIXED} for value in (0.0, 0.001, 0.01)
}


def run(seed: int, options: argparse.Namespace, folder: Path) -> dict[str, dict[str, float]]:
    """Of the dense model and of each rule what `table` shows."""
    texts, held_out = example.bundled.sentences(seed)
    tokenizer = example.train_tokenizer(texts + example.chats(), folder)
    length = SHAPE["max_position_embeddings"]
    data = {
        name: example.packed(example.tokenized(tokenizer, of_kind, length), length)
        for name, of_kind in (("train", texts), ("held_out", held_out))
    }
    settings = example.parser().parse_args(["--output", str(folder), "--seed", str(seed), "--batch", str(BATCH)])

    def trained(model: Any, name: str) -> dict[str, float]:
        history = example.train(model, tokenizer, data, name, options.steps, settings)
        last = [entry for entry in history if "loss" in entry][-1]
        return {"loss": example.held_out_losses(history)[-1][1]} | {
            name: last[f"router/{name}"] for name in ("drop_rate", "coefficient") if f"router/{name}" in last
        }

    set_seed(seed)
    parent = SkyworkForCausalLM(SkyworkConfig(**SHAPE, vocab_size=len(tokenizer)))
    trained(parent, f"seed {seed}, dense parent")
    parent.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    found = {"dense, trained on": trained(parent, f"seed {seed}, dense")}
    upcycled = upcycle_checkpoint(folder, folder / "upcycled", EXPERTS, top_k=TOP_K, seed=seed)
    for rule, fields in RULES.items():
        set_seed(seed)
        moe = AutoModelForCausalLM.from_pretrained(upcycled, dtype=torch.float32, **fields)
        found[rule] = trained(moe, f"seed {seed}, {rule}")
    return found


def table(found: list[dict[str, dict[str, float]]]) -> str:
    """A row for each rule; mean and standard deviation over the seeds."""
    header = ["coefficient", *(f"seed {seed}" for seed in range(len(found))), "mean", "above adaptive"]
    rows = [[*header, "drop rate", "coefficient at the end"], ["---"] * (len(header) + 2)]
    for rule in found[0]:
        losses = [of_seed[rule]["loss"] for of_seed in found]
        above = [of_seed[rule]["loss"] - of_seed[ADAPTIVE]["loss"] for of_seed in found]
        row = [rule, *(f"{loss:.4f}" for loss in losses), spread(losses), spread(above) if rule != ADAPTIVE else ""]
        for name, digits in (("drop_rate", 3), ("coefficient", 4)):
            values = [of_seed[rule][name] for of_seed in found if name in of_seed[rule]]
            row.append(f"{mean(values):.{digits}f}" if values else "")
        rows.append(row)
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def spread(values: list[float]) -> str:
    return f"{mean(values):.4f} ± {stdev(values):.4f}" if len(values) > 1 else f"{values[0]:.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=50, help="of the parent, and of each run from it")
    options = parser.parse_args()
    found = []
    for seed in range(options.seeds):
        with tempfile.TemporaryDirectory() as folder:
            found.append(run(seed, options, Path(folder)))
        print(f"\n{table(found)}", flush=True)


if __name__ == "__main__":
    main()
