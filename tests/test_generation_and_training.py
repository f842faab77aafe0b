"""Every way that users of transformers run a model, for both families and both experts layouts."""

from __future__ import annotations

import pytest
import torch
from tiny import checkpoint, tiny_dense_config, tiny_moe_config, tokens
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorWithFlattening,
    PreTrainedModel,
    StaticCache,
    TextGenerationPipeline,
    pipeline,
)
from transformers.cache_utils import DynamicCache
from transformers.generation import CompileConfig, GenerationConfig

from skywork_hf import SkyworkForCausalLM, SkyworkMoeForCausalLM
from skywork_hf.compat import CACHE

FAMILIES = {
    "dense": lambda **changes: SkyworkForCausalLM(tiny_dense_config(**changes)),
    "modular": lambda **changes: SkyworkMoeForCausalLM(tiny_moe_config(experts_layout="modular", **changes)),
    "fused": lambda **changes: SkyworkMoeForCausalLM(tiny_moe_config(experts_layout="fused", **changes)),
    "interval": lambda **changes: SkyworkMoeForCausalLM(
        tiny_moe_config(moe_expert_interval=2, moe_2layer_gate=True, **changes)
    ),
}


@pytest.fixture(params=FAMILIES)
def make(request):
    torch.manual_seed(0)
    return FAMILIES[request.param]


@pytest.fixture
def model(make) -> PreTrainedModel:
    return make().eval()


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("static", [False, True])
def test_decoding_token_by_token_equals_one_forward(model, static):
    ids = tokens(2, 12)
    expected = model(ids, use_cache=False).logits
    cache = StaticCache(config=model.config, max_cache_len=16) if static else DynamicCache(config=model.config)
    steps = [model(ids[:, :5], **{CACHE: cache}).logits]
    for position in range(5, 12):
        where = torch.tensor([[position]])
        steps.append(model(ids[:, position : position + 1], **{CACHE: cache}, position_ids=where).logits)
    close(torch.cat(steps, dim=1), expected)


