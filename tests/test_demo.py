"""`skywork-hf demo`, as a user sees it."""

from __future__ import annotations

import pytest
from transformers import AutoModelForCausalLM

from skywork_hf.checkpoints.convert import convert_checkpoint
from skywork_hf.cli import main
from skywork_hf.demo import compare_with_reference, tiny_checkpoint


def test_demo_tells_what_was_loaded_agrees_and_generates(capsys):
    main(["demo"])
    printed = capsys.readouterr().out
    assert "SkyworkMoeForCausalLM, modular experts, torch.float32 on cpu" in printed
    assert "2 layers, 16 experts in each, 2 for each token" in printed
    assert "agrees with the reference implementation" in printed
    assert "3 shards, every value read again and compared" in printed
    assert "one sequence of 64 tokens" in printed
    assert "cccccccccccccccc" in printed
    precisions = printed.split("torch.bfloat16, 0.0056 GiB")[1].split("int8, 0.0032 GiB")
    assert len(precisions) == 2
    for said in precisions:
        assert "法国的首都叫 → 巴黎。" in said
        assert "The capital of Japan is → Tokyo." in said
        assert "七加十三等于 → 二十。" in said
        assert "9 + 13 = → 22" in said
        assert "熟能生 → 巧。" in said
        assert "Practice makes → perfect." in said
    assert "32 x float32 linear" in printed


def test_a_model_that_disagrees_fails_the_demo(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(convert_checkpoint(tiny_checkpoint(), tmp_path / "hub"))
    model.lm_head.weight.data += 0.01
    with pytest.raises(ValueError, match="logits differ by"):
        compare_with_reference(model, tiny_checkpoint())


def test_the_command_exits_with_one_sentence(monkeypatch):
    def broken() -> None:
        raise ValueError("what is wrong")

    monkeypatch.setattr("skywork_hf.demo.run", broken)
    with pytest.raises(SystemExit, match="skywork-hf: what is wrong"):
        main(["demo"])
