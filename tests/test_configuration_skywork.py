"""Released configs in, clean configs out; what would compute something else is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import checkpoint, tiny_dense_config, tiny_moe_config
from transformers import AutoConfig

from skywork_hf import SkyworkConfig, SkyworkMoeConfig

ALL_FIXTURES = {
    "skywork-13b-tiny": SkyworkConfig,
    "skywork-moe-tiny": SkyworkMoeConfig,
    "skywork-moe-tiny-fp8": SkyworkMoeConfig,
    "skywork-moe-tiny-training-layout": SkyworkMoeConfig,
}


def released(name: str, **changes) -> dict:
    return {**json.loads((checkpoint(name) / "config.json").read_text()), **changes}


def write(folder: Path, config: dict) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def facts(config) -> dict:
    """All a config says, but for where it was read from."""
    return {key: value for key, value in config.to_dict().items() if key != "_name_or_path"}


@pytest.mark.parametrize(("name", "config_class"), ALL_FIXTURES.items())
def test_released_config_loads_and_comes_back_equal(name, config_class, tmp_path):
    config = AutoConfig.from_pretrained(checkpoint(name))
    assert type(config) is config_class
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert type(again) is config_class
    assert facts(again) == facts(config)
    assert again == AutoConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize(("name", "config_class"), ALL_FIXTURES.items())
def test_written_config_is_clean(name, config_class, tmp_path):
    AutoConfig.from_pretrained(checkpoint(name)).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["model_type"] == config_class.model_type
    assert not written.keys() & {"auto_map", "torch_dtype", "rope_scaling", "rope_theta", "num_experts"}
    assert written["rope_parameters"] == {"rope_type": "default", "rope_theta": 10000.0}
    assert written["dtype"] in ("float32", "bfloat16")
    assert written.get("pretraining_tp", 1) == 1


@pytest.mark.parametrize("model_type", ["skywork", "skywork_moe"])
@pytest.mark.parametrize("count", [{"num_experts": [16]}, {"num_experts": 16}, {"num_local_experts": 16}])
@pytest.mark.parametrize("architecture", ["SkyworkForCausalLM", "SkyworkMoeForCausalLM"])
def test_moe_is_told_by_its_expert_fields(model_type, count, architecture, tmp_path):
    config = released("skywork-moe-tiny", model_type=model_type, architectures=[architecture])
    del config["num_experts"]
    config = AutoConfig.from_pretrained(write(tmp_path, {**config, **count}))
    assert type(config) is SkyworkMoeConfig
    assert (config.num_local_experts, config.num_experts, config.num_experts_per_tok) == (16, 16, 2)
    assert config.model_type == "skywork_moe"


@pytest.mark.parametrize("model_type", ["skywork", "skywork_moe"])
def test_one_expert_is_a_dense_model(model_type, tmp_path):
    config = released("skywork-13b-tiny", model_type=model_type, num_experts=[1], moe_expert_interval=1)
    config = AutoConfig.from_pretrained(write(tmp_path, config))
    assert type(config) is SkyworkConfig
    assert not any("experts" in key or "moe_" in key for key in config.to_dict())


@pytest.mark.parametrize("config_class", [SkyworkConfig, SkyworkMoeConfig])
def test_both_classes_load_either_family_without_a_word(config_class, caplog):
    for name, expected in ALL_FIXTURES.items():
        if expected is config_class:
            assert type(config_class.from_pretrained(checkpoint(name))) is expected
    assert not caplog.records


@pytest.mark.parametrize("type_key", ["type", "rope_type"])
@pytest.mark.parametrize("name", ["skywork-13b-tiny", "skywork-moe-tiny"])
def test_rope_scaling(name, type_key, tmp_path):
    def rope(kind: str) -> dict:
        config = released(name, rope_scaling={type_key: kind, "factor": 4.0}, rope_theta=500.0)
        return AutoConfig.from_pretrained(write(tmp_path, config)).rope_parameters

    assert rope("linear") == {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}
    assert rope("dynamic") == {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 500.0}
    assert rope("ntk") == {"rope_type": "default", "rope_theta": 2000.0}


def test_ntk_is_multiplied_once_only(tmp_path):
    config = tiny_dense_config(rope_scaling={"type": "ntk", "factor": 2.0})
    config.save_pretrained(tmp_path)
    again = SkyworkConfig.from_pretrained(tmp_path)
    again.standardize_rope_params()
    assert again.rope_parameters == {"rope_type": "default", "rope_theta": 20000.0}


def test_the_users_own_dict_is_left_alone():
    scaling = {"type": "ntk", "factor": 2.0}
    tiny_dense_config(rope_scaling=scaling)
    tiny_moe_config(rope_parameters=scaling)
    assert scaling == {"type": "ntk", "factor": 2.0}


def test_keywords_override_the_file():
    path = checkpoint("skywork-moe-tiny")
    config, unused = AutoConfig.from_pretrained(
        path,
        num_experts=[8],
        num_experts_per_tok=3,
        experts_layout="fused",
        rope_scaling={"type": "ntk", "factor": 2.0},
        foo=1,
        return_unused_kwargs=True,
    )
    assert (config.num_local_experts, config.num_experts_per_tok, config.experts_layout) == (8, 3, "fused")
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 20000.0}
    assert unused == {"foo": 1}


def test_defaults_are_those_of_the_released_models():
    dense, moe = SkyworkConfig(), SkyworkMoeConfig()
    for config, positions in ((dense, 4096), (moe, 8192)):
        assert (config.hidden_size, config.intermediate_size, config.num_hidden_layers) == (4608, 12288, 52)
        assert (config.num_attention_heads, config.num_key_value_heads) == (36, 36)
        assert (config.vocab_size, config.max_position_embeddings, config.rms_norm_eps) == (65519, positions, 1e-6)
        assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (0, 1, 2)
        assert config.rope_parameters == {"rope_type": "default", "rope_theta": 10000.0}
        assert not config.tie_word_embeddings
    assert (moe.num_local_experts, moe.num_experts_per_tok, moe.experts_layout) == (16, 2, "modular")


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"num_experts": [16, 8]}, "num_experts"),
        ({"num_experts": []}, "num_experts"),
        ({"num_experts": ["16"]}, "num_experts"),
        ({"num_experts": 1}, "num_experts"),
        ({"num_experts": 0}, "num_experts"),
        ({"moe_gate_norm_std": 0.0}, "moe_gate_norm_std"),
        ({"moe_gate_norm_std": -1.0}, "moe_gate_norm_std"),
        ({"num_experts_per_tok": 17, "num_experts": 16}, "num_experts_per_tok"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok"),
        ({"moe_expert_interval": 0}, "moe_expert_interval"),
        ({"experts_layout": "sparse"}, "experts_layout"),
        ({"router_jitter_noise": 0.1}, "router_jitter_noise"),
    ],
)
def test_moe_values_that_would_compute_something_else_are_refused(changes, field):
    with pytest.raises(ValueError, match=f"`{field}`"):
        SkyworkMoeConfig(**{"hidden_size": 32, "num_attention_heads": 4, **changes})


@pytest.mark.parametrize("changes", [{"num_experts": [16, 8]}, {"num_experts": [16], "num_local_experts": 8}])
def test_contradicting_expert_counts_are_refused_through_auto_config(changes, tmp_path):
    with pytest.raises(ValueError, match=r"`num_experts`=\[16"):
        AutoConfig.from_pretrained(write(tmp_path, released("skywork-moe-tiny", **changes)))


@pytest.mark.parametrize("make", [tiny_dense_config, tiny_moe_config])
@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"num_attention_heads": 5}, "num_attention_heads"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"rope_scaling": {"type": "ntk-by-parts", "factor": 2.0}}, "rope_type"),
        ({"rope_parameters": {"rope_type": "su", "factor": 2.0}}, "rope_type"),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "factor"),
        ({"rope_scaling": {"type": "ntk"}}, "factor"),
        ({"rope_scaling": {"type": "dynamic", "factor": "2"}}, "factor"),
    ],
)
def test_values_that_would_compute_something_else_are_refused(make, changes, field):
    with pytest.raises(ValueError, match=f"`{field}`"):
        make(**changes)


@given(
    heads=st.sampled_from([1, 2, 4]),
    experts=st.integers(2, 64),
    interval=st.integers(1, 4),
    std=st.floats(0.01, 10),
    flags=st.tuples(*[st.booleans()] * 5),
    layout=st.sampled_from(["modular", "fused"]),
    rope=st.sampled_from([None, {"type": "linear", "factor": 2}, {"type": "dynamic", "factor": 1.5}]),
)
def test_any_moe_config_loads_back_equal(tmp_path_factory, heads, experts, interval, std, flags, layout, rope):
    two_layer, norm, mixtral, no_mul, tied = flags
    config = SkyworkMoeConfig(
        hidden_size=8 * heads,
        num_attention_heads=heads,
        num_experts=[experts],
        moe_expert_interval=interval,
        moe_gate_norm_std=std,
        moe_2layer_gate=two_layer,
        moe_use_logits_norm=norm,
        moe_use_mixtral_gating=mixtral,
        moe_feature_no_mul_topk=no_mul,
        tie_word_embeddings=tied,
        experts_layout=layout,
        rope_scaling=rope,
    )
    folder = tmp_path_factory.mktemp("config")
    config.save_pretrained(folder)
    assert facts(AutoConfig.from_pretrained(folder)) == facts(config)
