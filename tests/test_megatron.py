"""Megatron-LM checkpoints, written here from Hub tensors, give these back bit for bit; broken ones are refused."""

from __future__ import annotations

import argparse
import enum
import io
import json
import random
import re
import shutil
import signal
import sys
import types
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tiny import checkpoint, golden, tiny_dense_config, tiny_moe_config, tokens
from transformers.testing_utils import CaptureLogger

from skywork_hf import SkyworkConfig, SkyworkForCausalLM, SkyworkMoeConfig, SkyworkMoeForCausalLM, readers
from skywork_hf.checkpoints.adapters import merge_adapter
from skywork_hf.checkpoints.convert import MANIFEST, convert_checkpoint
from skywork_hf.checkpoints.megatron import is_megatron, logger, read_megatron
from skywork_hf.readers import MEGATRON_GLOBALS, Reader, load_pickle

GOLDEN = {"skywork-13b-tiny": SkyworkForCausalLM, "skywork-moe-tiny": SkyworkMoeForCausalLM}
TOLERANCE = 2e-5
CORE, LEGACY = "core", "legacy"


def read_whole(file: Path) -> Any:
    """A pickle's content in memory, not mapped: these tests write the file again."""
    with torch.serialization.safe_globals([*MEGATRON_GLOBALS, Stranger]):
        return torch.load(file, weights_only=True)


# --- the writer: what Megatron-LM's ranks would have saved


def hub_tensors(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("model*.safetensors")):
        tensors.update(load_file(file))
    for file in sorted(folder.glob("pytorch_model*.bin")):
        tensors.update(torch.load(file, weights_only=True))
    return {name: tensor for name, tensor in tensors.items() if not name.endswith("inv_freq")}


def slice_rows(tensor: torch.Tensor, tp: int, rank: int) -> torch.Tensor:
    step = tensor.shape[0] // tp
    return tensor[rank * step : (rank + 1) * step].clone()


def slice_columns(tensor: torch.Tensor, tp: int, rank: int) -> torch.Tensor:
    step = tensor.shape[1] // tp
    return tensor[:, rank * step : (rank + 1) * step].clone()


def pad_vocabulary(tensor: torch.Tensor, tp: int) -> torch.Tensor:
    divisor = 128 * tp
    rows = (tensor.shape[0] + divisor - 1) // divisor * divisor
    return torch.cat([tensor, torch.full((rows - tensor.shape[0], tensor.shape[1]), 7.0, dtype=tensor.dtype)])