@torch.no_grad()
def test_left_padding_changes_nothing(model):
    ids = tokens(1, 7)
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), ids], dim=1)
    mask = (torch.arange(11) >= 4).long()[None]
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    close(model(padded, attention_mask=mask, position_ids=positions).logits[:, 4:], model(ids).logits)
    greedy = model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None)
    padded_greedy = model.generate(padded, attention_mask=mask, max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert padded_greedy[0, 4:].equal(greedy[0])


@torch.no_grad()
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_packed_sequences_do_not_see_each_other(make, attention):
    model = make(attn_implementation=attention).eval()
    first, second = tokens(1, 6)[0], tokens(1, 9)[0]
    batch = DataCollatorWithFlattening()([{"input_ids": first.tolist()}, {"input_ids": second.tolist()}])
    assert batch["position_ids"].tolist() == [[*range(6), *range(9)]]
    logits = model(batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits[0]
    close(logits[:6], model(first[None]).logits[0])
    close(logits[6:], model(second[None]).logits[0])


@torch.no_grad()
def test_logits_to_keep(model):
    ids = tokens()
    logits = model(ids).logits
    close(model(ids, logits_to_keep=3).logits, logits[:, -3:])
    close(model(ids, logits_to_keep=torch.tensor([0, 4])).logits, logits[:, [0, 4]])


@torch.no_grad()
def test_inputs_embeds_equal_input_ids(model):
    ids = tokens()
    close(model(inputs_embeds=model.get_input_embeddings()(ids)).logits, model(ids).logits)


def test_beam_search_and_sampling_and_assisted_generation(model):
    ids = tokens(2, 5)
    settings = {"max_new_tokens": 8, "eos_token_id": None, "pad_token_id": 0}
    greedy = model.generate(ids, do_sample=False, **settings)
    assert model.generate(ids, do_sample=False, num_beams=1, cache_implementation="static", **settings).equal(greedy)

    beams = model.generate(ids, do_sample=False, num_beams=3, **settings)
    assert sequence_score(model, beams, 5) >= sequence_score(model, greedy, 5) - 1e-4

    torch.manual_seed(1)
    sampled = model.generate(ids, do_sample=True, top_k=10, **settings)
    torch.manual_seed(1)
    assert sampled.equal(model.generate(ids, do_sample=True, top_k=10, **settings))
    assert not sampled.equal(greedy)

    assistant = SkyworkForCausalLM(tiny_dense_config()).eval()
    assisted = model.generate(ids[:1], assistant_model=assistant, do_sample=False, **settings)
    assert assisted.equal(greedy[:1])


def sequence_score(model: PreTrainedModel, sequences: torch.Tensor, prompt: int) -> float:
    with torch.no_grad():
        chances = model(sequences).logits[:, prompt - 1 : -1].log_softmax(-1)
    return chances.gather(-1, sequences[:, prompt:, None]).sum().item()


def test_gradient_checkpointing_gives_equal_gradients(make):
    model, ids = make().train(), tokens()

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        model(ids, labels=ids, use_cache=False).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    model.gradient_checkpointing_enable()
    checkpointed = gradients()
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, msg=name)


@pytest.mark.parametrize("tied", [False, True])
def test_resize_token_embeddings(make, tied):
    model = make(tie_word_embeddings=tied).eval()
    ids = tokens()
    before = model(ids).logits
    model.resize_token_embeddings(80)
    assert model.config.vocab_size == model.vocab_size == 80
    after = model(ids, labels=ids)
    assert after.logits.shape[-1] == 80
    close(after.logits[..., :67], before)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied


def test_tied_head_is_tied_after_loading(make, tmp_path):
    model = make(tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert again.lm_head.weight.equal(model.lm_head.weight)


@torch.no_grad()
def test_fullgraph_compiled_decode_step_of_the_fused_layout():
    model = FAMILIES["fused"]().eval()
    ids = tokens(1, 6)
    expected = model(ids).logits[:, -1]
    cache = StaticCache(config=model.config, max_cache_len=8)
    model(ids[:, :5], **{CACHE: cache})
    step = torch.compile(model.forward, fullgraph=True)
    logits = step(ids[:, 5:], **{CACHE: cache}, position_ids=torch.tensor([[5]])).logits
    close(logits[:, -1], expected)


def test_only_the_fused_layout_says_that_it_compiles_whole():
    """By the class, as transformers' tests ask, and by the model; `generate` compiles no other."""
    assert not SkyworkMoeForCausalLM._can_compile_fullgraph
    static = {"past_key_values": StaticCache(config=tiny_moe_config(), max_cache_len=8)}
    asked = GenerationConfig(compile_config=CompileConfig())
    asked.compile_config._compile_all_devices = True  # CPUs, too
    assert FAMILIES["fused"]()._valid_auto_compile_criteria(static | {"cache": static["past_key_values"]}, asked)
    assert not FAMILIES["modular"]()._valid_auto_compile_criteria(static | {"cache": static["past_key_values"]}, asked)
    assert FAMILIES["fused"]()._can_compile_fullgraph
    assert not FAMILIES["modular"]()._can_compile_fullgraph
    assert FAMILIES["dense"]()._can_compile_fullgraph


@pytest.mark.parametrize("attention", ["eager", "sdpa", "flex_attention"])
@torch.no_grad()
def test_attention_implementations_agree(make, attention):
    model = make().eval()
    ids = tokens()
    expected = model(ids).logits
    model.set_attn_implementation(attention)
    assert model.config._attn_implementation == attention
    close(model(ids).logits, expected)


@pytest.mark.gpu
@torch.no_grad()
def test_flash_attention_agrees(make):  # its CPU counterpart: test_attention_implementations_agree
    model = make().eval().to("cuda", torch.bfloat16)
    ids = tokens().to("cuda")
    expected = model(ids).logits
    model.set_attn_implementation("flash_attention_2")
    torch.testing.assert_close(model(ids).logits, expected, atol=0.1, rtol=0.1)


def test_attentions_and_hidden_states_on_request(make):
    model = make(attn_implementation="eager").eval()
    outputs = model(tokens(), output_attentions=True, output_hidden_states=True)
    assert [a.shape for a in outputs.attentions] == [(2, 4, 10, 10)] * 2
    assert [h.shape for h in outputs.hidden_states] == [(2, 10, 32)] * 3


@pytest.mark.parametrize("name", ["skywork-moe-tiny", "skywork-13b-tiny"])
def test_pipeline(name):
    generator = pipeline("text-generation", model=str(checkpoint(name)))
    assert isinstance(generator, TextGenerationPipeline)
    [result] = generator("今天下午", max_new_tokens=4, do_sample=False)

    tokenizer = AutoTokenizer.from_pretrained(checkpoint(name))
    model = AutoModelForCausalLM.from_pretrained(checkpoint(name))
    prompt = tokenizer("今天下午", return_tensors="pt")
    new = model.generate(**prompt, max_new_tokens=4, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert result["generated_text"] == "今天下午" + tokenizer.decode(new, skip_special_tokens=True)
