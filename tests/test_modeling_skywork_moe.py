"""The MoE models against the golden outputs, against Mixtral, and against a plain loop written here."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import LAYOUTS, checkpoint, golden, tiny_dense_config, tiny_moe_config, tokens
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import AutoModel, AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM
from transformers.masking_utils import create_causal_mask
from transformers.models.mixtral.modeling_mixtral import MixtralDecoderLayer, MixtralExperts

from skywork_hf import SkyworkModel, SkyworkMoeConfig, SkyworkMoeForCausalLM, SkyworkMoeModel, modeling_skywork_moe
from skywork_hf.compat import CACHE
from skywork_hf.modeling_skywork_moe import SkyworkMoeBlock, SkyworkMoeExperts, load_balancing_loss

NAME = "skywork-moe-tiny"
layouts = pytest.mark.parametrize("layout", LAYOUTS)


def with_layout(config: SkyworkMoeConfig, layout: str) -> SkyworkMoeConfig:
    return SkyworkMoeConfig(**{**config.to_dict(), "experts_layout": layout})


def fused_state(
    model: SkyworkMoeForCausalLM | SkyworkMoeModel,
    of: Callable[[torch.Tensor], torch.Tensor] = torch.Tensor.detach,
    prefix: str = "model.layers",
) -> dict[str, torch.Tensor]:
    """The model's parameters, or what `of` takes from them, under the fused layout's names."""
    state = {name: of(p) for name, p in model.named_parameters(remove_duplicate=False)}
    for layer in range(model.config.num_hidden_layers):
        experts = f"{prefix}.{layer}.block_sparse_moe.experts."
        if f"{experts}0.w1.weight" in state:
            numbers = range(model.config.num_experts)
            w1, w2, w3 = ([state.pop(f"{experts}{e}.w{k}.weight") for e in numbers] for k in (1, 2, 3))
            state[f"{experts}gate_up_proj"] = torch.stack([torch.cat(pair) for pair in zip(w1, w3, strict=True)])
            state[f"{experts}down_proj"] = torch.stack(w2)
    return state


def equal_models(config: SkyworkMoeConfig) -> dict[str, SkyworkMoeForCausalLM]:
    """A model in each layout, with the same weights."""
    modular = SkyworkMoeForCausalLM(with_layout(config, "modular")).eval()
    fused = SkyworkMoeForCausalLM(with_layout(config, "fused")).eval()
    fused.load_state_dict(fused_state(modular))
    return {"modular": modular, "fused": fused}


@layouts
@torch.no_grad()
def test_golden_logits_with_flex_attention(layout):
    # The first 10 tokens only: with 24, torch 2.13's flex attention on the CPU reads memory that nothing wrote
    # (transformers' own Llama goes wrong in the same way).
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint(NAME), experts_layout=layout, attn_implementation="flex_attention"
    )
    expected = golden(NAME)
    assert expected["attention_mask"][0].all()
    logits = model(expected["input_ids"][:1, :10]).logits
    torch.testing.assert_close(logits, expected["logits"][:1, :10], atol=2e-5, rtol=0)


@layouts
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@torch.no_grad()
def test_golden_logits_loss_and_router_logits(layout, attention):
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint(NAME), experts_layout=layout, attn_implementation=attention
    )
    assert type(model) is SkyworkMoeForCausalLM
    experts = model.model.layers[0].block_sparse_moe.experts
    assert isinstance(experts, SkyworkMoeExperts if layout == "modular" else MixtralExperts)
    expected = golden(NAME)
    inputs = {key: expected[key] for key in ("input_ids", "attention_mask", "position_ids")}
    outputs = model(**inputs, labels=expected["labels"])
    mask = expected["attention_mask"].bool()
    torch.testing.assert_close(outputs.logits[mask], expected["logits"][mask], atol=2e-5, rtol=0)
    torch.testing.assert_close(outputs.loss, expected["loss"][0], atol=1e-5, rtol=0)
    assert outputs.router_logits is None
    router_logits = torch.stack(model(**inputs, output_router_logits=True).router_logits)
    reference = expected["router_logits_before_normalization"]
    assert router_logits.shape == reference.shape
    real = mask.flatten()
    torch.testing.assert_close(router_logits[:, real], reference[:, real], atol=1e-5, rtol=0)


@layouts
def test_golden_greedy_ids(layout):
    model = AutoModelForCausalLM.from_pretrained(checkpoint(NAME), experts_layout=layout)
    expected = golden(NAME)
    prompt = expected["input_ids"][:1][:, expected["attention_mask"][0].bool()]
    greedy = model.generate(prompt, max_new_tokens=24, eos_token_id=None)
    assert greedy[0, -24:].equal(expected["greedy_single"][0, -24:])


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@torch.no_grad()
def test_golden_logits_with_every_fused_implementation(implementation):
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint(NAME), experts_layout="fused", experts_implementation=implementation
    )
    assert model.config._experts_implementation == implementation
    expected = golden(NAME)
    logits = model(**{key: expected[key] for key in ("input_ids", "attention_mask", "position_ids")}).logits
    mask = expected["attention_mask"].bool()
    torch.testing.assert_close(logits[mask], expected["logits"][mask], atol=2e-5, rtol=0)


def test_an_experts_implementation_is_for_the_fused_layout():
    for arguments in (
        {"experts_implementation": "grouped_mm"},
        {"config": tiny_moe_config(experts_implementation="batched_mm")},
    ):
        with pytest.raises(ValueError, match='load with experts_layout="fused"'):
            AutoModelForCausalLM.from_pretrained(checkpoint(NAME), **arguments)
    model = AutoModelForCausalLM.from_pretrained(checkpoint(NAME), experts_implementation="eager")
    with pytest.raises(ValueError, match='load with experts_layout="fused"'):
        model.set_experts_implementation("grouped_mm")
    assert model.config._experts_implementation == "eager"
    with pytest.raises(ValueError, match="it is a dense model"):
        AutoModelForCausalLM.from_pretrained(checkpoint("skywork-13b-tiny"), experts_implementation="grouped_mm")


@layouts
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("tied", [False, True])
def test_equals_mixtral_without_the_gates_normalisation(layout, kv_heads, tied):
    config = tiny_moe_config(moe_use_logits_norm=False, num_key_value_heads=kv_heads, tie_word_embeddings=tied)
    ours = equal_models(config)[layout]
    shared = {key: value for key, value in config.to_dict().items() if key not in ("model_type", "architectures")}
    mixtral = MixtralForCausalLM(MixtralConfig(**shared, experts_implementation="eager")).eval()
    mixtral.load_state_dict({k.replace("block_sparse_moe", "mlp"): v for k, v in fused_state(ours).items()})

    ids = tokens()
    ours_out, mixtral_out = (m(ids, labels=ids, output_hidden_states=True) for m in (ours, mixtral))
    for ours_hidden, mixtral_hidden in zip(ours_out.hidden_states, mixtral_out.hidden_states, strict=True):
        torch.testing.assert_close(ours_hidden, mixtral_hidden, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours_out.logits, mixtral_out.logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours_out.loss, mixtral_out.loss)

    ours_out.loss.backward()
    mixtral_out.loss.backward()
    gradients = fused_state(ours, of=lambda parameter: parameter.grad)
    for name, parameter in mixtral.named_parameters():
        ours_gradient = gradients[name.replace("mlp", "block_sparse_moe")]
        torch.testing.assert_close(ours_gradient, parameter.grad, atol=1e-5, rtol=1e-4)


def reference_block(block: SkyworkMoeBlock, config: SkyworkMoeConfig, hidden: torch.Tensor) -> torch.Tensor:
    """CHECKPOINTS.md's gate and a loop over tokens, on a modular block."""
    gate = block.gate
    if config.moe_2layer_gate:
        first, second = (dict(gate.named_parameters())[f"{i}.weight"] for i in (0, 2))
        logits = F.linear(torch.tanh(F.linear(hidden, first)), second)
    else:
        logits = F.linear(hidden, gate.weight)
    if config.moe_use_logits_norm:
        logits = logits / (logits.std(dim=-1, keepdim=True, unbiased=True) / config.moe_gate_norm_std)
    probabilities = torch.softmax(logits, dim=-1, dtype=torch.float32)
    scale = 1
    if not config.moe_feature_no_mul_topk and not config.moe_use_mixtral_gating:
        scale = config.num_experts_per_tok
    outputs = []
    for token, chances in zip(hidden, probabilities, strict=True):
        weights, chosen = chances.topk(config.num_experts_per_tok)
        weights = weights / weights.sum()
        parts = []
        for weight, expert in zip(weights, chosen.tolist(), strict=True):
            e = block.experts[expert]
            x = token * scale
            parts.append(weight * (e.w2.weight @ (F.silu(e.w1.weight @ x) * (e.w3.weight @ x))))
        outputs.append(torch.stack(parts).sum(0))
    return torch.stack(outputs)