def interleave(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """One key/value head after the other: its queries, its key, its value."""
    rows = []
    size = k.shape[0] // kv_heads
    queries = q.shape[0] // kv_heads
    for head in range(kv_heads):
        rows.append(q[head * queries : (head + 1) * queries])
        rows.append(k[head * size : (head + 1) * size])
        rows.append(v[head * size : (head + 1) * size])
    return torch.cat(rows)


class Writer:
    """Writes a Hub state dict as the ranks of a Megatron-LM run.

    Args:
        stages: the number of layers in each pipeline stage.
        fused_norms: put norms into the linears after them, as Megatron-Core does with Transformer Engine.
        args: arguments of the run that replace or join the usual ones; None removes one.
    """

    def __init__(
        self,
        tensors: dict[str, torch.Tensor],
        config: Any,
        layout: str = CORE,
        tp: int = 1,
        stages: list[int] | None = None,
        ep: int = 1,
        fused_norms: bool = True,
        encoder: str = "encoder",
        args: dict[str, Any] | None = None,
        version: float | None = 3.0,
    ) -> None:
        self.tensors, self.config, self.layout, self.tp, self.ep = tensors, config, layout, tp, ep
        self.stages = stages or [config.num_hidden_layers]
        self.fused_norms, self.encoder, self.version = fused_norms, encoder, version
        self.args = {**self._usual_args(), **(args or {})}

    def _usual_args(self) -> dict[str, Any]:
        config = self.config
        usual = {
            "tensor_model_parallel_size": self.tp,
            "pipeline_model_parallel_size": len(self.stages),
            "hidden_size": config.hidden_size,
            "ffn_hidden_size": config.intermediate_size,
            "num_layers": config.num_hidden_layers,
            "num_attention_heads": config.num_attention_heads,
            "group_query_attention": config.num_key_value_heads != config.num_attention_heads,
            "num_query_groups": config.num_key_value_heads,
            "norm_epsilon": config.rms_norm_eps,
            "rotary_base": int(config.rope_parameters["rope_theta"]),
            "max_position_embeddings": config.max_position_embeddings,
            "vocab_size": config.vocab_size,
            "untie_embeddings_and_output_weights": not config.tie_word_embeddings,
            "params_dtype": torch.float32,
            "position_embedding_type": "rope",
            "apply_layernorm_1p": False,
            "normalization": "RMSNorm",
            "swiglu": True,
        }
        if isinstance(config, SkyworkMoeConfig):
            usual |= {"num_experts": config.num_local_experts, "moe_router_topk": config.num_experts_per_tok}
            usual["expert_model_parallel_size"] = self.ep
        return usual

    def write(self, run: Path, iteration: int | str = 40) -> Path:
        run.mkdir(parents=True, exist_ok=True)
        name = iteration if isinstance(iteration, str) else f"iter_{iteration:07d}"
        (run / "latest_checkpointed_iteration.txt").write_text(str(iteration))
        for tp in range(self.tp):
            for pp in range(len(self.stages)):
                for ep in range(self.ep):
                    folder = run / name / self.folder(tp, pp, ep)
                    folder.mkdir(parents=True)
                    torch.save(self.content(tp, pp, ep, iteration), folder / "model_optim_rng.pt")
        return run / name

    def folder(self, tp: int, pp: int, ep: int) -> str:
        parts = [f"mp_rank_{tp:02d}"]
        if len(self.stages) > 1:
            parts.append(f"{pp:03d}")
        if self.ep > 1:
            parts.append(f"{ep:03d}")
        return "_".join(parts)

    def content(self, tp: int, pp: int, ep: int, iteration: Any) -> dict[str, Any]:
        model = self.legacy(tp, pp) if self.layout == LEGACY else self.core(tp, pp, ep)
        args = argparse.Namespace(**{name: value for name, value in self.args.items() if value is not None})
        optimizer = {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-4, "betas": (0.9, 0.95)}]}
        scheduler = {"max_lr": 1e-4, "num_steps": 40}
        content = {"args": args, "iteration": iteration, "model": model, "optimizer": optimizer}
        content["opt_param_scheduler"] = scheduler
        if self.version is not None:
            content["checkpoint_version"] = self.version
        return content

    def layers(self, pp: int) -> range:
        first = sum(self.stages[:pp])
        return range(first, first + self.stages[pp])

    def vocabulary(self, name: str, tp: int) -> torch.Tensor:
        return slice_rows(pad_vocabulary(self.tensors[name], self.tp), self.tp, tp)

    def qkv(self, layer: int, tp: int) -> torch.Tensor:
        q, k, v = (self.tensors[f"model.layers.{layer}.self_attn.{part}_proj.weight"] for part in "qkv")
        return slice_rows(interleave(q, k, v, self.config.num_key_value_heads), self.tp, tp)

    def columns(self, name: str, tp: int) -> torch.Tensor:
        return slice_columns(self.tensors[name], self.tp, tp)

    def gate_up(self, gate: str, up: str, tp: int) -> torch.Tensor:
        return torch.cat([slice_rows(self.tensors[name], self.tp, tp) for name in (gate, up)])

    def legacy(self, tp: int, pp: int) -> dict[str, Any]:
        encoder: dict[str, torch.Tensor] = OrderedDict()
        newer = self.encoder == "encoder"
        for local, layer in enumerate(self.layers(pp)):
            hub, at = f"model.layers.{layer}", f"layers.{local}"
            attention = "self_attention" if newer else "attention"
            encoder[f"{at}.{'input_norm' if newer else 'input_layernorm'}.weight"] = self.tensors[
                f"{hub}.input_layernorm.weight"
            ]
            encoder[f"{at}.{attention}.query_key_value.weight"] = self.qkv(layer, tp)
            encoder[f"{at}.{attention}.dense.weight"] = self.columns(f"{hub}.self_attn.o_proj.weight", tp)
            encoder[f"{at}.{'post_attention_norm' if newer else 'post_attention_layernorm'}.weight"] = self.tensors[
                f"{hub}.post_attention_layernorm.weight"
            ]
            gate_up = self.gate_up(f"{hub}.mlp.gate_proj.weight", f"{hub}.mlp.up_proj.weight", tp)
            encoder[f"{at}.mlp.dense_h_to_4h.weight"] = gate_up
            encoder[f"{at}.mlp.dense_4h_to_h.weight"] = self.columns(f"{hub}.mlp.down_proj.weight", tp)
        model: dict[str, Any] = {"language_model": {self.encoder: encoder}}
        last, tied = pp == len(self.stages) - 1, self.config.tie_word_embeddings
        if pp == 0:
            table = self.vocabulary("model.embed_tokens.weight", tp)
            model["language_model"]["embedding"] = {"word_embeddings": {"weight": table}}
        if last:
            encoder["final_norm.weight" if newer else "final_layernorm.weight"] = self.tensors["model.norm.weight"]
        if last and not tied:
            model["language_model"]["output_layer"] = {"weight": self.vocabulary("lm_head.weight", tp)}
        if last and tied and pp > 0:
            model["word_embeddings_for_head"] = {"weight": self.vocabulary("model.embed_tokens.weight", tp)}
        return model

    def core(self, tp: int, pp: int, ep: int) -> dict[str, Any]:
        model: dict[str, Any] = OrderedDict()
        if pp == 0:
            model["embedding.word_embeddings.weight"] = self.vocabulary("model.embed_tokens.weight", tp)
            model["rotary_pos_emb.inv_freq"] = torch.ones(2)
        for local, layer in enumerate(self.layers(pp)):
            self.core_layer(model, f"decoder.layers.{local}", layer, tp, ep)
        if pp == len(self.stages) - 1:
            model["decoder.final_layernorm.weight"] = self.tensors["model.norm.weight"]
            model["decoder.final_layernorm._extra_state"] = None
            if not self.config.tie_word_embeddings:
                model["output_layer.weight"] = self.vocabulary("lm_head.weight", tp)
            elif pp > 0:
                model["output_layer.weight"] = self.vocabulary("model.embed_tokens.weight", tp)
        return model

    def core_layer(self, model: dict[str, Any], at: str, layer: int, tp: int, ep: int) -> None:
        hub = f"model.layers.{layer}"
        moe = f"{hub}.block_sparse_moe.gate.weight" in self.tensors
        norm = "self_attention.linear_qkv.layer_norm_weight" if self.fused_norms else "input_layernorm.weight"
        model[f"{at}.{norm}"] = self.tensors[f"{hub}.input_layernorm.weight"]
        model[f"{at}.self_attention.linear_qkv.weight"] = self.qkv(layer, tp)
        model[f"{at}.self_attention.linear_qkv._extra_state"] = torch.zeros(5, dtype=torch.uint8)
        model[f"{at}.self_attention.linear_proj.weight"] = self.columns(f"{hub}.self_attn.o_proj.weight", tp)
        norm = "mlp.linear_fc1.layer_norm_weight" if self.fused_norms and not moe else "pre_mlp_layernorm.weight"
        model[f"{at}.{norm}"] = self.tensors[f"{hub}.post_attention_layernorm.weight"]
        if moe:
            self.core_experts(model, f"{at}.mlp", f"{hub}.block_sparse_moe", tp, ep)
            return
        gate_up = self.gate_up(f"{hub}.mlp.gate_proj.weight", f"{hub}.mlp.up_proj.weight", tp)
        model[f"{at}.mlp.linear_fc1.weight"] = gate_up
        model[f"{at}.mlp.linear_fc2.weight"] = self.columns(f"{hub}.mlp.down_proj.weight", tp)

    def core_experts(self, model: dict[str, Any], at: str, hub: str, tp: int, ep: int) -> None:
        model[f"{at}.router.weight"] = self.tensors[f"{hub}.gate.weight"]
        count = self.config.num_local_experts // self.ep
        for local in range(count):
            expert, mine = f"{hub}.experts.{ep * count + local}", f"{at}.experts.local_experts.{local}"
            model[f"{mine}.linear_fc1.weight"] = self.gate_up(f"{expert}.w1.weight", f"{expert}.w3.weight", tp)
            model[f"{mine}.linear_fc2.weight"] = self.columns(f"{expert}.w2.weight", tp)


