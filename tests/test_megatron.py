"""Megatron-LM checkpoints, written here by rank as that program does, become the Hub's bit for bit."""

from __future__ import annotations

from argparse import Namespace
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tiny import checkpoint, golden, tiny_dense_config, tiny_moe_config
from transformers import AutoModelForCausalLM

from skywork_hf import SkyworkForCausalLM, SkyworkMoeForCausalLM
from skywork_hf.checkpoints.comparison import compare_checkpoints
from skywork_hf.checkpoints.convert import convert_checkpoint


def write_megatron(
    folder: Path, model: Any, /, tree: str, tp: int = 1, stages: tuple[int, ...] = (0,), ep: int = 1, **changes: Any
) -> Path:
    """Write a Hub model as Megatron-LM would.

    Args:
        tree: "legacy" or "core".
        tp: tensor-parallel ranks.
        stages: the number of layers in each pipeline stage; (0,) for all in one.
        ep: expert-parallel ranks.
        changes: of the content of each file.
    """
    config = model.config
    counts = stages if sum(stages) else (config.num_hidden_layers,)
    (folder / "iter_0000007").mkdir(parents=True)
    (folder / "latest_checkpointed_iteration.txt").write_text("7")
    for rank in range(tp):
        for stage in range(len(counts)):
            for expert_rank in range(ep):
                name = f"mp_rank_{rank:02d}" + (f"_{stage:03d}" if len(counts) > 1 else "")
                name += f"_{expert_rank:03d}" if ep > 1 else ""
                tensors = rank_tensors(model, tree, (rank, tp), (stage, counts), (expert_rank, ep))
                content = {
                    "args": arguments(config, tp, len(counts), ep),
                    "checkpoint_version": 3.0,
                    "iteration": 7,
                    "model": legacy_tree(tensors) if tree == "legacy" else OrderedDict(tensors),
                    "optimizer": {"state": [torch.ones(3)]},
                    **changes,
                }
                (folder / "iter_0000007" / name).mkdir()
                torch.save(content, folder / "iter_0000007" / name / "model_optim_rng.pt")
    return folder


def arguments(config: Any, tp: int, pp: int, ep: int) -> Namespace:
    return Namespace(
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.intermediate_size,
        num_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        group_query_attention=config.num_key_value_heads != config.num_attention_heads,
        num_query_groups=config.num_key_value_heads,
        vocab_size=config.vocab_size,
        norm_epsilon=config.rms_norm_eps,
        rotary_base=10000,
        max_position_embeddings=config.max_position_embeddings,
        untie_embeddings_and_output_weights=not config.tie_word_embeddings,
        num_experts=getattr(config, "num_local_experts", None),
        moe_router_topk=getattr(config, "num_experts_per_tok", None),
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        expert_model_parallel_size=ep,
    )


