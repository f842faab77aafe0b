"""QLoRA down to the experts: the base stays frozen in int8, FP8 or 4 bit, and every expert gets a LoRA.

    python examples/finetune_qlora_experts.py --output adapter     # a tiny model that comes along, in int8, on a CPU
    python examples/finetune_qlora_experts.py --output adapter --model Skywork/Skywork-MoE-Base --quantization nf4 \\
        --data chats.jsonl --learning-rate 2e-4 --epochs 2 --batch 1 --max-tokens 2048

`--quantization int8` and `fp8` are this package's own, one byte a weight on every device; `nf4` and `bnb-int8` are
bitsandbytes'. With GPUs, every expert goes where it fits with what training its adapter takes: docs/finetuning.md has
the tables. A checkpoint in 16 bit with the adapter merged is `skywork-hf convert BASE MERGED --adapter adapter`.
"""

from __future__ import annotations

import sft  # beside this file
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, set_seed

from skywork_hf import SkyworkFp8Config, SkyworkInt8Config

QUANTIZATIONS = {
    "int8": SkyworkInt8Config,
    "fp8": SkyworkFp8Config,
    "nf4": lambda: BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    ),
    "bnb-int8": lambda: BitsAndBytesConfig(load_in_8bit=True),
}


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = sft.parser(__doc__)
    parser.add_argument("--quantization", choices=QUANTIZATIONS, default="int8")
    options = parser.parse_args(arguments)
    set_seed(options.seed)

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    quantization = QUANTIZATIONS[options.quantization]()
    experts = ["w1", "w2", "w3"]  # the three linears of each
    lora = LoraConfig(task_type="CAUSAL_LM", r=options.rank, lora_alpha=2 * options.rank, target_modules=experts)
    how = {
        "quantization_config": quantization,
        "dtype": torch.bfloat16,
        "device_map": sft.device_map(options, lora, quantization),
    }
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