# --- reading it back


def read_values(source: Any) -> dict[str, torch.Tensor]:
    reader = Reader()
    values = {}
    for recipe in source.recipes:
        made = recipe.values(reader.read(recipe.sources))
        for product, value in zip(recipe.products, made, strict=True):
            assert (product.dtype, product.shape) == (value.dtype, tuple(value.shape)), product.name
            values[product.name] = value
    return values


def assert_bits(source: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    values = read_values(source)
    assert values.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert values[name].dtype == tensor.dtype, name
        assert torch.equal(values[name], tensor), name
    return values


def dense(**changes: Any) -> tuple[Any, dict[str, torch.Tensor], Any]:
    return _random(SkyworkForCausalLM, tiny_dense_config(**changes))


def moe(**changes: Any) -> tuple[Any, dict[str, torch.Tensor], Any]:
    return _random(SkyworkMoeForCausalLM, tiny_moe_config(**changes))


def _random(model_class: Any, config: Any) -> tuple[Any, dict[str, torch.Tensor], Any]:
    """A config, its Hub tensors and the model; norms are random too, so that two of them cannot be swapped."""
    model = model_class(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    return config, tensors, model


@torch.no_grad()
def assert_golden(name: str, config: Any, values: dict[str, torch.Tensor]) -> None:
    rows = golden(name)
    model = GOLDEN[name](config).eval()
    model.load_state_dict(values)
    inputs = {key: rows[key] for key in ("input_ids", "attention_mask", "position_ids")}
    difference = (model(**inputs).logits - rows["logits"])[rows["attention_mask"].bool()].abs().max().item()
    assert difference <= TOLERANCE


@torch.no_grad()
def assert_same_logits(model: Any, config: Any, values: dict[str, torch.Tensor]) -> None:
    again = type(model)(config).eval()
    again.load_state_dict(values, strict=not config.tie_word_embeddings)
    ids = tokens()
    torch.testing.assert_close(again(ids).logits, model(ids).logits, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("config_from", ["args", "config.json"])
@pytest.mark.parametrize(("stages", "tp"), [([3], 1), ([3], 4), ([2, 1], 2), ([1, 2], 4), ([1, 1, 1], 2)])
@pytest.mark.parametrize("layout", [LEGACY, CORE])
def test_golden_dense(layout, tp, stages, config_from, tmp_path):
    name = "skywork-13b-tiny"
    tensors, config = hub_tensors(checkpoint(name)), SkyworkConfig.from_pretrained(checkpoint(name))
    Writer(tensors, config, layout, tp, stages).write(tmp_path)
    source = read_megatron(tmp_path, config if config_from == "config.json" else None)
    assert source.layout == "megatron"
    assert source.folder == tmp_path
    assert_golden(name, source.config, assert_bits(source, tensors))


@pytest.mark.parametrize("config_from", ["args", "config.json"])
@pytest.mark.parametrize(
    ("tp", "stages", "ep"), [(1, [2], 1), (2, [2], 4), (4, [1, 1], 2), (1, [1, 1], 4), (2, [2], 1)]
)
def test_golden_moe(tp, stages, ep, config_from, tmp_path):
    name = "skywork-moe-tiny"
    tensors, config = hub_tensors(checkpoint(name)), SkyworkMoeConfig.from_pretrained(checkpoint(name))
    Writer(tensors, config, CORE, tp, stages, ep).write(tmp_path)
    source = read_megatron(tmp_path, config if config_from == "config.json" else None)
    assert type(source.config) is SkyworkMoeConfig
    assert_golden(name, source.config, assert_bits(source, tensors))


@settings(max_examples=40, deadline=None)
@given(
    layout=st.sampled_from([LEGACY, CORE]),
    tp=st.sampled_from([1, 2, 4]),
    stages=st.lists(st.integers(0, 3), min_size=1, max_size=3).filter(lambda stages: sum(stages) > 0),
    heads=st.sampled_from([4, 8]),
    kv_heads=st.sampled_from([1, 2, 4, 8]),
    tied=st.booleans(),
    fused_norms=st.booleans(),
    encoder=st.sampled_from(["encoder", "transformer"]),
)
def test_dense_of_any_shape(tmp_path_factory, layout, tp, stages, heads, kv_heads, tied, fused_norms, encoder):
    assume(heads % kv_heads == 0 and kv_heads % tp == 0)
    config, tensors, model = dense(
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        num_hidden_layers=sum(stages),
        tie_word_embeddings=tied,
    )
    run = tmp_path_factory.mktemp("run")
    Writer(tensors, config, layout, tp, stages, fused_norms=fused_norms, encoder=encoder).write(run)
    source = read_megatron(run)
    assert source.config.tie_word_embeddings == tied
    assert source.config.num_key_value_heads == kv_heads
    assert_same_logits(model, source.config, assert_bits(source, tensors))


@settings(max_examples=25, deadline=None)
@given(
    tp=st.sampled_from([1, 2]),
    stages=st.lists(st.integers(1, 2), min_size=1, max_size=3),
    ep=st.sampled_from([1, 2, 4]),
    local_experts=st.integers(1, 3),
    interval=st.integers(1, 2),
    kv_heads=st.sampled_from([2, 4]),
    fused_norms=st.booleans(),
)
def test_moe_of_any_shape(tmp_path_factory, tp, stages, ep, local_experts, interval, kv_heads, fused_norms):
    assume(ep * local_experts > 1 and sum(stages) >= interval)
    config, tensors, model = moe(
        num_experts=ep * local_experts,
        num_key_value_heads=kv_heads,
        num_hidden_layers=sum(stages),
        moe_expert_interval=interval,
    )
    run = tmp_path_factory.mktemp("run")
    Writer(tensors, config, CORE, tp, stages, ep, fused_norms=fused_norms).write(run)
    source = read_megatron(run)
    assert source.config.moe_expert_interval == interval
    assert_same_logits(model, source.config, assert_bits(source, tensors))


def test_recipes_are_in_the_models_order_and_read_each_rank_once(tmp_path):
    config, tensors, _ = moe(moe_expert_interval=2)
    Writer(tensors, config, CORE, tp=2, ep=2).write(tmp_path)
    source = read_megatron(tmp_path)
    order = list(SkyworkMoeForCausalLM(config).state_dict())
    firsts = [order.index(recipe.products[0].name) for recipe in source.recipes]
    assert firsts == sorted(firsts)
    read = [tensor for recipe in source.recipes for tensor in recipe.sources]
    assert len(read) == len(set(read))
    names = {recipe.products[0].name: recipe for recipe in source.recipes}
    qkv = names["model.layers.0.self_attn.q_proj.weight"]
    assert [product.name[-13:-7] for product in qkv.products] == ["q_proj", "k_proj", "v_proj"]
    assert {tensor.name for tensor in qkv.sources} == {"model/decoder.layers.0.self_attention.linear_qkv.weight"}
    ranks = {"mp_rank_00_000", "mp_rank_01_000", "mp_rank_00_001", "mp_rank_01_001"}
    assert {tensor.file.parent.name for tensor in qkv.sources} == ranks
    expert = names["model.layers.1.block_sparse_moe.experts.2.w2.weight"]
    assert {tensor.file.parent.name for tensor in expert.sources} == {"mp_rank_00_001", "mp_rank_01_001"}
    ignored = {tensor.name.rpartition(".")[2] for tensor in source.ignored}
    assert ignored == {"_extra_state", "inv_freq"}


def test_the_manifest_has_every_tensor_of_every_rank(tmp_path):
    config, tensors, _ = moe(moe_expert_interval=2)
    Writer(tensors, config, CORE, tp=2, stages=[1, 1], ep=2).write(tmp_path / "run")
    folder = convert_checkpoint(tmp_path / "run", tmp_path / "hub")
    manifest = json.loads((folder / MANIFEST).read_text())
    used = [(source["file"], source["name"]) for entry in manifest["tensors"] for source in entry["sources"]]
    used += [(tensor["file"], tensor["name"]) for tensor in manifest["ignored"]]
    everything = [
        (file.relative_to(tmp_path / "run").as_posix(), f"model/{name}")
        for file in (tmp_path / "run").rglob("model_optim_rng.pt")
        for name, value in read_whole(file)["model"].items()
        if isinstance(value, torch.Tensor)
    ]
    assert sorted(used) == sorted(everything)


@pytest.mark.parametrize(
    ("rank", "name"),
    [
        ("mp_rank_01_001", "decoder.layers.0.mlp.router.weight"),
        ("mp_rank_01_001", "decoder.layers.0.self_attention.linear_qkv.weight"),
        ("mp_rank_01_000", "decoder.layers.1.pre_mlp_layernorm.weight"),
    ],
)
def test_copies_that_differ_are_said_and_the_first_is_taken(rank, name, tmp_path):
    config, tensors, _ = moe()
    iteration = Writer(tensors, config, CORE, tp=2, ep=2).write(tmp_path)
    file = rank_file(iteration, rank)
    change_model(file, **{name: read_whole(file)["model"][name] + 1e-3})
    with CaptureLogger(logger) as said:
        assert_bits(read_megatron(tmp_path), tensors)
    (line,) = [line for line in said.out.splitlines() if "its copy in" in line]
    assert f"`model/{name}`" in line
    assert f"its copy in {file} are not equal" in line


def test_each_rank_is_opened_once(tmp_path, monkeypatch):
    opened = []
    real = readers.load_pickle
    monkeypatch.setattr(readers, "load_pickle", lambda file: opened.append(file) or real(file))
    config, tensors, _ = dense(num_attention_heads=8, num_key_value_heads=8)
    Writer(tensors, config, CORE, tp=8).write(tmp_path)
    assert_bits(read_megatron(tmp_path), tensors)
    assert len(opened) == len(set(opened)) == 8


def test_where_it_lies(tmp_path):
    config, tensors, _ = dense()
    iteration = Writer(tensors, config, version=None).write(tmp_path / "run")
    Writer(tensors, config, LEGACY).write(tmp_path / "released", "release")
    for folder in (tmp_path / "run", iteration, tmp_path / "released"):
        assert is_megatron(folder)
        assert_bits(read_megatron(folder), tensors)
    assert not is_megatron(checkpoint("skywork-13b-tiny"))


def test_a_run_that_does_not_say_which_iteration_is_the_latest(tmp_path):
    config, tensors, _ = dense()
    iteration = Writer(tensors, config).write(tmp_path / "run")
    (tmp_path / "run" / "latest_checkpointed_iteration.txt").unlink()
    assert is_megatron(tmp_path / "run")
    assert_bits(read_megatron(tmp_path / "run"), tensors)
    rank = iteration / "mp_rank_00"
    assert is_megatron(rank)
    refused(rank, f"{rank} holds one rank", f"give {iteration}")
    other = shutil.copytree(iteration, tmp_path / "run" / "iter_0000050")
    refused(tmp_path / "run", "no latest_checkpointed_iteration.txt and 2 iterations", f"such as {other}")


def test_config_of_the_arguments(tmp_path):
    config, tensors, _ = dense(num_key_value_heads=2)
    tensors = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    args = {
        "params_dtype": torch.bfloat16,
        "rotary_base": 500000,
        "rotary_seq_len_interpolation_factor": 4,
        "norm_epsilon": None,
        "layernorm_epsilon": 1e-4,
        "max_position_embeddings": None,
        "seq_length": 99,
    }
    Writer(tensors, config, tp=2, args=args).write(tmp_path)
    source = read_megatron(tmp_path)
    assert_bits(source, tensors)
    made = source.config
    assert made.dtype == torch.bfloat16
    rope = made.rope_parameters
    assert (rope["rope_type"], rope["rope_theta"], rope["factor"]) == ("linear", 500000.0, 4.0)
    assert (made.rms_norm_eps, made.max_position_embeddings, made.num_key_value_heads) == (1e-4, 99, 2)
    assert (made.vocab_size, made.intermediate_size) == (config.vocab_size, config.intermediate_size)


@pytest.mark.parametrize("said", [{}, {"moe_2layer_gate": False}, {"moe_feature_no_mul_topk": False}])
def test_a_config_means_the_same_beside_megatrons_folders_and_given(said, tmp_path):
    config, tensors, _ = moe()
    run = tmp_path / "run"
    Writer(tensors, config).write(run)
    fields = config.to_dict()
    for name in ("moe_2layer_gate", "moe_feature_no_mul_topk"):
        del fields[name]
    given = tmp_path / "given.json"
    given.write_text(json.dumps({**fields, **said}))
    first = convert_checkpoint(run, tmp_path / "first", config=given)
    shutil.copy(given, run / "config.json")
    second = convert_checkpoint(run, tmp_path / "second")
    configs = [json.loads((folder / "config.json").read_text()) for folder in (first, second)]
    assert configs[0] == configs[1]
    assert configs[0].get("moe_2layer_gate", False) is False
    assert configs[0].get("moe_feature_no_mul_topk", True) == said.get("moe_feature_no_mul_topk", True)


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["o_proj"], "modules_to_save": ["q_proj"]},
        {"target_modules": ["k_proj"], "modules_to_save": ["v_proj", "gate_proj", "up_proj", "norm"]},
    ],
)
def test_whole_modules_of_an_adapter_replace_parts_of_fused_matrices(options, tmp_path):
    peft = pytest.importorskip("peft")
    config, tensors, model = dense()
    Writer(tensors, config, tp=2).write(tmp_path / "run")
    adapted = peft.get_peft_model(model, peft.LoraConfig(init_lora_weights=False, **options))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) / 10)
    adapted.save_pretrained(tmp_path / "adapter")
    merged = adapted.merge_and_unload().state_dict()
    source = merge_adapter(read_megatron(tmp_path / "run"), tmp_path / "adapter")
    for name, value in read_values(source).items():
        torch.testing.assert_close(value, merged[name], atol=1e-6, rtol=1e-5)