def rank_tensors(model: Any, tree: str, tensor: Any, pipeline: Any, expert: Any) -> dict[str, torch.Tensor]:
    """One rank's tensors under core names (legacy's are made of these)."""
    (rank, tp), (stage, counts), (expert_rank, ep) = tensor, pipeline, expert
    config, weights = model.config, model.state_dict()
    first = sum(counts[:stage])
    out: dict[str, torch.Tensor] = {}

    def padded(name: str) -> torch.Tensor:
        rows = -(-config.vocab_size // (128 * tp)) * 128 * tp
        whole = torch.full((rows, config.hidden_size), 7.0)
        whole[: config.vocab_size] = weights[name]
        return whole.chunk(tp)[rank].clone()

    def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return torch.cat([gate.chunk(tp)[rank], up.chunk(tp)[rank]])

    if stage == 0:
        out["embedding.word_embeddings.weight"] = padded("model.embed_tokens.weight")
    for local in range(counts[stage]):
        hub, mega = f"model.layers.{first + local}.", f"decoder.layers.{local}."
        attention = {part: weights[f"{hub}self_attn.{part}_proj.weight"] for part in "qkvo"}
        keys, head = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
        groups = [attention[part].view(keys, -1, head, config.hidden_size) for part in "qkv"]
        fused = torch.cat(groups, dim=1).chunk(tp)[rank]
        out[f"{mega}self_attention.linear_qkv.weight"] = fused.reshape(-1, config.hidden_size).clone()
        out[f"{mega}self_attention.linear_proj.weight"] = attention["o"].chunk(tp, dim=1)[rank].clone()
        out[f"{mega}self_attention.linear_qkv._extra_state"] = torch.zeros(3, dtype=torch.uint8)
        norms = weights[f"{hub}input_layernorm.weight"], weights[f"{hub}post_attention_layernorm.weight"]
        is_moe = f"{hub}block_sparse_moe.gate.weight" in weights
        inside = tree == "core" and not is_moe  # as Transformer Engine's layers have them
        out[f"{mega}self_attention.linear_qkv.layer_norm_weight" if inside else f"{mega}input_layernorm.weight"] = (
            norms[0]
        )
        out[f"{mega}mlp.linear_fc1.layer_norm_weight" if inside else f"{mega}pre_mlp_layernorm.weight"] = norms[1]
        if not is_moe:
            gate, up, down = (weights[f"{hub}mlp.{part}_proj.weight"] for part in ("gate", "up", "down"))
            out[f"{mega}mlp.linear_fc1.weight"] = swiglu(gate, up)
            out[f"{mega}mlp.linear_fc2.weight"] = down.chunk(tp, dim=1)[rank].clone()
            continue
        out[f"{mega}mlp.router.weight"] = weights[f"{hub}block_sparse_moe.gate.weight"]
        per_rank = config.num_local_experts // ep
        for number in range(per_rank):
            path = f"{hub}block_sparse_moe.experts.{expert_rank * per_rank + number}"
            w1, w2, w3 = (weights[f"{path}.w{n}.weight"] for n in (1, 2, 3))
            out[f"{mega}mlp.experts.local_experts.{number}.linear_fc1.weight"] = swiglu(w1, w3)
            out[f"{mega}mlp.experts.local_experts.{number}.linear_fc2.weight"] = w2.chunk(tp, dim=1)[rank].clone()
    if stage == len(counts) - 1:
        out["decoder.final_layernorm.weight"] = weights["model.norm.weight"]
        if not config.tie_word_embeddings:
            out["output_layer.weight"] = padded("lm_head.weight")
    return out


LEGACY_NAMES = {
    "self_attention.linear_qkv.weight": "self_attention.query_key_value.weight",
    "self_attention.linear_proj.weight": "self_attention.dense.weight",
    "mlp.linear_fc1.weight": "mlp.dense_h_to_4h.weight",
    "mlp.linear_fc2.weight": "mlp.dense_4h_to_h.weight",
    "input_layernorm.weight": "input_norm.weight",
    "pre_mlp_layernorm.weight": "post_attention_norm.weight",
}


def legacy_tree(tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    encoder: dict[str, torch.Tensor] = {}
    tree: dict[str, Any] = {"encoder": encoder}
    for name, tensor in tensors.items():
        if name.startswith("embedding."):
            tree["embedding"] = {"word_embeddings": {"weight": tensor}}
        elif name.startswith("output_layer."):
            tree["output_layer"] = {"weight": tensor}
        elif name == "decoder.final_layernorm.weight":
            encoder["final_norm.weight"] = tensor
        elif not name.endswith("_extra_state"):
            _, layers, number, rest = name.split(".", 3)
            encoder[f"{layers}.{number}.{LEGACY_NAMES[rest]}"] = tensor
    return {"language_model": tree}


def assert_converts(model: Any, folder: Path, **options: Any) -> Path:
    converted = convert_checkpoint(folder / "megatron", folder / "hub", **options)
    written = {k: v for f in converted.glob("*.safetensors") for k, v in load_file(f).items()}
    expected = model.state_dict()
    if model.config.tie_word_embeddings:
        del expected["lm_head.weight"]
    assert written.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(written[name], tensor), name
    return converted


@pytest.mark.parametrize("tree", ["legacy", "core"])
@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("stages", [(0,), (2, 1), (1, 1, 1)])
def test_dense(tree, tp, stages, tmp_path):
    model = SkyworkForCausalLM(tiny_dense_config(num_hidden_layers=3))
    write_megatron(tmp_path / "megatron", model, tree, tp, stages)
    converted = assert_converts(model, tmp_path)
    ids = torch.arange(3, 13).view(1, -1)
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(converted)(ids).logits
        torch.testing.assert_close(logits, model.eval()(ids).logits, atol=1e-5, rtol=1e-5)


@settings(max_examples=15, deadline=None)
@given(
    tp=st.sampled_from([1, 2, 4]),
    stages=st.sampled_from([(0,), (1, 2), (2, 1)]),
    ep=st.sampled_from([1, 2, 4]),
    keys=st.sampled_from([4, 8]),
    tied=st.booleans(),
)
def test_moe_over_all_ranks(tmp_path_factory, tp, stages, ep, keys, tied):
    folder = tmp_path_factory.mktemp("moe")
    config = tiny_moe_config(
        num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=keys, tie_word_embeddings=tied
    )
    model = SkyworkMoeForCausalLM(config)
    write_megatron(folder / "megatron", model, "core", tp, stages, ep)
    assert_converts(model, folder)


DENSE, MOE = "skywork-13b-tiny", "skywork-moe-tiny"


@pytest.mark.parametrize(("name", "tree"), [(DENSE, "legacy"), (DENSE, "core"), (MOE, "core")])
@pytest.mark.parametrize(("tp", "pipeline"), [(1, False), (2, True), (4, True)])
def test_golden_logits(name, tree, tp, pipeline, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(checkpoint(name), dtype=torch.float32)
    stages = (1, model.config.num_hidden_layers - 1) if pipeline else (0,)
    write_megatron(tmp_path / "megatron", model, tree, tp, stages)
    converted = assert_converts(model, tmp_path, config=checkpoint(name) / "config.json")
    rows = golden(name)
    inputs = {key: rows[key] for key in ("input_ids", "attention_mask", "position_ids")}
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(converted)(**inputs).logits
    assert (logits - rows["logits"])[rows["attention_mask"].bool()].abs().max() <= 2e-5
    assert compare_checkpoints(checkpoint(name), tmp_path / "megatron" / "iter_0000007").is_equal


def iteration(folder: Path, **options: Any) -> Path:
    model = SkyworkForCausalLM(tiny_dense_config())
    return write_megatron(folder / "megatron", model, "core", **{"tp": 2, **options}) / "iter_0000007"


def change(file: Path, name: str, value: torch.Tensor | None) -> None:
    with torch.serialization.safe_globals([Namespace]):
        content = torch.load(file, weights_only=True)
    if value is None:
        del content["model"][name]
    else:
        content["model"][name] = value
    torch.save(content, file)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("decoder.layers.1.mlp.linear_fc2.weight", None, "holds no `decoder.layers.1.mlp.linear_fc2.weight`, which"),
        ("decoder.layers.1.mlp.linear_fc2.weight", torch.ones(3, 3), r"is \[3, 3\], and \[32, 24\] in"),
    ],
)
def test_ranks_that_disagree(name, value, message, tmp_path):
    folder = iteration(tmp_path)
    change(folder / "mp_rank_01" / "model_optim_rng.pt", name, value)
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(folder, tmp_path / "hub")


def test_what_is_missing_or_unexpected(tmp_path):
    folder = iteration(tmp_path, tp=1)
    file = folder / "mp_rank_00" / "model_optim_rng.pt"
    change(file, "decoder.layers.0.strange.weight", torch.ones(2))
    with pytest.raises(ValueError, match=r"strange\.weight` in .* is unexpected"):
        convert_checkpoint(folder, tmp_path / "hub")
    change(file, "decoder.layers.0.strange.weight", None)
    change(file, "decoder.final_layernorm.weight", None)
    with pytest.raises(ValueError, match=r"holds nothing for `model\.norm\.weight`"):
        convert_checkpoint(folder, tmp_path / "hub")
    change(file, "decoder.final_layernorm.weight", torch.ones(5))
    with pytest.raises(ValueError, match=r"is \[5\]; the config says \[32\]"):
        convert_checkpoint(folder, tmp_path / "hub")


def test_a_missing_rank(tmp_path):
    folder = iteration(tmp_path, tp=2, stages=(1, 1))
    (folder / "mp_rank_01_000" / "model_optim_rng.pt").unlink()
    with pytest.raises(ValueError, match=r"mp_rank_01_000/model_optim_rng\.pt is not there"):
        convert_checkpoint(folder, tmp_path / "hub")
    (folder / "mp_rank_01_000").rmdir()
    with pytest.raises(ValueError, match="no folder of tensor rank 1, pipeline rank 0"):
        convert_checkpoint(folder, tmp_path / "hub")
    (tmp_path / "megatron" / "latest_checkpointed_iteration.txt").write_text("8")
    with pytest.raises(ValueError, match="names iter_0000008, which is not there"):
        convert_checkpoint(tmp_path / "megatron", tmp_path / "hub")


class Stranger:
    pass


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"checkpoint_version": 1.0}, "is of checkpoint_version 1.0"),
        ({"rng_state": Stranger()}, "Pickles that hold anything but tensors and plain values are refused"),
        ({"model": torch.ones(2)}, "holds no `model`"),
        ({"args": None}, "lack hidden_size, ffn_hidden_size"),
        ({"args": Namespace(hidden_size=32)}, "lack ffn_hidden_size, num_layers"),
    ],
)
def test_files_of_another_kind(changes, message, tmp_path):
    folder = iteration(tmp_path, tp=1, **changes)
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(folder, tmp_path / "hub")
    assert not (tmp_path / "hub").exists()
