"""Counting which experts are chosen, against the router logits that the model itself gives."""

from __future__ import annotations

import json
import threading

import pytest
import torch
from tiny import checkpoint, tiny_dense_config, tiny_moe_config, tokens
from transformers import AutoModelForCausalLM, AutoTokenizer

from skywork_hf import (
    SkyworkForCausalLM,
    SkyworkMoeForCausalLM,
    SkyworkMoeModel,
    collect_expert_usage,
    plan_device_map,
)
from skywork_hf.modeling_skywork_moe import routing_probabilities
from skywork_hf.placement import ExpertUsage

MOE = "skywork-moe-tiny"


def skewed_usage(layers: int = 2, experts: int = 4) -> ExpertUsage:
    """Expert n is chosen more often than n - 1; 0 and 1 only ever together."""
    counts = torch.arange(1, experts + 1).repeat(layers, 1) * 10
    together = torch.diag_embed(counts)
    together[:, 0, 1] = together[:, 1, 0] = 10
    return ExpertUsage(list(range(layers)), counts, together, tokens=50)


@pytest.mark.parametrize(
    "changes", [{}, {"moe_expert_interval": 2, "num_hidden_layers": 4}, {"experts_layout": "fused"}]
)
@pytest.mark.parametrize("model_class", [SkyworkMoeForCausalLM, SkyworkMoeModel])
def test_counts_are_the_models_own_choices(changes, model_class):
    model = model_class(tiny_moe_config(**changes)).eval()
    texts = [tokens(1, length)[0] for length in (5, 1, 9)]
    usage = collect_expert_usage(model, texts)
    assert usage.tokens == 15
    assert usage.layers == [n for n in range(model.config.num_hidden_layers) if model.config.is_moe_layer(n)]
    expected = torch.zeros_like(usage.together)
    for text in texts:
        with torch.no_grad():
            router_logits = model(text[None], output_router_logits=True).router_logits
        for row, logits in enumerate(router_logits):
            for token in routing_probabilities(logits, model.config).topk(2).indices.tolist():
                for one in token:
                    for other in token:
                        expected[row, one, other] += 1
    assert torch.equal(usage.together, expected)
    assert torch.equal(usage.counts, expected.diagonal(dim1=1, dim2=2))
    torch.testing.assert_close(usage.shares.sum(dim=1), torch.full((len(usage.layers),), 2.0, dtype=torch.float64))


def test_other_threads_may_generate_meanwhile():
    model = SkyworkMoeForCausalLM(tiny_moe_config()).eval()
    texts = [tokens(1, 30)[0] for _ in range(20)]
    alone = collect_expert_usage(model, texts)
    stop = threading.Event()

    def generate() -> None:
        while not stop.is_set():
            with torch.no_grad():
                model(tokens(1, 30))

    other = threading.Thread(target=generate)
    other.start()
    try:
        beside = collect_expert_usage(model, texts)
    finally:
        stop.set()
        other.join()
    assert torch.equal(beside.together, alone.together)
    assert beside.tokens == alone.tokens


def test_texts_are_tokenised_as_the_checkpoint_has_it():
    model = AutoModelForCausalLM.from_pretrained(checkpoint(MOE))
    texts = ["陕西的省会是西安", "two and two"]
    ids = [AutoTokenizer.from_pretrained(checkpoint(MOE))(text, return_tensors="pt").input_ids for text in texts]
    usage = collect_expert_usage(model, texts)
    assert torch.equal(usage.together, collect_expert_usage(model, ids).together)
    assert collect_expert_usage(model, ids, max_tokens=2).tokens == 4


def test_what_cannot_be_counted():
    with pytest.raises(ValueError, match="SkyworkForCausalLM has no experts"):
        collect_expert_usage(SkyworkForCausalLM(tiny_dense_config()), [tokens(1)])
    with pytest.raises(ValueError, match="no tokens"):
        collect_expert_usage(SkyworkMoeForCausalLM(tiny_moe_config()), [])


def test_saved_and_loaded(tmp_path):
    usage = skewed_usage()
    usage.save(tmp_path / "usage.json")
    loaded = ExpertUsage.load(tmp_path / "usage.json")
    assert loaded.layers == usage.layers
    assert loaded.tokens == usage.tokens
    assert torch.equal(loaded.counts, usage.counts)
    assert torch.equal(loaded.together, usage.together)


@pytest.mark.parametrize("content", ["", "[]", "{}", json.dumps({**skewed_usage().to_dict(), "layers": [0]})])
def test_a_file_that_holds_something_else(content, tmp_path):
    (tmp_path / "usage.json").write_text(content)
    with pytest.raises(ValueError, match=r"usage\.json holds no expert usage"):
        ExpertUsage.load(tmp_path / "usage.json")


def test_it_says_what_it_is_worth():
    even = ExpertUsage([0], torch.full((1, 4), 5), torch.zeros(1, 4, 4, dtype=torch.int64), tokens=10)
    assert even.share_of_hits(0.5) == 0.5
    assert "little: routing is nearly even" in str(even)
    skewed = skewed_usage()
    assert skewed.share_of_hits(0.5) == pytest.approx(0.7)
    assert "20.0% more hits" in str(skewed)


def test_the_planner_keeps_the_used_experts_and_parts_those_chosen_together():
    config = tiny_moe_config()
    roomy = {0: "8GiB", 1: "8GiB"}
    plan = plan_device_map(config, roomy, expert_usage=skewed_usage())
    assert all(layer[0] != layer[1] for layer in plan.placement.experts)
    one = plan.bytes_per_device[0]["experts"] // plan.experts_on(0)
    used = max(sum(kinds.values()) for kinds in plan.bytes_per_device.values())
    tight = {0: used - one // 2, 1: used - one // 2, "cpu": "8GiB"}
    placed = plan_device_map(config, tight, expert_usage=skewed_usage()).placement.experts
    on_cpu = [[number for number, key in enumerate(layer) if key == "cpu"] for layer in placed]
    assert any(on_cpu)
    assert all(numbers == list(range(len(numbers))) for numbers in on_cpu)