# --- what is refused


def refused(folder: Path, *words: str, config: Any = None) -> None:
    with pytest.raises(ValueError, match=".*".join(map(re.escape, words))) as caught:
        read_megatron(folder, config)
    assert "\n" not in str(caught.value)


def change(file: Path, **changes: Any) -> None:
    """Rewrite a rank's content; a change is a new value, or a function of the old one."""
    content = read_whole(file)
    for key, value in changes.items():
        content[key] = value(content[key]) if callable(value) else value
    torch.save(content, file)


def change_model(file: Path, **changes: torch.Tensor | None) -> None:
    def changed(model: dict[str, Any]) -> dict[str, Any]:
        return {name: tensor for name, tensor in {**model, **changes}.items() if tensor is not None}

    change(file, model=changed)


@pytest.fixture
def run(tmp_path) -> Path:
    config, tensors, _ = dense(num_key_value_heads=2)
    return Writer(tensors, config, CORE, 2, [1, 1]).write(tmp_path)


def rank_file(iteration: Path, name: str) -> Path:
    return iteration / name / "model_optim_rng.pt"


@pytest.mark.parametrize("missing", ["mp_rank_00_000", "mp_rank_00_001", "mp_rank_01_000", "mp_rank_01_001"])
def test_a_missing_rank(run, missing):
    shutil.rmtree(run / missing)
    refused(run, str(rank_file(run, missing)), "is missing", "copy it")


