"""LoRA on attention and every expert: supervised fine-tuning on chats, with the loss on the answers alone.

    python examples/finetune_lora.py --output adapter              # a tiny model that comes along, on a CPU
    python examples/finetune_lora.py --output adapter --model Skywork/Skywork-13B-base --data chats.jsonl \\
        --learning-rate 2e-4 --epochs 2 --batch 1 --max-tokens 2048

A checkpoint with the adapter merged is `skywork-hf convert BASE MERGED --adapter adapter`.
"""

from __future__ import annotations

import sft  # beside this file
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

import skywork_hf  # noqa: F401 - the Auto classes know Skywork now


def main(arguments: list[str] | None = None) -> dict[str, float]:
    options = sft.parser(__doc__).parse_args(arguments)
    set_seed(options.seed)

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    lora = LoraConfig(task_type="CAUSAL_LM", r=options.rank, lora_alpha=2 * options.rank, target_modules="all-linear")
    how = {"dtype": "auto", "device_map": sft.device_map(options, lora)}
    model = AutoModelForCausalLM.from_pretrained(options.model, **how)
    tokenizer.add_chat_tokens(model)
    lora.trainable_token_indices = sft.chat_tokens(tokenizer)
    model = get_peft_model(model, lora)
    model.print_trainable_parameters()

    losses = sft.train(model, tokenizer, options)

    base = AutoModelForCausalLM.from_pretrained(options.model, **how)
    tokenizer.add_chat_tokens(base)
    sft.show_answers(PeftModel.from_pretrained(base, options.output), tokenizer, options)
    return losses


if __name__ == "__main__":
    main()
