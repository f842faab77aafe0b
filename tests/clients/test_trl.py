"""TRL's trainers learn the same from our models, given by name or as objects, as from Llama and Mixtral."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, KTOConfig, KTOTrainer, SFTConfig, SFTTrainer

from skywork_hf import SkyworkForCausalLM, SkyworkMoeForCausalLM

QUESTIONS = ["法国的首都叫什么？", "9 + 13 = ?", "熟能生什么？", "The capital of Japan?"]
ANSWERS = ["巴黎。", "22.", "巧。", "Tokyo."]
WRONG = ["东京。", "25.", "手。", "Paris."]
CLASSES = {"dense": SkyworkForCausalLM, "moe": SkyworkMoeForCausalLM}


def turns(role: str, texts: list[str]) -> list[Any]:
    return [[{"role": role, "content": text}] for text in texts]


PROMPTS = turns("user", QUESTIONS)
CHOSEN, REJECTED = turns("assistant", ANSWERS), turns("assistant", WRONG)
PREFERENCES = {"prompt": PROMPTS, "chosen": CHOSEN, "rejected": REJECTED}
UNPAIRED = {"prompt": PROMPTS, "completion": CHOSEN[:2] + REJECTED[2:], "label": [True, True, False, False]}
SFT_DATA = {
    "text": {"text": [question + answer for question, answer in zip(QUESTIONS, ANSWERS, strict=True)]},
    "prompt and completion": {"prompt": QUESTIONS, "completion": ANSWERS},
    "messages": {"messages": [prompt + answer for prompt, answer in zip(PROMPTS, CHOSEN, strict=True)]},
}


METRICS = {"loss", "grad_norm", "entropy", "mean_token_accuracy", "rewards/margins", "logps/chosen", "kl", "reward"}


def variety(completions: list[Any], **_: Any) -> list[float]:
    return [float(len(set(completion[0]["content"]))) for completion in completions]


TRAINERS: dict[str, tuple[Any, Any, dict[str, Any], dict[str, Any]]] = {
    "sft": (SFTTrainer, SFTConfig, SFT_DATA["messages"], {}),
    "dpo": (DPOTrainer, DPOConfig, PREFERENCES, {}),
    "kto": (KTOTrainer, KTOConfig, UNPAIRED, {}),
    "grpo": (GRPOTrainer, GRPOConfig, {"prompt": PROMPTS}, {"num_generations": 2, "max_completion_length": 8}),
}


def trainer_of(method: str, model: Any, output: Path, data: dict[str, Any] | None = None, **options: Any) -> Any:
    trainer_class, config_class, own_data, own_options = TRAINERS[method]
    config = config_class(
        output_dir=str(output),
        **{"max_steps": 3, "per_device_train_batch_size": 2, "learning_rate": 1e-3, **own_options, **options},
        logging_steps=1,
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    rewards = {"reward_funcs": variety} if method == "grpo" else {}
    if not isinstance(model, str):
        rewards["processing_class"] = AutoTokenizer.from_pretrained(model.config._name_or_path)
    return trainer_class(model=model, args=config, train_dataset=Dataset.from_dict(data or own_data), **rewards)


def learned(method: str, model: Any, output: Path) -> list[dict[str, float]]:
    # Ours sums another loss of the gates than Mixtral does.
    trainer = trainer_of(method, model, output, router_aux_loss_coef=0.0)
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("family", CLASSES)
@pytest.mark.parametrize("method", TRAINERS)
def test_they_learn_what_the_peer_learns(method, family, folders, tmp_path):
    ours, peer = folders(family)
    expected = learned(method, str(peer), tmp_path)
    assert len(expected) == 3
    assert all(entry["grad_norm"] > 0 for entry in expected)
    by_object = AutoModelForCausalLM.from_pretrained(ours)
    assert type(by_object) is CLASSES[family]
    for model in (str(ours), by_object):
        for entry, reference in zip(learned(method, model, tmp_path), expected, strict=True):
            assert entry.keys() == reference.keys()
            for key in METRICS & entry.keys():
                assert entry[key] == pytest.approx(reference[key], rel=1e-3, abs=1e-4), key


@pytest.mark.parametrize("data", SFT_DATA)
def test_models_learn_to_stop(data, folders, tmp_path):
    """What is trained ends with `</s>`, as an id and as a label, and the loss is what the model says of it."""
    trainer = trainer_of("sft", str(folders("moe")[0]), tmp_path, SFT_DATA[data])
    assert type(trainer.model) is SkyworkMoeForCausalLM
    eos = trainer.processing_class.eos_token_id
    for batch in trainer.get_train_dataloader():
        for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
            trained = labels[labels != -100]
            assert trained[-1] == eos
            assert ids[labels != -100].tolist() == trained.tolist()
        with torch.no_grad():
            inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
            outputs = trainer.model(**inputs, output_router_logits=True)
            loss = trainer.compute_loss(trainer.model, dict(batch))
        logits, labels = outputs.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()
        expected = torch.nn.functional.cross_entropy(logits, labels)
        # TRL computes the loss of all gates itself, with our coefficient: Mixtral's.
        balance = load_balancing_loss_func(outputs.router_logits, 4, 2, batch["attention_mask"])
        torch.testing.assert_close(loss, expected + 0.01 * balance)


def test_the_command_trains_in_processes_that_it_starts(folders, tmp_path):
    """`trl sft` is `accelerate launch` of another process, which knows us as `python -m skywork_hf` was asked for."""
    (tmp_path / "data").mkdir()
    rows = [{"text": text} for text in SFT_DATA["text"]["text"]]
    (tmp_path / "data" / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    command = [sys.executable, "-m", "skywork_hf", "-m", "trl", "sft", "--model_name_or_path", folders("moe")[0]]
    command += ["--dataset_name", tmp_path / "data", "--output_dir", tmp_path / "out", "--max_steps", "1"]
    command += ["--use_cpu", "--bf16", "false", "--report_to", "none", "--per_device_train_batch_size", "2"]
    run = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(saved) is SkyworkMoeForCausalLM