def test_missing_ranks_of_expert_parallelism_and_ranks_too_many(tmp_path):
    config, tensors, _ = moe()
    run = Writer(tensors, config, CORE, tp=2, ep=2).write(tmp_path)
    shutil.move(run / "mp_rank_01_001", tmp_path / "aside")
    refused(run, "mp_rank_01_001", "is missing", "2 expert-parallel")
    shutil.copytree(tmp_path / "aside", run / "mp_rank_01_001")
    shutil.copytree(tmp_path / "aside", run / "mp_rank_01_002")
    refused(run, "mp_rank_01_002 is not among the ranks")


def test_folders_that_hold_nothing(tmp_path):
    refused(tmp_path, "has no mp_rank_* folders", "--ckpt-format torch")
    latest = tmp_path / "latest_checkpointed_iteration.txt"
    latest.write_text("12")
    refused(tmp_path, "names iter_0000012, which is not there")
    latest.write_text("../../x")
    refused(tmp_path, "says '../../x'")


def test_ranks_that_do_not_fit_each_other(run):
    key = "decoder.layers.0.mlp.linear_fc2.weight"
    file = rank_file(run, "mp_rank_01_000")
    kept = read_whole(file)["model"][key]
    change_model(file, **{key: torch.ones(32, 23)})
    refused(run, f"`model/{key}` in {file}", "[32, 23]", "[32, 24]", "mp_rank_00_000")
    change_model(file, **{key: kept.half()})
    refused(run, f"`model/{key}` in {file}", "float16", "float32")
    change_model(file, **{key: None})
    refused(run, f"{file} has no counterpart of `model/{key}`", "mp_rank_00_000")
    change_model(file, **{key: kept})
    change(file, iteration=39)
    refused(run, str(file), "iteration 39", "iteration 40")


