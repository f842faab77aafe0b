"""From a dense model to a trained mixture of experts: upcycle, and train on with the adaptive auxiliary loss.

    python examples/pretrain_upcycled_moe.py --output moe                 # a tiny model, in some minutes on a CPU
    python examples/pretrain_upcycled_moe.py --output moe --dense Skywork/Skywork-13B-base --text corpus.txt \\
        --experts 16 --top-k 2 --learning-rate 2e-5 --steps 20000 --batch 8 --max-tokens 4096

Without `--dense` a tiny dense parent, and its tokenizer, are trained first on bundled sentences (sentences.py).
`--text` is a file with a document in each line, of which every twentieth is held out.

The dense parent trains on before the MoE model does, for as many tokens, so that what the experts bring can be seen:
both held-out losses are printed, and drawn in `curves.png`. Writes to `--output`: the MoE model in bfloat16,
`curves.png`, and `router.png`, what the gates did. `--no-baseline` leaves the dense model's further training out.

Weights are trained in float32, as small steps are lost in 16 bit; on a GPU with bfloat16's autocast. This is one
process, for models that one GPU trains. For larger ones `skywork-hf upcycle` writes the start, and any Trainer script
with FSDP takes `AdaptiveAuxLossCallback` as `train` below does.
"""

from __future__ import annotations

import argparse
import io
import re
from pathlib import Path
from typing import Any

import sentences as bundled  # beside this file
import torch
from huggingface_hub import snapshot_download
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
    set_seed,
)

from skywork_hf import AdaptiveAuxLossCallback, SkyworkConfig, SkyworkForCausalLM, SkyworkTokenizer
from skywork_hf.checkpoints.convert import upcycle_checkpoint
from skywork_hf.demo import PROMPTS, continued
from skywork_hf.training import read_conversations

TINY = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
VOCABULARY = 1536
HELD_OUT_EVERY = 20
COLOURS = {"dense parent": "#555555", "dense": "#4477AA", "MoE": "#CC6677"}
CHINESE = re.compile(r"[\u4e00-\u9fff]")


def train_tokenizer(texts: list[str], folder: Path) -> SkyworkTokenizer:
    """A SentencePiece tokenizer of Skywork's kind: BPE, single digits, bytes for what it has not seen. Chinese
    characters are pieces of their own, so that a prompt may end at any of them."""
    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=(CHINESE.sub(r"\t\g<0>\t", text) for text in texts),
        pretokenization_delimiter="\t",
        model_writer=model,
        vocab_size=VOCABULARY,
        model_type="bpe",
        character_coverage=1.0,
        byte_fallback=True,
        split_digits=True,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        num_threads=1,
        minloglevel=2,
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    tokenizer = SkyworkTokenizer.from_pretrained(folder)
    tokenizer.add_chat_tokens()
    return tokenizer


def chats() -> list[str]:
    """What the bundled chats say, so that the tokenizer knows their characters too."""
    files = [bundled.DATA / name for name in ("instructions.jsonl", "conversations.jsonl")]
    return [message["content"] for file in files for chat in read_conversations(file) for message in chat]


def tokenized(tokenizer: Any, texts: list[str], max_tokens: int) -> list[dict[str, list[int]]]:
    """Each text from <s> to </s>, cut at `max_tokens`."""
    rows = [[*tokenizer(text).input_ids, tokenizer.eos_token_id] for text in texts]
    cut = sum(len(row) > max_tokens for row in rows)
    if cut:
        print(f"{cut} of {len(rows)} texts are longer than {max_tokens} tokens and were cut.")
    return [{"input_ids": row[:max_tokens]} for row in rows]


def packed(rows: list[dict[str, list[int]]], max_tokens: int) -> list[dict[str, list[int]]]:
    """Whole texts one after another in rows of at most `max_tokens`: little of a batch is padding, so that a step has
    many tokens, and experts do not drop some by chance alone."""
    found: list[dict[str, list[int]]] = [{"input_ids": []}]
    for row in rows:
        if len(found[-1]["input_ids"]) + len(row["input_ids"]) > max_tokens:
            found.append({"input_ids": []})
        found[-1]["input_ids"] += row["input_ids"]
    return found