@settings(deadline=None, max_examples=60)
@given(
    experts=st.integers(2, 9),
    top_k=st.integers(1, 4),
    std=st.floats(0.1, 5),
    flags=st.tuples(*[st.booleans()] * 4),
    rows=st.integers(1, 12),
    seed=st.integers(0, 1000),
)
@torch.no_grad()
def test_every_gate_option_against_a_plain_loop(experts, top_k, std, flags, rows, seed):
    two_layer, norm, mixtral, no_mul = flags
    config = tiny_moe_config(
        num_experts=[experts],
        num_experts_per_tok=min(top_k, experts),
        moe_gate_norm_std=std,
        moe_2layer_gate=two_layer,
        moe_use_logits_norm=norm,
        moe_use_mixtral_gating=mixtral,
        moe_feature_no_mul_topk=no_mul,
        num_hidden_layers=1,
    )
    torch.manual_seed(seed)
    models = equal_models(config)
    hidden = torch.randn(1, rows, config.hidden_size)
    expected = reference_block(models["modular"].model.layers[0].block_sparse_moe, config, hidden[0])
    for model in models.values():
        block = model.model.layers[0].block_sparse_moe
        torch.testing.assert_close(block(hidden)[0], expected, atol=2e-5, rtol=1e-4)


@layouts
@pytest.mark.parametrize("interval", [2, 3])
def test_dense_layers_between_moe_layers(layout, interval):
    config = tiny_moe_config(num_hidden_layers=4, moe_expert_interval=interval, experts_layout=layout)
    model = SkyworkMoeForCausalLM(config).eval()
    names = {name.split(".")[2] for name in model.state_dict() if ".block_sparse_moe.gate." in name}
    assert names == {str(n) for n in range(4) if (n + 1) % interval == 0}
    dense = {name.split(".")[2] for name in model.state_dict() if ".mlp.gate_proj.weight" in name}
    assert dense == {str(n) for n in range(4)} - names
    outputs = model(tokens(), output_router_logits=True, output_hidden_states=True)
    assert len(outputs.router_logits) == len(names)
    assert len(outputs.hidden_states) == 5