@pytest.mark.parametrize(
    "key",
    [
        "decoder.layers.1.self_attention.linear_qkv.bias",
        "decoder.layers.0.mlp.shared_experts.linear_fc1.weight",
        "decoder.layers.0.mlp.experts.weight1",
        "decoder.layers.0.self_attention.q_layernorm.weight",
        "embedding.position_embeddings.weight",
    ],
)
def test_an_unexpected_key(run, key):
    for name in ("mp_rank_00_000", "mp_rank_01_000"):
        change_model(rank_file(run, name), **{key: torch.ones(4)})
    refused(run, f"`model/{key}` in {rank_file(run, 'mp_rank_00_000')} is unexpected")


def test_keys_that_mean_the_same(run):
    change_model(rank_file(run, "mp_rank_00_000"), **{"decoder.layers.0.input_layernorm.weight": torch.ones(32)})
    refused(run, "are both the input norm")
    change_model(rank_file(run, "mp_rank_00_000"), **{"decoder.layers.0.input_layernorm.weight": None})
    for name in ("mp_rank_00_001", "mp_rank_01_001"):
        change_model(rank_file(run, name), **{"embedding.word_embeddings.weight": torch.ones(128, 32)})
    refused(run, "is in an earlier stage too")


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("decoder.layers.0.mlp.linear_fc2.weight", ("fc2 of layer 1", "model.layers.1.mlp.down_proj.weight")),
        ("decoder.final_layernorm.weight", ("final norm", "model.norm.weight")),
        ("output_layer.weight", ("head", "lm_head.weight")),
    ],
)
def test_a_tensor_that_no_rank_has(run, key, words):
    for name in ("mp_rank_00_001", "mp_rank_01_001"):
        change_model(rank_file(run, name), **{key: None})
    refused(run, f"No rank in {run} holds the", *words, ".".join(key.split(".")[-2:]), "copy")


def test_shapes_that_the_config_does_not_say(run):
    given = {"num_key_value_heads": 2}
    refused(run, "linear_fc1.weight", "[48, 32]", "[64, 32]", config=tiny_dense_config(intermediate_size=64, **given))
    refused(run, "word_embeddings", "at least 999 rows", config=tiny_dense_config(vocab_size=999, **given))
    refused(run, "hold 2 layers", "says 3", config=tiny_dense_config(num_hidden_layers=3, **given))
    refused(run, "hold 2 layers", "says 1", config=tiny_dense_config(num_hidden_layers=1, **given))
    refused(run, "`num_key_value_heads` is 4", "trained with 2", config=tiny_dense_config())
    refused(run, "`num_attention_heads` is 2", config=tiny_dense_config(num_attention_heads=2, **given))
    refused(run, "tie_word_embeddings", config=tiny_dense_config(tie_word_embeddings=True, **given))
    refused(run, "hold 0 experts", "says 4", config=tiny_moe_config(**given))


def test_configs_of_models_that_megatron_does_not_hold(tmp_path):
    config, tensors, _ = moe()
    Writer(tensors, config).write(tmp_path)
    refused(tmp_path, "gate.0.weight", "`moe_2layer_gate` false", config=tiny_moe_config(moe_2layer_gate=True))
    refused(tmp_path, "hold 4 experts", "says 0", config=tiny_dense_config())
    quantized = tiny_moe_config()
    quantized.quantization_config = {"quant_method": "fp8", "activation_scheme": "static"}
    refused(tmp_path, "quantization_config", "remove it", config=quantized)


def test_a_config_for_fused_experts_reads_the_same(tmp_path):
    config, tensors, _ = moe()
    Writer(tensors, config).write(tmp_path)
    assert_bits(read_megatron(tmp_path, tiny_moe_config(experts_layout="fused")), tensors)


@pytest.mark.parametrize("version", [0, 1.0, None, "3.0"])
def test_old_versions(version, tmp_path):
    config, tensors, _ = dense()
    Writer(tensors, config, LEGACY, version=version).write(tmp_path)
    refused(tmp_path, "model_optim_rng.pt has checkpoint_version", "another order", "newer Megatron-LM")


