"""`skywork-hf demo`: what a user would do with a released checkpoint, on tiny ones that come with the package."""

from __future__ import annotations

import sys
import tempfile
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from .checkpoints.convert import convert_checkpoint
from .placement import measured_bandwidth, placement_report, plan_device_map
from .quantization import SkyworkInt8Config

GOLDEN_LOGITS_TOLERANCE = 2e-5  # two correct float32 implementations were seen to differ by 1e-5
NEW_TOKENS = 24
CONTEXT_TOKENS = 64
PROMPTS = ("法国的首都叫", "The capital of Japan is", "七加十三等于", "9 + 13 =", "熟能生", "Practice makes")


def tiny_checkpoint() -> Path:
    """The folder of the bundled checkpoint: Skywork-MoE in the training layout, one pickle, random weights, 2 layers
    of 16 experts, with outputs of a reference implementation in `golden.safetensors`."""
    return Path(str(files("skywork_hf") / "assets" / "skywork-moe-tiny-training-layout"))


def trained_checkpoint() -> Path:
    """The folder of the bundled trained model: Skywork-MoE in bfloat16, 4 layers of 8 experts. It has learnt capitals,
    small sums and proverbs in Chinese and English; `examples/pretrain_upcycled_moe.py` made it."""
    return Path(str(files("skywork_hf") / "assets" / "skywork-moe-tiny-bilingual"))


def run() -> None:
    """Convert, plan, load, describe, compare, look where everything is; and generate in two languages and precisions.

    Raises:
        ValueError: the model disagrees with the reference by more than float32 rounding, or is not where it was
            planned to be.
    """
    with tempfile.TemporaryDirectory() as folder:
        _convert_and_compare(tiny_checkpoint(), Path(folder) / "skywork-moe-tiny")
    _generate(trained_checkpoint())


def _convert_and_compare(raw: Path, checkpoint: Path) -> None:
    print(f"Converting {raw.name}, one pickle, to safetensors in the Hub's layout.")
    convert_checkpoint(raw, checkpoint, max_shard_size="2MB")
    print(f"  {len(list(checkpoint.glob('*.safetensors')))} shards, every value read again and compared")
    print(f"\nPlanning {checkpoint.name} over the devices of this machine, from its config alone:\n")
    bandwidth = {"cpu": measured_bandwidth() / 1e9}
    plan = plan_device_map(checkpoint, context_tokens=CONTEXT_TOKENS, bandwidth=bandwidth)
    print(plan)
    print("\nLoading it by that plan, as any checkpoint: AutoModelForCausalLM, no remote code.")
    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint, device_map=plan)
    print(describe(model))
    print(compare_with_reference(model, raw))

    print("\nWhere it all is, and what one token runs:")
    print(placement_report(model))


def _generate(checkpoint: Path) -> None:
    print("\nThat one's weights are random. This one has learnt capitals, sums and proverbs, in 16 bit and in int8:")
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    for options in ({}, {"quantization_config": SkyworkInt8Config()}):
        model = AutoModelForCausalLM.from_pretrained(checkpoint, **options)
        print(f"\n  {'int8' if options else model.dtype}, {_gib(model):.4f} GiB")
        for prompt in PROMPTS:
            print(f"    {continued(model, tokenizer, prompt)}")


def continued(model: Any, tokenizer: Any, prompt: str) -> str:
    """The prompt, and what the model says after it."""
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    ids = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    return f"{prompt} → {tokenizer.decode(ids, skip_special_tokens=True)}"


def describe(model: Any) -> str:
    """What was loaded, in a few lines: classes, shape, parameters in all and at work for a token, size."""
    config = model.config
    total = model.num_parameters()
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    active = total - experts + experts * config.num_experts_per_tok // config.num_local_experts
    return "\n".join(
        [
            f"  {type(model).__name__}, {config.experts_layout} experts, {model.dtype} on {model.device}",
            f"  {config.num_hidden_layers} layers, {config.num_local_experts} experts in each, "
            f"{config.num_experts_per_tok} for each token",
            f"  {total:,} parameters, {active:,} active; {_gib(model):.4f} GiB",
        ]
    )


def _gib(model: Any) -> float:
    return model.get_memory_footprint() / 2**30


@torch.no_grad()
def compare_with_reference(model: Any, checkpoint: Path) -> str:
    """One sentence on how the model agrees with `golden.safetensors` of its checkpoint.

    Raises:
        ValueError: it does not.
    """
    golden = {name: value.to(model.device) for name, value in load_file(checkpoint / "golden.safetensors").items()}
    mask = golden["attention_mask"].bool()
    inputs = {name: golden[name] for name in ("input_ids", "attention_mask", "position_ids")}
    logits = model(**inputs).logits
    difference = (logits - golden["logits"])[mask].abs().max().item()
    expected = golden["greedy_single"][0].tolist()
    prompt = {name: golden[name][:1] for name in ("input_ids", "attention_mask")}
    greedy = model.generate(**prompt, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None)
    if difference > GOLDEN_LOGITS_TOLERANCE or greedy[0].tolist() != expected:
        raise ValueError(
            f"{checkpoint.name} disagrees with its reference: logits differ by {difference:.1e} (expected at most "
            f"{GOLDEN_LOGITS_TOLERANCE:.0e}), greedy tokens {greedy[0].tolist()} (expected {expected}). "
            f"Please report this with the output of `transformers env`; Python is {sys.version.split()[0]}."
        )
    return (
        f"  agrees with the reference implementation: logits within {difference:.1e} over {int(mask.sum())} tokens, "
        f"all {NEW_TOKENS} greedy tokens equal"
    )
