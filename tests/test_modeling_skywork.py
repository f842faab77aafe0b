"""The dense models against the golden outputs, against Llama, and in every way that transformers runs a model."""

from __future__ import annotations

import pytest
import torch
from tiny import checkpoint, golden, tiny_dense_config, tokens
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
)

from skywork_hf import SkyworkForCausalLM, SkyworkForSequenceClassification, SkyworkModel, SkyworkMoeConfig

NAME = "skywork-13b-tiny"


def llama_of(config) -> LlamaForCausalLM:
    fields = {key: value for key, value in config.to_dict().items() if key not in ("model_type", "architectures")}
    return LlamaForCausalLM(LlamaConfig(**fields))


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(checkpoint(NAME))


@torch.no_grad()
def test_golden_logits_with_flex_attention():
    # The first 10 tokens only: see the MoE model's test.
    model = AutoModelForCausalLM.from_pretrained(checkpoint(NAME), attn_implementation="flex_attention")
    expected = golden(NAME)
    assert expected["attention_mask"][0].all()
    logits = model(expected["input_ids"][:1, :10]).logits
    torch.testing.assert_close(logits, expected["logits"][:1, :10], atol=2e-5, rtol=0)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@torch.no_grad()
def test_golden_logits_and_loss(attention):
    model = AutoModelForCausalLM.from_pretrained(checkpoint(NAME), attn_implementation=attention)
    assert type(model) is SkyworkForCausalLM
    expected = golden(NAME)
    outputs = model(**{key: expected[key] for key in ("input_ids", "attention_mask", "position_ids", "labels")})
    mask = expected["attention_mask"].bool()
    torch.testing.assert_close(outputs.logits[mask], expected["logits"][mask], atol=2e-5, rtol=0)
    torch.testing.assert_close(outputs.loss, expected["loss"][0], atol=1e-5, rtol=0)


@torch.no_grad()
def test_golden_hidden_states_and_long_logits(model):
    expected = golden(NAME)
    hidden = AutoModel.from_pretrained(checkpoint(NAME))
    assert type(hidden) is SkyworkModel
    mask = expected["attention_mask"].bool()
    states = hidden(**{key: expected[key] for key in ("input_ids", "attention_mask", "position_ids")})
    torch.testing.assert_close(states.last_hidden_state[mask], expected["last_hidden_state"][mask], atol=2e-5, rtol=0)
    long = model(expected["long_input_ids"]).logits
    assert expected["long_input_ids"].shape[1] > model.config.max_position_embeddings
    torch.testing.assert_close(long, expected["long_logits"], atol=1e-4, rtol=0)


def test_golden_greedy_ids(model):
    expected = golden(NAME)
    prompt = {key: expected[key] for key in ("input_ids", "attention_mask")}
    first = prompt["input_ids"][:1][:, prompt["attention_mask"][0].bool()]
    single = expected["greedy_single"]
    new = single.shape[1] - prompt["input_ids"].shape[1]
    assert model.generate(first, max_new_tokens=new, eos_token_id=None)[0, -new:].equal(single[0, -new:])
    batch = expected["greedy_batch_left_padded"]
    new = batch.shape[1] - prompt["input_ids"].shape[1]
    assert model.generate(**prompt, max_new_tokens=new, eos_token_id=None).equal(batch)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("tied", [False, True])
def test_equals_llama_forward_and_gradients(kv_heads, tied):
    config = tiny_dense_config(num_key_value_heads=kv_heads, tie_word_embeddings=tied)
    ours, llama = SkyworkForCausalLM(config), llama_of(config)
    llama.load_state_dict(ours.state_dict())
    ids = tokens()
    ours_out, llama_out = (m(ids, labels=ids, output_hidden_states=True) for m in (ours, llama))
    for ours_state, llama_state in zip(ours_out.hidden_states, llama_out.hidden_states, strict=True):
        assert ours_state.equal(llama_state)
    assert ours_out.logits.equal(llama_out.logits)
    ours_out.loss.backward()
    llama_out.loss.backward()
    for (name, parameter), (llama_name, other) in zip(ours.named_parameters(), llama.named_parameters(), strict=True):
        assert name == llama_name
        assert parameter.grad.equal(other.grad), name


def reference_rope_angles(kind: str | None, factor: float, length: int, config) -> torch.Tensor:
    """The angles of the original remote code: [length, head_dim / 2]."""
    dim, base, positions = config.head_dim, 10000.0, torch.arange(length).float()
    if kind == "ntk":
        base = base * factor
    if kind == "dynamic" and length > config.max_position_embeddings:
        scale = factor * length / config.max_position_embeddings - (factor - 1)
        base = base * scale ** (dim / (dim - 2))
    if kind == "linear":
        positions = positions / factor
    return positions[:, None] / base ** (torch.arange(0, dim, 2).float() / dim)


@pytest.mark.parametrize("kind", [None, "linear", "dynamic", "ntk"])
@pytest.mark.parametrize("length", [16, 64, 100])
def test_rope_scalings_are_those_of_the_original_code(kind, length):
    scaling = None if kind is None else {"type": kind, "factor": 3.0}
    config = tiny_dense_config(rope_scaling=scaling)
    cos, sin = SkyworkModel(config).rotary_emb(torch.zeros(1), torch.arange(length)[None])
    angles = reference_rope_angles(kind, 3.0, length, config).repeat(1, 2)
    torch.testing.assert_close(cos[0], angles.cos(), atol=2e-5, rtol=0)
    torch.testing.assert_close(sin[0], angles.sin(), atol=2e-5, rtol=0)


@torch.no_grad()
def test_sequence_classification_reads_the_last_real_token():
    config = tiny_dense_config(num_labels=3)
    model = SkyworkForSequenceClassification(config).eval()
    assert model.score.bias is None
    ids = tokens(1, 6)
    alone = model(ids).logits
    hidden = model.model(ids).last_hidden_state[:, -1]
    torch.testing.assert_close(alone, model.score(hidden))
    left = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], dim=1)
    right = torch.cat([ids, torch.zeros(1, 3, dtype=torch.long)], dim=1)
    for padded in (left, right):
        mask = (padded != 0).long()
        positions = (mask.cumsum(-1) - 1).clamp_min(0)
        torch.testing.assert_close(
            model(padded, attention_mask=mask, position_ids=positions).logits, alone, atol=1e-5, rtol=0
        )


def test_sequence_classification_from_a_language_model_names_what_is_new(tmp_path):
    model = SkyworkForCausalLM(tiny_dense_config())
    model.save_pretrained(tmp_path)
    classifier, info = AutoModelForSequenceClassification.from_pretrained(
        tmp_path, num_labels=4, output_loading_info=True
    )
    assert type(classifier) is SkyworkForSequenceClassification
    assert info["missing_keys"] == {"score.weight"}
    assert classifier.score.weight.shape == (4, 32)


def test_a_moe_config_is_refused():
    with pytest.raises(ValueError, match="SkyworkMoeForCausalLM"):
        SkyworkForCausalLM(SkyworkMoeConfig(hidden_size=32, num_attention_heads=4, num_hidden_layers=1))
    with pytest.raises(ValueError, match="SkyworkMoeForCausalLM"):
        SkyworkForCausalLM.from_pretrained(checkpoint("skywork-moe-tiny"))