def test_equal_router_logits_choose_with_equal_weights_and_finite_gradients():
    # A zero row, such as a padding token's, has no standard deviation to divide by.
    block = SkyworkMoeForCausalLM(tiny_moe_config()).model.layers[0].block_sparse_moe
    hidden = torch.zeros(1, 1, 32, requires_grad=True)
    _, weights, _ = block.gate(hidden[0])
    torch.testing.assert_close(weights, torch.full((1, 2), 0.5))
    block(hidden).sum().backward()
    assert hidden.grad.isfinite().all()
    assert block.gate.weight.grad.isfinite().all()


@pytest.mark.parametrize("norm", [True, False])
def test_the_gate_weighs_by_the_softmax_over_all_experts_made_1(norm):
    """Its weights and their gradients, from the formula: eq. 5-6 over all experts, then the chosen by their sum."""
    config = tiny_moe_config(num_experts=[8], moe_use_logits_norm=norm, moe_gate_norm_std=1.7)
    gate = SkyworkMoeForCausalLM(config).model.layers[0].block_sparse_moe.gate
    hidden, upstream = torch.randn(50, 32), torch.randn(50, 2)
    logits, weights, indices = gate(hidden)
    (upstream * weights).sum().backward()
    found = gate.weight.grad.clone()
    gate.weight.grad = None

    z = (hidden @ gate.weight.T).double()
    if norm:
        z = (z - z.mean(-1, keepdim=True)) / z.std(-1, keepdim=True) * 1.7
    wanted, chosen = torch.softmax(z, -1).topk(2)
    wanted = wanted / wanted.sum(-1, keepdim=True)
    (upstream * wanted).sum().backward()
    assert torch.equal(indices, chosen)
    assert torch.equal(logits, F.linear(hidden, gate.weight))
    torch.testing.assert_close(weights.double(), wanted, atol=1e-6, rtol=0)
    torch.testing.assert_close(found, gate.weight.grad, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_whether_weights_are_shared_is_asked_of_all_experts_once_and_of_one_each_time(monkeypatch):
    experts = SkyworkMoeForCausalLM(tiny_moe_config()).model.layers[0].block_sparse_moe.experts
    given = torch.randn(1, 32), torch.tensor([[0, 2]]), torch.tensor([[0.5, 0.5]])
    asked: list[object] = []
    is_sharded, ran = modeling_skywork_moe.is_sharded, []
    monkeypatch.setattr(modeling_skywork_moe, "_has_processes", lambda: True)
    monkeypatch.setattr(modeling_skywork_moe, "is_sharded", lambda part: asked.append(part) or is_sharded(part))
    for number, expert in enumerate(experts):
        expert.register_forward_hook(lambda *_, number=number: ran.append(number))
    wanted = experts(*given)
    experts(*given)
    assert asked == [experts, experts[0], experts[0]]
    assert set(ran) == {0, 2}
    for parameter in experts.parameters():  # as ZeRO-3 does, whenever it is begun
        parameter.ds_id = 0
    ran.clear()
    torch.testing.assert_close(experts(*given), wanted)
    assert ran == [0, 1, 2, 3]


@pytest.mark.parametrize("norm", [True, False])
def test_load_balancing_loss_is_eq_4(norm):
    config = tiny_moe_config(moe_use_logits_norm=norm, moe_gate_norm_std=1.5)
    logits = tuple(torch.randn(6, 4, requires_grad=True) for _ in range(2))
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    losses = load_balancing_loss(logits, config, mask)
    for loss, layer in zip(losses, logits, strict=True):
        z = layer / (layer.std(-1, keepdim=True) / 1.5) if norm else layer
        g = torch.softmax(z, -1)[mask.flatten().bool()]
        torch.testing.assert_close(loss, ((1 / 4 - g.mean(0)) ** 2).sum())
    losses.sum().backward()
    assert logits[0].grad[0].abs().sum() == 0  # the padding token does not count
    assert logits[0].grad[1:].abs().sum() > 0


@torch.compiler.set_stance("force_eager")  # transformers compiles what makes masks
def test_a_block_mask_hides_padding_from_itself_and_in_packed_rows_there_is_none():
    config = tiny_moe_config(attn_implementation="flex_attention")
    logits, mask = (torch.randn(16, 4),), torch.ones(2, 8)
    mask[0, :3] = 0
    packed = {"attention_mask": None, "position_ids": torch.arange(8).remainder(5).expand(2, 8)}
    for how in ({"attention_mask": mask}, {"attention_mask": mask.flip(1)}, packed):
        blocks = create_causal_mask(config=config, inputs_embeds=torch.zeros(2, 8, 32), past_key_values=None, **how)
        assert isinstance(blocks, BlockMask)
        wanted = load_balancing_loss(logits, config, how["attention_mask"])
        torch.testing.assert_close(load_balancing_loss(logits, config, blocks), wanted)
    of_all_rows = create_block_mask(lambda row, head, query, key: query >= key, None, None, 8, 8, device="cpu")
    wanted = load_balancing_loss(logits, config)
    torch.testing.assert_close(load_balancing_loss(logits, config, of_all_rows), wanted)


@layouts
@pytest.mark.parametrize("gradients", [False, True])
def test_no_tokens_are_computed_too(layout, gradients):
    block = SkyworkMoeBlock(tiny_moe_config(experts_layout=layout, experts_implementation="eager"))
    with torch.set_grad_enabled(gradients):
        assert block(torch.zeros(2, 0, 32)).shape == (2, 0, 32)


@layouts
def test_auxiliary_loss_joins_the_loss(layout):
    config = tiny_moe_config(experts_layout=layout, router_aux_loss_coef=0.5)
    model = SkyworkMoeForCausalLM(config)
    ids = tokens()
    plain, with_aux = model(ids, labels=ids), model(ids, labels=ids, output_router_logits=True)
    expected = load_balancing_loss(with_aux.router_logits, config).sum()
    torch.testing.assert_close(with_aux.aux_loss, expected)
    torch.testing.assert_close(with_aux.loss, plain.loss + 0.5 * expected)
    assert plain.aux_loss is None
    with_aux.loss.backward()
    assert model.model.layers[0].block_sparse_moe.gate.weight.grad.abs().sum() > 0


@torch.no_grad()
def test_auxiliary_loss_while_decoding_counts_the_new_tokens_only():
    model = SkyworkMoeForCausalLM(tiny_moe_config()).eval()
    ids = tokens(2, 6)
    mask = torch.ones_like(ids)
    cache = model(ids[:, :4], attention_mask=mask[:, :4], use_cache=True)[CACHE]
    outputs = model(ids[:, 4:], attention_mask=mask, output_router_logits=True, **{CACHE: cache})
    torch.testing.assert_close(outputs.aux_loss, load_balancing_loss(outputs.router_logits, model.config).sum())


@layouts
@torch.no_grad()
def test_bfloat16_stays_bfloat16_and_near_float32(layout):
    config = tiny_moe_config()
    model = equal_models(config)[layout]
    ids = tokens()
    expected = model(ids).logits
    logits = model.to(torch.bfloat16)(ids).logits
    assert logits.dtype == torch.bfloat16
    relative = (logits.float() - expected).norm() / expected.norm()
    assert relative < 0.1


@pytest.mark.parametrize("kind", [None, "linear", "dynamic", "ntk"])
@pytest.mark.parametrize("length", [16, 100])
def test_rope_is_that_of_the_dense_model(kind, length):
    scaling = None if kind is None else {"type": kind, "factor": 3.0}
    positions = torch.arange(length)[None]
    dense = SkyworkModel(tiny_dense_config(rope_scaling=scaling)).rotary_emb(torch.zeros(1), positions)
    moe = SkyworkMoeModel(tiny_moe_config(rope_scaling=scaling)).rotary_emb(torch.zeros(1), positions)
    for ours, expected in zip(moe, dense, strict=True):
        assert ours.equal(expected)


@layouts
def test_building_a_model_builds_no_mixtral_on_the_way(layout, monkeypatch):
    def refuse(*_) -> None:
        pytest.fail("a Mixtral layer was built, and with it a second set of experts")

    monkeypatch.setattr(MixtralDecoderLayer, "__init__", refuse)
    SkyworkMoeForCausalLM(tiny_moe_config(experts_layout=layout))


@layouts
def test_a_base_models_checkpoint_fills_the_whole_model_but_the_head(layout, tmp_path):
    base = SkyworkMoeModel(tiny_moe_config())
    base.save_pretrained(tmp_path)
    model, info = SkyworkMoeForCausalLM.from_pretrained(tmp_path, experts_layout=layout, output_loading_info=True)
    assert info["missing_keys"] == {"lm_head.weight"}
    expected = fused_state(base, prefix="layers") if layout == "fused" else base.state_dict()
    for name, tensor in model.model.state_dict().items():
        assert tensor.equal(expected[name]), name


def test_base_model_and_head_share_names():
    config = tiny_moe_config()
    base = AutoModel.from_config(config)
    assert type(base) is SkyworkMoeModel
    head = {name.removeprefix("model.") for name in SkyworkMoeForCausalLM(config).state_dict()}
    assert set(base.state_dict()) == head - {"lm_head.weight"}


def test_a_fresh_model_is_initialised():
    model = SkyworkMoeForCausalLM(tiny_moe_config(moe_2layer_gate=True, initializer_range=0.02))
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and "embed" not in name:
            assert 0.01 < parameter.std() < 0.03, name
