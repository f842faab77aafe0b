"""What the fine-tuning examples share: arguments, placement, the training on chats, and answers to look at.

`--data` takes files of your own with a JSON object in each line, `{"instruction": ..., "input": ..., "output": ...}`,
`{"messages": [{"role": ..., "content": ...}, ...]}` or what else `read_conversations` reads. Every tenth chat is held
out.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

from skywork_hf.demo import trained_checkpoint
from skywork_hf.tokenization_skywork import CHAT_TOKENS
from skywork_hf.training import read_conversations, tokenize_conversations
from skywork_hf.training.memory import finetuning_memory

DATA = Path(__file__).parent / "data"
HELD_OUT_EVERY = 10
SHOWN = 4


def parser(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="the folder to write the adapter to")
    parser.add_argument("--model", default=str(trained_checkpoint()), help="a folder or a name on the Hub")
    parser.add_argument(
        "--data",
        type=Path,
        nargs="+",
        default=[DATA / "instructions.jsonl", DATA / "conversations.jsonl"],
        help="files of chats, a JSON object in each line; default: the bundled ones, in both forms",
    )
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--epochs", type=float, default=10)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="about 2e-4 for the released models")
    parser.add_argument("--max-tokens", type=int, help="of a chat; default: the model's context")
    parser.add_argument("--report-to", default="none", help="tensorboard, wandb, trackio, ...")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def device_map(options: argparse.Namespace, lora: Any, quantization: Any = None) -> dict[str, Any] | None:
    """Every part and expert where it fits with what training its adapters takes; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    memory = finetuning_memory(
        options.model, lora, quantization, context_tokens=options.max_tokens, batch_size=options.batch
    )
    print(memory)
    return memory.place().device_map


def chat_tokens(tokenizer: Any) -> dict[str, list[int]]:
    """PEFT's `trainable_token_indices`: the rows of `[USER]` and its kin, which a base model has not learnt."""
    return {"embed_tokens": tokenizer.convert_tokens_to_ids(list(CHAT_TOKENS))}


def train(model: Any, tokenizer: Any, options: argparse.Namespace) -> dict[str, float]:
    """Train on the answers of the chats and save the adapter; the loss of the held-out answers before and after."""
    training, held_out = split(options)
    max_tokens = options.max_tokens or model.config.max_position_embeddings
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(options.output),
            num_train_epochs=options.epochs,
            per_device_train_batch_size=options.batch,
            learning_rate=options.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=10,
            bf16=torch.cuda.is_available(),
            activation_checkpointing=torch.cuda.is_available(),
            logging_steps=10,
            eval_strategy="epoch",
            save_strategy="no",
            report_to=options.report_to,
            seed=options.seed,
        ),
        train_dataset=tokenize_conversations(tokenizer, training, max_tokens),
        eval_dataset=tokenize_conversations(tokenizer, held_out, max_tokens),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        processing_class=tokenizer,
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    trainer.save_model()
    print(f"\nHeld-out answers: loss {before:.4f} before, {after:.4f} after. The adapter is in {options.output}.")
    return {"before": before, "after": after}


def split(options: argparse.Namespace) -> tuple[list[Any], list[Any]]:
    """Chats for training, and those held out."""
    chats = [chat for file in options.data for chat in read_conversations(file)]
    return [chat for number, chat in enumerate(chats) if number % HELD_OUT_EVERY], chats[::HELD_OUT_EVERY]


@torch.no_grad()
def show_answers(model: Any, tokenizer: Any, options: argparse.Namespace) -> None:
    """What the model answers to some questions of the training, and to some that were held out."""
    for name, chats in zip(("trained", "held out"), split(options), strict=True):
        print(f"\n{name}:")
        for chat in chats[:: max(1, len(chats) // SHOWN)][:SHOWN]:
            turn = next(place for place, message in enumerate(chat) if message["role"] == "assistant")
            prompt = tokenizer.apply_chat_template(
                chat[:turn], add_generation_prompt=True, return_dict=True, return_tensors="pt"
            ).to(model.device)
            ids = model.eval().generate(**prompt, max_new_tokens=24, do_sample=False)
            answer = tokenizer.decode(ids[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
            question = chat[turn - 1]["content"].replace("\n", " / ")
            print(f"  {question}  →  {answer}  (in the data: {chat[turn]['content']})")
