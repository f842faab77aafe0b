"""From a dense model to a trained mixture of experts: upcycle, and train on with the adaptive auxiliary loss.

    python examples/pretrain_upcycled_moe.py --output moe                 # a tiny model, in about two minutes on a CPU
    python examples/pretrain_upcycled_moe.py --output moe --dense Skywork/Skywork-13B-base --text corpus.txt \\
        --experts 16 --top-k 2 --learning-rate 2e-5 --steps 20000 --batch 8 --max-tokens 4096

Without `--dense` a tiny dense parent, and its tokenizer, are trained first on bundled sentences (sentences.py).
`--text` is a file with a document in each line, of which every twentieth is held out.

The dense parent trains on beside the MoE model, for as many tokens, so that what the experts bring can be seen: both
held-out losses are printed, and drawn in `curves.png`. Writes to `--output`: the MoE model in bfloat16, `curves.png`,
and `router.png`, what the gates did. `--no-baseline` leaves the dense model's further training out.
"""

from __future__ import annotations

import argparse
import io
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
from skywork_hf.training import read_conversations

TINY = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
VOCABULARY = 1536
PROMPTS = ["法国的首都是", "The capital of Japan is", "三加四等于", "7 + 8 =", "熟能生", "Practice makes"]
HELD_OUT_EVERY = 20


def train_tokenizer(texts: list[str], folder: Path) -> SkyworkTokenizer:
    """A SentencePiece tokenizer of Skywork's kind: BPE, single digits, bytes for what it has not seen."""
    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
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
    return [{"input_ids": row[:max_tokens], "attention_mask": [1] * len(row[:max_tokens])} for row in rows]


def train(model: Any, tokenizer: Any, data: dict[str, Any], name: str, steps: int, options: Any) -> Trainer:
    """Train on `data["train"]`, and look at `data["held_out"]` ten times."""
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
    print(f"{name}: held-out loss {held_out_losses(trainer)[-1][1]:.4f}")
    return trainer


def held_out_losses(trainer: Trainer) -> list[tuple[int, float]]:
    return [(entry["step"], entry["eval_loss"]) for entry in trainer.state.log_history if "eval_loss" in entry]


def draw(runs: dict[str, tuple[int, Trainer]], path: Path) -> None:
    """The losses over the steps; each run begins where another one ended."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axis = figure.subplots()
    for (name, (start, trainer)), colour in zip(runs.items(), ("#555555", "#88CCEE", "#CC6677"), strict=False):
        losses = [(entry["step"], entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
        for points, style in ((losses, {"linewidth": 0.8, "alpha": 0.5}), (held_out_losses(trainer), {"marker": "."})):
            steps, values = zip(*points, strict=True)
            label = f"{name}, {'held out' if 'marker' in style else 'training'}"
            axis.plot([start + step for step in steps], values, color=colour, label=label, **style)
    axis.set(xlabel="step", ylabel="loss, nats a token")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    figure.savefig(path, dpi=120)


def show(model: Any, tokenizer: Any) -> None:
    """What the model says after some prompts."""
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
        answer = model.generate(**inputs, max_new_tokens=16, do_sample=False)
        print(f"  {tokenizer.decode(answer[0], skip_special_tokens=True)}")


def dense_parent(options: Any, texts: list[str], folder: Path) -> tuple[Any, Any]:
    """The model that the experts are copied from, and its tokenizer."""
    if options.dense is not None:
        model = AutoModelForCausalLM.from_pretrained(options.dense, dtype="auto")
        return model, AutoTokenizer.from_pretrained(options.dense)
    tokenizer = train_tokenizer(texts, folder)
    return SkyworkForCausalLM(SkyworkConfig(**TINY, vocab_size=len(tokenizer))), tokenizer


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="the folder to write")
    parser.add_argument(
        "--dense", help="the dense checkpoint: a folder or a name on the Hub; default: train a tiny one"
    )
    parser.add_argument("--text", type=Path, help="a document in each line; default: the bundled sentences")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--steps", type=int, default=200, help="of the MoE model, and of the dense one beside it")
    parser.add_argument("--dense-steps", type=int, default=200, help="of a tiny dense parent")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--max-tokens", type=int, default=TINY["max_position_embeddings"])
    parser.add_argument("--report-to", default="none", help="tensorboard, wandb, trackio, ...")
    parser.add_argument("--no-baseline", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)

    set_seed(options.seed)
    if options.text is None:
        texts, held_out = bundled.sentences(options.seed)
    else:
        lines = [line for line in options.text.read_text(encoding="utf-8").splitlines() if line.strip()]
        texts = [line for number, line in enumerate(lines) if number % HELD_OUT_EVERY]
        held_out = lines[::HELD_OUT_EVERY]
    parent_folder, start_folder = options.output / "dense", options.output / "upcycled"
    dense, tokenizer = dense_parent(options, texts + chats(), parent_folder)
    data = {
        name: tokenized(tokenizer, of_kind, options.max_tokens)
        for name, of_kind in (("train", texts), ("held_out", held_out))
    }
    runs: dict[str, tuple[int, Trainer]] = {}
    source, start = options.dense, 0
    if options.dense is None:
        runs["dense parent"] = 0, train(dense, tokenizer, data, "dense parent", options.dense_steps, options)
        start = options.dense_steps
        dense.save_pretrained(parent_folder)
        tokenizer.save_pretrained(parent_folder)
        source = parent_folder
    elif not Path(source).is_dir():
        source = snapshot_download(source)
    upcycle_checkpoint(source, start_folder, options.experts, top_k=options.top_k, seed=options.seed)
    if not options.no_baseline:
        runs["dense"] = start, train(dense, tokenizer, data, "dense", options.steps, options)
    moe = AutoModelForCausalLM.from_pretrained(start_folder)
    runs["MoE"] = start, train(moe, tokenizer, data, "MoE", options.steps, options)

    moe.to(torch.bfloat16).save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)
    draw(runs, options.output / "curves.png")
    losses = {name: held_out_losses(trainer)[-1][1] for name, (_, trainer) in runs.items()}
    print("\nHeld-out losses:", ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items()))
    print("The MoE model continues:")
    show(moe.eval(), tokenizer)
    return losses


if __name__ == "__main__":
    main()