def test_arguments_that_say_too_little(tmp_path):
    config, tensors, _ = moe()
    Writer(tensors, config, args={"vocab_size": None, "moe_router_topk": None}).write(tmp_path)
    refused(tmp_path, "lack vocab_size, moe_router_topk", "beside the folders", "--config")
    assert_bits(read_megatron(tmp_path, config), tensors)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("apply_layernorm_1p", True),
        ("apply_residual_connection_post_layernorm", True),
        ("glu_linear_offset", 1.0),
        ("no_rope_freq", 4),
        ("no_rope_freq", [0, 1]),
        ("normalization", "LayerNorm"),
        ("position_embedding_type", "yarn"),
        ("qk_l2_norm", True),
        ("quick_geglu", True),
        ("rotary_base_per_layer", [1e4, 1e6]),
        ("rotary_interleaved", True),
        ("rotary_percent", 0.5),
        ("softmax_scale", 0.1),
        ("softmax_type", "off-by-one"),
        ("squared_relu", True),
        ("swiglu", False),
        ("use_mup", True),
        ("use_rope_scaling", True),
        ("window_size", (16, 0)),
    ],
)
def test_runs_that_compute_something_else(name, value, tmp_path):
    config, tensors, _ = dense()
    Writer(tensors, config, args={name: value}).write(tmp_path)
    for passed in (config, None):
        refused(tmp_path, "model_optim_rng.pt was trained with", f"{name}={value!r}", config=passed)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("activation_func_clamp_value", 7.0),
        ("moe_apply_probs_on_input", True),
        ("moe_router_group_topk", 2),
        ("moe_router_load_balancing_type", "sinkhorn"),
        ("moe_router_load_balancing_type", ["aux_loss", "sinkhorn"]),
        ("moe_router_pre_softmax", True),
        ("moe_router_score_function", "sigmoid"),
        ("moe_router_topk_limited_devices", 2),
        ("moe_router_topk_scaling_factor", 2.5),
    ],
)
def test_gates_that_compute_something_else(name, value, tmp_path):
    config, tensors, _ = moe()
    Writer(tensors, config, args={name: value}).write(tmp_path / "moe")
    for passed in (config, None):
        refused(tmp_path / "moe", "model_optim_rng.pt was trained with", f"{name}={value!r}", config=passed)
    config, tensors, _ = dense()
    Writer(tensors, config, args={name: value}).write(tmp_path / "dense")
    assert_bits(read_megatron(tmp_path / "dense"), tensors)


def test_arguments_that_say_what_skywork_computes(tmp_path):
    config, tensors, _ = moe()
    args = {
        "activation_func_clamp_value": None,
        "apply_residual_connection_post_layernorm": False,
        "moe_apply_probs_on_input": False,
        "moe_router_load_balancing_type": ["aux_loss", "seq_aux_loss"],
        "moe_router_pre_softmax": False,
        "moe_router_score_function": "softmax",
        "moe_router_topk_scaling_factor": 1,
        "no_rope_freq": [0, 0],
        "rotary_seq_len_interpolation_factor": 1,
        "window_size": (-1, 0),
    }
    Writer(tensors, config, args=args).write(tmp_path)
    for passed in (config, None):
        source = read_megatron(tmp_path, passed)
        assert source.config.rope_parameters == config.rope_parameters
        assert_bits(source, tensors)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("rms_norm_eps", 1e-3, "1e-06"),
        ("rope_parameters", {"rope_type": "default", "rope_theta": 5e5}, "'rope_theta': 10000.0"),
        ("rope_parameters", {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}, "'rope_theta': 10000.0"),
        ("max_position_embeddings", 32, "64"),
        ("hidden_act", "gelu", "silu"),
        ("num_experts_per_tok", 1, "2"),
    ],
)
def test_a_config_that_contradicts_the_arguments(field, value, said, tmp_path):
    config, tensors, _ = moe()
    Writer(tensors, config).write(tmp_path)
    other = tiny_moe_config(**{field: value})
    refused(tmp_path, f"The config's `{field}` is {getattr(other, field)}", "model_optim_rng.pt", said, config=other)
    other.to_json_file(tmp_path / "config.json")
    with pytest.raises(ValueError, match=f"The config's `{field}` is "):
        convert_checkpoint(tmp_path, tmp_path / "result")


def test_a_config_says_what_the_arguments_do_not_and_may_have_more_positions(tmp_path):
    config, tensors, _ = moe()
    silent = ("norm_epsilon", "rotary_base", "swiglu", "max_position_embeddings", "moe_router_topk")
    Writer(tensors, config, args=dict.fromkeys(silent)).write(tmp_path / "silent")
    rope = {"rope_type": "default", "rope_theta": 5e5}
    other = tiny_moe_config(rms_norm_eps=1e-3, rope_parameters=rope, max_position_embeddings=32, num_experts_per_tok=1)
    made = read_megatron(tmp_path / "silent", other).config
    assert (made.rms_norm_eps, made.rope_parameters, made.num_experts_per_tok) == (1e-3, rope, 1)
    Writer(tensors, config).write(tmp_path / "run")
    source = read_megatron(tmp_path / "run", tiny_moe_config(max_position_embeddings=4096, hidden_act="swish"))
    assert source.config.max_position_embeddings == 4096
    assert_bits(source, tensors)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("hidden_size", 0),
        ("num_attention_heads", 0),
        ("num_layers", 2.0),
        ("num_query_groups", True),
        ("norm_epsilon", "x"),
        ("rotary_base", "x"),
        ("rotary_base", float("nan")),
        ("tensor_model_parallel_size", "2"),
        ("tensor_model_parallel_size", 0),
        ("pipeline_model_parallel_size", -1),
        ("num_experts", "x"),
        ("rotary_base", 10**400),
    ],
)
def test_arguments_that_are_no_numbers_of_a_model(name, value, tmp_path):
    config, tensors, _ = dense()
    iteration = Writer(tensors, config).write(tmp_path)
    (file,) = iteration.glob("*/model_optim_rng.pt")
    change(file, args=lambda args: argparse.Namespace(**{**vars(args), name: value}))
    for passed in (config, None):
        refused(tmp_path, f"{file} has the argument {name}={value!r}: expected", "above 0", config=passed)