def train(
    model: Any, tokenizer: Any, data: dict[str, Any], name: str, steps: int, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Train on `data["train"]`, and look at `data["held_out"]` ten times. Returns what the Trainer logged."""
    print(f"\n{name}: {model.num_parameters():,} parameters, {steps} steps", flush=True)
    arguments = TrainingArguments(
        output_dir=str(options.output),
        max_steps=steps,
        per_device_train_batch_size=options.batch,
        per_device_eval_batch_size=options.batch,
        learning_rate=options.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=min(50, steps // 10),
        weight_decay=0.1,
        bf16=torch.cuda.is_available(),
        activation_checkpointing=torch.cuda.is_available(),
        logging_steps=max(1, steps // 40),
        eval_strategy="steps",
        eval_steps=max(1, steps // 10),
        save_strategy="no",
        report_to=options.report_to,
        seed=options.seed,
    )
    sparse = hasattr(model.config, "num_local_experts")
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=data["train"],
        eval_dataset=data["held_out"],
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        callbacks=[AdaptiveAuxLossCallback()] if sparse else [],
    )
    trainer.train()
    model.config.use_cache = True  # the Trainer turned it off
    print(f"{name}: held-out loss {held_out_losses(trainer.state.log_history)[-1][1]:.4f}")
    return trainer.state.log_history


def held_out_losses(log_history: list[dict[str, Any]]) -> list[tuple[int, float]]:
    return [(entry["step"], entry["eval_loss"]) for entry in log_history if "eval_loss" in entry]


def draw(runs: dict[str, tuple[int, list[dict[str, Any]]]], path: Path) -> None:
    """The losses over the steps; each run begins where another one ended."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.5), layout="constrained")
    whole, later = figure.subplots(1, 2, width_ratios=(3, 2))
    for axis, shown in ((whole, runs.keys()), (later, runs.keys() - {"dense parent"})):
        for name in [name for name in runs if name in shown]:
            _draw_losses(axis, name, *runs[name])
        axis.set(xlabel="step", ylabel="loss, nats a token")
        axis.spines[["top", "right"]].set_visible(False)
    later.set_title("the runs that are compared", fontsize=10)
    whole.legend(frameon=False)
    figure.savefig(path, dpi=120)


def _draw_losses(axis: Any, name: str, start: int, log_history: list[dict[str, Any]]) -> None:
    losses = [(entry["step"], entry["loss"]) for entry in log_history if "loss" in entry]
    styles = {"training": {"linewidth": 0.8, "alpha": 0.6}, "held out": {"marker": "."}}
    for kind, points in (("training", losses), ("held out", held_out_losses(log_history))):
        steps, values = zip(*points, strict=True)
        label = f"{name}, {kind}"
        axis.plot([start + step for step in steps], values, color=COLOURS[name], label=label, **styles[kind])


def read_texts(options: argparse.Namespace) -> tuple[list[str], list[str]]:
    """Documents for training, and those held out."""
    if options.text is None:
        return bundled.sentences(options.seed)
    if not options.text.is_file():
        raise SystemExit(f"{options.text} is not there: expected a file with a document in each line.")
    lines = [line for line in options.text.read_text(encoding="utf-8").split("\n") if line.strip()]
    if len(lines) < 2:
        raise SystemExit(f"{options.text} has {len(lines)} lines: expected at least two documents, one a line.")
    return [line for number, line in enumerate(lines) if number % HELD_OUT_EVERY], lines[::HELD_OUT_EVERY]


def dense_folder(options: argparse.Namespace) -> Path:
    """Where the dense parent is, or will be."""
    if not options.dense:
        return options.output / "dense"
    return Path(options.dense) if Path(options.dense).is_dir() else Path(snapshot_download(options.dense))


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="the folder to write")
    dense_help = "the dense checkpoint: a folder or a name on the Hub; default: train a tiny one"
    parser.add_argument("--dense", help=dense_help)
    parser.add_argument("--text", type=Path, help="a document in each line; default: the bundled sentences")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--steps", type=int, default=100, help="of the MoE model, and of the dense one before it")
    parser.add_argument("--dense-steps", type=int, default=100, help="of a tiny dense parent")
    parser.add_argument("--batch", type=int, default=32, help="rows of up to --max-tokens")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--max-tokens", type=int, default=TINY["max_position_embeddings"])
    parser.add_argument("--report-to", default="none", help="tensorboard, wandb, trackio, ...")
    parser.add_argument("--no-baseline", action="store_true", help="train the MoE model alone")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def main(arguments: list[str] | None = None) -> dict[str, float]:
    options = parser().parse_args(arguments)
    if not 1 <= options.top_k <= options.experts:
        raise SystemExit(f"--top-k {options.top_k}: expected 1 to --experts {options.experts}.")
    if options.output.exists():
        raise SystemExit(f"{options.output} is there already: choose another folder, or remove it.")
    set_seed(options.seed)
    texts, held_out = read_texts(options)
    dense, upcycled = dense_folder(options), options.output / "upcycled"
    tokenizer = AutoTokenizer.from_pretrained(dense) if options.dense else train_tokenizer(texts + chats(), dense)
    data = {
        "train": packed(tokenized(tokenizer, texts, options.max_tokens), options.max_tokens),
        "held_out": tokenized(tokenizer, held_out, options.max_tokens),
    }
    runs: dict[str, tuple[int, list[dict[str, Any]]]] = {}
    start = 0
    if not options.dense:
        parent = SkyworkForCausalLM(SkyworkConfig(**TINY, vocab_size=len(tokenizer)))
        runs["dense parent"] = start, train(parent, tokenizer, data, "dense parent", options.dense_steps, options)
        start = options.dense_steps
        parent.save_pretrained(dense)
        tokenizer.save_pretrained(dense)
    if not options.no_baseline:
        baseline = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
        runs["dense"] = start, train(baseline, tokenizer, data, "dense", options.steps, options)
    upcycle_checkpoint(dense, upcycled, options.experts, top_k=options.top_k, seed=options.seed)
    moe = AutoModelForCausalLM.from_pretrained(upcycled, dtype=torch.float32)
    runs["MoE"] = start, train(moe, tokenizer, data, "MoE", options.steps, options)

    moe.to(torch.bfloat16).save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)
    draw(runs, options.output / "curves.png")
    losses = {name: held_out_losses(log_history)[-1][1] for name, (_, log_history) in runs.items()}
    print("\nHeld-out losses:", ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items()))
    print("The MoE model continues:")
    for prompt in PROMPTS:
        print(f"  {continued(moe.eval(), tokenizer, prompt)}")
    return losses


if __name__ == "__main__":
    main()
