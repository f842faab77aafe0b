"""What fine-tuning with LoRA and QLoRA takes, from the configs alone: the tables of docs/finetuning.md.

    python benchmarks/finetuning_memory.py

Counted by the planner (`skywork_hf.training.memory`), on the meta device: no weights, no GPU.
"""

from __future__ import annotations

from peft import LoraConfig

from skywork_hf import SkyworkConfig, SkyworkMoeConfig
from skywork_hf.placement.devices import GIB
from skywork_hf.placement.spread import DoesNotFit
from skywork_hf.training.memory import FinetuningMemory, finetuning_memory

RANK, TOKENS = 16, 2048
MODELS = {"Skywork-13B": SkyworkConfig, "Skywork-MoE": SkyworkMoeConfig}
TARGETS = {"all linears": "all-linear", "attention only": ["q_proj", "k_proj", "v_proj", "o_proj"]}
WEIGHTS = {"bf16": "LoRA, bf16", "fp8": "QLoRA, FP8", "int8": "QLoRA, int8", "nf4": "QLoRA, NF4"}
COUNTS = (1, 2, 4, 8)
KINDS_OF_CARD = ("rtx4090", "h100")


def tables() -> str:
    """Of each model and choice of linears: GiB by part, and the fullest card's."""
    return "\n\n".join(_section(model, targets) for model in MODELS for targets in TARGETS)


def _section(model: str, targets: str) -> str:
    lora = LoraConfig(r=RANK, target_modules=TARGETS[targets])
    first = finetuning_memory(MODELS[model](), lora, "bf16", context_tokens=TOKENS)
    memories = {name: first.with_quantization(name) for name in WEIGHTS}
    title = f"### {model}, {targets}: rank {RANK}, {first.trained.count:,} trained parameters"
    return "\n\n".join([title, _by_part(memories), _by_cards(memories)])


def _by_part(memories: dict[str, FinetuningMemory]) -> str:
    parts = list(memories["bf16"].nbytes)
    rows = []
    for name, memory in memories.items():
        sizes = [*memory.nbytes.values(), sum(memory.nbytes.values())]
        rows.append([WEIGHTS[name], *(f"{size / GIB:.2f}" for size in sizes)])
    return _table(["", *parts, "in all"], rows)


def _by_cards(memories: dict[str, FinetuningMemory]) -> str:
    rows = [
        [f"{count} x {card}", *(_fullest(memory, card, count) for memory in memories.values())]
        for card in KINDS_OF_CARD
        for count in COUNTS
    ]
    return _table(["fullest card", *WEIGHTS.values()], rows)


def _fullest(memory: FinetuningMemory, card: str, count: int) -> str:
    try:
        placement = memory.place(dict.fromkeys(range(count), card))
    except DoesNotFit as error:
        return f"no: {error.shortfall / GIB:.1f} short"
    return f"{max(sum(kinds.values()) for kinds in placement.nbytes.values()) / GIB:.1f}"


def _table(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *rows])


if __name__ == "__main__":
    print(tables())