@pytest.mark.parametrize("value", [torch.zeros(3), {"x": 1}, [[1]], OrderedDict()])
@pytest.mark.parametrize("name", ["swiglu", "window_size", "params_dtype", "untie_embeddings_and_output_weights"])
def test_arguments_that_nothing_can_be_compared_with(name, value, tmp_path):
    config, tensors, _ = dense()
    (file,) = Writer(tensors, config, args={name: value}).write(tmp_path).glob("*/model_optim_rng.pt")
    refused(tmp_path, f"{file} has the argument {name} of type {type(value).__name__}: expected a number, a text")


def test_ranks_without_number_are_not_counted(tmp_path):
    config, tensors, _ = dense()
    iteration = Writer(tensors, config, args={"tensor_model_parallel_size": 10**12}).write(tmp_path)
    refused(tmp_path, f"{iteration / 'mp_rank_01' / 'model_optim_rng.pt'} is missing: expected one for each of 10000")


def test_dictionaries_that_hold_themselves(tmp_path):
    config, tensors, _ = dense()
    (file,) = Writer(tensors, config).write(tmp_path).glob("*/model_optim_rng.pt")
    change(file, model=lambda model: model.update(decoder=model) or model)
    refused(tmp_path, "Tensors are nested in more than 32 dictionaries, below 'decoder/decoder/")


def test_arguments_that_describe_no_model(tmp_path):
    config, tensors, _ = moe()
    iteration = Writer(tensors, config, args={"num_attention_heads": 3, "num_query_groups": 3}).write(tmp_path)
    refused(tmp_path, f"{iteration / 'mp_rank_00' / 'model_optim_rng.pt'} describes no model that can be built")


class Stranger:
    """Stands for whatever a pickle may hold."""


def test_pickles_that_hold_something_else(run):
    file = rank_file(run, "mp_rank_01_001")
    change(file, rng_state=[Stranger()])
    refused(run, f"{file} cannot be read as a checkpoint", "refused")
    change(file, rng_state=None, args={"hidden_size": 32})
    refused(run, f"{file} holds no `args`")
    content = read_whole(rank_file(run, "mp_rank_00_000"))
    content["model0"] = content.pop("model")
    torch.save(content, rank_file(run, "mp_rank_00_000"))
    refused(run, "holds no `model`", "interleaved")
    torch.save([1], rank_file(run, "mp_rank_00_000"))
    refused(run, "holds no `args`")
    rank_file(run, "mp_rank_00_000").write_bytes(b"PK cut off")
    refused(run, "cannot be read as a checkpoint")


def test_a_strange_global_is_named_and_nobody_is_advised_to_run_it(run):
    file = rank_file(run, "mp_rank_01_001")
    change(file, rng_state=[Stranger()])
    with pytest.raises(ValueError, match=rf"holds a `{Stranger.__module__}\.Stranger`") as caught:
        read_megatron(run)
    assert "weights_only" not in str(caught.value)
    assert "\033" not in str(caught.value)


def test_an_empty_rank(run):
    file = rank_file(run, "mp_rank_01_001")
    file.write_bytes(b"")
    refused(run, f"{file} cannot be read as a checkpoint: it is empty")


@pytest.fixture
def megatron_enums(monkeypatch) -> dict[str, Any]:
    """Enums under the names of Megatron-Core's, while a checkpoint is written."""
    names = {
        "megatron.core.enums": {"ModelType": ["encoder_or_decoder"]},
        "megatron.core.transformer.enums": {"AttnBackend": ["flash", "auto"], "CudaGraphScope": ["attn"]},
        "megatron.core.rerun_state_machine": {"RerunMode": ["disabled"]},
    }
    enums = {}
    for module, classes in names.items():
        for place in range(1, module.count(".") + 2):
            parent = ".".join(module.split(".")[:place])
            monkeypatch.setitem(sys.modules, parent, sys.modules.get(parent) or types.ModuleType(parent))
        for name, members in classes.items():
            enums[name] = enum.Enum(name, members, module=module)
            setattr(sys.modules[module], name, enums[name])
    return enums


def test_enums_in_the_arguments_are_read_without_megatron(megatron_enums, monkeypatch, tmp_path):
    config, tensors, _ = dense()
    args = {
        "model_type": megatron_enums["ModelType"].encoder_or_decoder,
        "attention_backend": megatron_enums["AttnBackend"].auto,
        "cuda_graph_scope": [megatron_enums["CudaGraphScope"].attn],
        "exit_signal": signal.SIGTERM,
        "rerun_mode": megatron_enums["RerunMode"].disabled,
        "save": Path("checkpoints"),
    }
    Writer(tensors, config, args=args).write(tmp_path)
    for module in [name for name in sys.modules if name.partition(".")[0] == "megatron"]:
        monkeypatch.delitem(sys.modules, module)
    assert_bits(read_megatron(tmp_path), tensors)
    assert "megatron" not in sys.modules


def test_states_of_random_generators_are_read_past(tmp_path):
    """As Megatron-LM saves them: tuples of Python and numpy with an array, tensors, and in a layer a buffer."""
    state = {"random": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}
    file = tmp_path / "model_optim_rng.pt"
    content = {"args": argparse.Namespace(num_layers=1), "rng_state": [state], "extra": io.BytesIO(b"fp8")}
    torch.save({**content, "model": {"weight": torch.ones(2)}}, file)
    assert list(load_pickle(file)["model"]) == ["weight"]
