"""The examples, as a user runs them, with less training: what they learn, what they write, what they refuse."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import finetune_lora
import finetune_qlora_experts
import pretrain_upcycled_moe
import push_adapter_to_hub
import pytest
import sentences
import sft
import torch
from tiny import checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer

from skywork_hf import SkyworkMoeForCausalLM
from skywork_hf.checkpoints.convert import convert_checkpoint
from skywork_hf.demo import trained_checkpoint

peft = pytest.importorskip("peft")
EXAMPLES = Path(__file__).parents[1] / "examples"


# --- adapters


@pytest.fixture(scope="module")
def lora(tmp_path_factory) -> SimpleNamespace:
    """What `finetune_lora.py` printed and wrote, after two of its ten epochs."""
    folder = tmp_path_factory.mktemp("lora") / "adapter"
    command = [sys.executable, str(EXAMPLES / "finetune_lora.py"), "--output", str(folder), "--epochs", "2"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    return SimpleNamespace(folder=folder, printed=run.stdout)


def losses_in(printed: str) -> tuple[float, float]:
    (line,) = [line for line in printed.splitlines() if line.startswith("Held-out answers: loss ")]
    words = line.split()
    return float(words[3]), float(words[5])


def test_lora_learns_to_answer(lora):
    before, after = losses_in(lora.printed)
    assert after < before - 1.5
    assert "trained:" in lora.printed
    assert "held out:" in lora.printed
    adapted = {name.split(".lora_")[0].rpartition(".")[2] for name in adapter_names(lora.folder) if ".lora_" in name}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj", "w1", "w2", "w3"}


def adapter_names(folder: Path) -> set[str]:
    from safetensors import safe_open

    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        return set(file.keys())


@torch.no_grad()
def test_the_adapter_merges_by_the_conversion_command(lora, tmp_path):
    merged = convert_checkpoint(trained_checkpoint(), tmp_path / "merged", adapter=lora.folder, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(lora.folder)
    base = AutoModelForCausalLM.from_pretrained(trained_checkpoint(), dtype=torch.float32)
    tokenizer.add_chat_tokens(base)
    adapted = peft.PeftModel.from_pretrained(base, lora.folder).eval()
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(chat, return_tensors="pt")["input_ids"]
    again = AutoModelForCausalLM.from_pretrained(merged)
    # The base is stored in bfloat16, in which the merged weights are rounded before they become float32 again.
    torch.testing.assert_close(again(ids).logits, adapted(ids).logits, atol=0.1, rtol=0.05)
    assert AutoTokenizer.from_pretrained(merged).get_vocab() == tokenizer.get_vocab()


@pytest.mark.parametrize("quantization", ["int8", "fp8", "nf4"])
def test_qlora_trains_every_expert_over_a_frozen_base(quantization, tmp_path, capsys):
    if quantization == "nf4":
        pytest.importorskip("bitsandbytes")
    losses = finetune_qlora_experts.main(
        ["--output", str(tmp_path), "--epochs", "1", "--quantization", quantization, "--rank", "8"]
    )
    assert losses["after"] < losses["before"] - 1.0
    assert "held out:" in capsys.readouterr().out
    adapted = {name.split(".lora_")[0] for name in adapter_names(tmp_path) if ".lora_A" in name}
    assert len(adapted) == 4 * 8 * 3  # layers, experts, linears
    assert all(".experts." in name for name in adapted)


def test_a_dense_model_and_data_of_ones_own(tmp_path, capsys):
    rows = [{"instruction": f"{number} + 1?", "output": str(number + 1)} for number in range(20)]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    options = ["--model", str(checkpoint("skywork-13b-tiny")), "--data", str(file), "--epochs", "3"]
    losses = finetune_lora.main(["--output", str(tmp_path / "adapter"), *options])
    assert losses["after"] < losses["before"] - 1.0
    assert "(in the data: " in capsys.readouterr().out


def test_every_tenth_chat_is_held_out():
    training, held_out = sft.split(SimpleNamespace(data=[sft.DATA / "instructions.jsonl"]))
    assert (len(training), len(held_out)) == (144, 16)
    assert not any(chat in training for chat in held_out)


def test_answers_that_do_not_fit_the_context_are_refused(tmp_path):
    with pytest.raises(ValueError, match="has an answer within 3 tokens"):
        finetune_lora.main(["--output", str(tmp_path), "--max-tokens", "3"])


# --- upcycling


def test_upcycled_experts_learn_more_than_their_parent(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sentences, "HELD_OUT", 0.01)  # to evaluate quickly
    output = tmp_path / "moe"
    short = ["--dense-steps", "20", "--steps", "20", "--max-tokens", "32"]
    losses = pretrain_upcycled_moe.main(["--output", str(output), *short])
    assert losses["MoE"] < losses["dense parent"] - 0.3
    assert losses["dense"] < losses["dense parent"] - 0.3
    printed = capsys.readouterr().out
    assert "router/drop_rate" in printed
    assert "The MoE model continues:" in printed
    for picture in ("curves.png", "router.png"):
        assert (output / picture).stat().st_size > 10_000
    model = AutoModelForCausalLM.from_pretrained(output)
    assert isinstance(model, SkyworkMoeForCausalLM)
    assert model.dtype == torch.bfloat16
    assert model.config.use_cache
    with pytest.raises(SystemExit, match="is there already"):
        pretrain_upcycled_moe.main(["--output", str(output)])


def test_a_text_that_holds_nothing_is_refused_before_anything_is_written(tmp_path):
    (tmp_path / "empty.txt").write_text("\n\n")
    for name, message in (("empty.txt", "expected at least two documents"), ("missing.txt", "is not there")):
        options = ["--output", str(tmp_path / "moe"), "--text", str(tmp_path / name)]
        with pytest.raises(SystemExit, match=message):
            pretrain_upcycled_moe.main(options)
    with pytest.raises(SystemExit):
        pretrain_upcycled_moe.main(["--output", str(tmp_path / "moe"), "--experts", "2", "--top-k", "3"])
    assert not (tmp_path / "moe").exists()


def test_upcycling_a_checkpoint_and_a_text_of_ones_own(tmp_path):
    file = tmp_path / "corpus.txt"
    file.write_text("".join(f"{number} is one more than {number - 1}\n\n" for number in range(60)), encoding="utf-8")
    options = ["--dense", str(checkpoint("skywork-13b-tiny")), "--text", str(file), "--no-baseline", "--experts", "4"]
    losses = pretrain_upcycled_moe.main(["--output", str(tmp_path / "moe"), *options, "--steps", "20"])
    assert losses.keys() == {"MoE"}
    assert losses["MoE"] < 3.0  # it began at the uniform 8.3
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "moe").config.num_local_experts == 4


# --- the Hub


def push(capsys: Any, *arguments: str) -> str:
    push_adapter_to_hub.main(list(arguments))
    return capsys.readouterr().out


def test_without_a_token_nothing_is_sent_and_all_is_shown(lora, capsys, monkeypatch):
    monkeypatch.setattr(push_adapter_to_hub, "get_token", lambda: None)
    monkeypatch.setattr(push_adapter_to_hub, "HfApi", None)  # using it would fail
    shown = push(capsys, str(lora.folder), "you/lora", "--base-model", "Skywork/Skywork-MoE-Base")
    assert "Nothing was sent, for there is no token" in shown
    for name in ("adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "chat_template.jinja"):
        assert f" {name}\n" in shown
    assert "training_args.bin" not in shown
    assert "license_name: skywork-community-license" in shown
    assert "base_model: Skywork/Skywork-MoE-Base" in shown
    assert str(trained_checkpoint()) not in shown


def test_with_a_token_one_commit_has_what_was_shown(lora, capsys, monkeypatch):
    sent: dict[str, Any] = {}

    class Api:
        def create_repo(self, repo: str, private: bool, exist_ok: bool) -> Any:
            sent["private"] = private
            return SimpleNamespace(repo_id=repo)

        def create_commit(self, repo: str, operations: list[Any], commit_message: str) -> Any:
            sent["files"] = {operation.path_in_repo: operation.path_or_fileobj for operation in operations}
            return SimpleNamespace(commit_url=f"https://huggingface.co/{repo}/commit/1")

    monkeypatch.setattr(push_adapter_to_hub, "get_token", lambda: "token")
    monkeypatch.setattr(push_adapter_to_hub, "HfApi", Api)
    shown = push(capsys, str(lora.folder), "you/lora", "--base-model", "Skywork/Skywork-MoE-Base")
    assert "Sent: https://huggingface.co/you/lora/commit/1" in shown
    assert sent["private"]
    assert all(f" {name}\n" in shown for name in sent["files"])
    config = json.loads(sent["files"]["adapter_config.json"])
    assert config["base_model_name_or_path"] == "Skywork/Skywork-MoE-Base"
    # The user's own file is as it was.
    assert json.loads((lora.folder / "adapter_config.json").read_text()) != config


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{base}", "you/lora"], "holds no adapter"),
        (["{adapter}", "you/lora"], "a folder: give its name on the Hub by --base-model"),
    ],
)
def test_what_nobody_could_load_is_not_sent(arguments, message, lora):
    places = {"base": trained_checkpoint(), "adapter": lora.folder}
    with pytest.raises(SystemExit, match=message):
        push_adapter_to_hub.main([argument.format(**places) for argument in arguments])


def test_a_name_that_the_hub_does_not_take(lora, capsys):
    with pytest.raises(SystemExit):
        push_adapter_to_hub.main([str(lora.folder), "you/a/b"])
    assert "you/a/b" in capsys.readouterr().err
