"""Plans: budgets, completeness, balance, refusals, on the full Skywork-MoE config and on random ones."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from itertools import combinations
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import checkpoint, tiny_dense_config, tiny_moe_config
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

from skywork_hf import SkyworkConfig, SkyworkFp8Config, SkyworkInt8Config, SkyworkMoeConfig, plan_device_map
from skywork_hf.placement import ExpertUsage, PlacementPlan, devices
from skywork_hf.placement.devices import CARDS, GIB, MARGIN, Device, devices_of

FULL = SkyworkMoeConfig()
HIDDEN, FFN, LAYERS, EXPERTS, TOKENS = 4608, 12288, 52, 16, 8192
EXPERT_PARAMETERS = 3 * HIDDEN * FFN
EXPERT_BYTES = {"fp8": EXPERT_PARAMETERS + 3 * 4, "int8": EXPERT_PARAMETERS + 2 * (2 * FFN + HIDDEN)}
KV_BYTES = 2 * LAYERS * TOKENS * HIDDEN * 2


def check_budgets(plan: PlacementPlan) -> None:
    for device in plan.request.devices:
        assert sum(plan.bytes_per_device[device.key].values()) <= device.budget


# --- the real model


@pytest.mark.parametrize(
    ("memory", "quantization", "methods"),
    [
        (dict.fromkeys(range(8), "24GiB"), "fp8", dict.fromkeys(range(8), "fp8")),
        (
            {**dict.fromkeys(range(4), "24GiB"), "cpu": "128GiB"},
            {"gpu": "fp8", "cpu": "int8"},
            {0: "fp8", 1: "fp8", 2: "fp8", 3: "fp8", "cpu": "int8"},
        ),
        ({0: "24GiB", "cpu": "192GiB"}, "int8", {0: "int8", "cpu": "int8"}),
        (dict.fromkeys(range(2), "80GiB"), "fp8", {0: "fp8", 1: "fp8"}),
    ],
    ids=["8x24", "4x24+cpu", "1x24+cpu", "2x80"],
)
def test_the_full_model_fits(memory, quantization, methods):
    plan = plan_device_map(FULL, memory, quantization)
    check_budgets(plan)
    assert sum(plan.experts_on(key) for key in memory) == LAYERS * EXPERTS
    for key, method in methods.items():
        assert plan.bytes_per_device[key]["experts"] == plan.experts_on(key) * EXPERT_BYTES[method]
    assert sum(kinds["cache"] for kinds in plan.bytes_per_device.values()) == KV_BYTES
    # Nothing is left unused while experts are on the CPU.
    for key in memory:
        left = plan.request.devices[0].budget - sum(plan.bytes_per_device[key].values())
        assert "cpu" not in memory or key == "cpu" or left < 2 * EXPERT_BYTES["int8"]


def test_the_experts_of_a_layer_are_on_all_gpus_evenly():
    plan = plan_device_map(FULL, dict.fromkeys(range(8), "24GiB"), "fp8")
    assert all(Counter(layer) == dict.fromkeys(range(8), 2) for layer in plan.placement.experts)
    tight = plan_device_map(FULL, {**dict.fromkeys(range(4), "rtx4090"), "cpu": "128GiB"}, "fp8")
    for layer in tight.placement.experts:
        counts = [layer.count(key) for key in range(4)]
        assert max(counts) - min(counts) <= 1


def test_what_does_not_fit_is_refused_with_advice_that_holds():
    memory = dict.fromkeys(range(4), "24GiB")
    with pytest.raises(
        ValueError, match=r"65\.\d+ GiB are missing .* with 4 more GPUs of 24 GiB, or with 69 GiB"
    ) as error:
        plan_device_map(FULL, memory, "fp8")
    assert "quantization" not in str(error.value)
    plan_device_map(FULL, dict.fromkeys(range(8), "24GiB"), "fp8")
    plan_device_map(FULL, {**memory, "cpu": "69GiB"}, "fp8")
    for too_little in (dict.fromkeys(range(7), "24GiB"), {**memory, "cpu": "68GiB"}):
        with pytest.raises(ValueError, match="GiB are missing"):
            plan_device_map(FULL, too_little, "fp8")


def test_smaller_weights_are_advised_where_they_help():
    with pytest.raises(ValueError, match='would fit with quantization="fp8"'):
        plan_device_map(FULL, dict.fromkeys(range(8), "24GiB"))


def test_time_and_memory():
    """A guard, far above what it takes: seconds of processor time and the process's largest size."""
    program = (
        "from skywork_hf import SkyworkMoeConfig, plan_device_map\n"
        "import resource, time\n"
        "start = time.process_time()\n"
        "try: plan_device_map(SkyworkMoeConfig(), dict.fromkeys(range(4), '24GiB'), 'fp8')\n"
        "except ValueError: pass\n"
        "print(time.process_time() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    seconds, size = map(float, printed.split())
    assert seconds < 10
    assert size * (1 if sys.platform == "darwin" else 1024) < 2 * GIB


def test_a_card_by_name_keeps_the_margin_of_what_torch_sees():
    config = SkyworkMoeConfig(num_hidden_layers=4, num_experts=[64])
    for card, spec in CARDS.items():
        plan = plan_device_map(config, {0: card, "cpu": "300GiB"}, "int8", context_tokens=512)
        kinds = plan.bytes_per_device[0]
        assert plan.experts_on("cpu") or spec.memory > 44
        assert kinds["margin"] == pytest.approx(sum(MARGIN.values()) * GIB)
        assert sum(kinds.values()) <= spec.memory * GIB
    for kind in MARGIN:
        assert kind in str(plan).splitlines()[-1]


def test_what_is_free_now_has_a_context_already(monkeypatch):
    monkeypatch.setattr(devices, "get_max_memory", lambda: {0: 24 * GIB, "cpu": 300 * GIB})
    config = tiny_moe_config()
    there, given = (plan_device_map(config, memory) for memory in (None, {0: "24GiB", "cpu": "300GiB"}))
    differs = given.bytes_per_device[0]["margin"] - there.bytes_per_device[0]["margin"]
    assert differs == pytest.approx(MARGIN["CUDA's context"] * GIB, abs=1)
    assert "context" in str(given) and "context" not in str(there)  # noqa: PT018


def test_a_block_of_weights_is_unpacked_in_32_bit_for_float16():
    """One expert's matrix, where no kernel reads its codes; in bfloat16 there is no 32-bit copy beside it."""
    memory = {0: "rtx3090", "cpu": "300GiB"}
    for method in ("int8", "fp8"):
        plans = [plan_device_map(FULL, memory, method, dtype=dtype) for dtype in ("float16", "bfloat16")]
        more, less = (plan.bytes_per_device[0]["working"] for plan in plans)
        assert more - less == 4 * HIDDEN * FFN


def test_a_cache_of_fewer_bits_leaves_room_for_experts():
    memory, cards = {"cpu": "128GiB"}, dict.fromkeys(range(4), "rtx4090")
    plans = {held: plan_device_map(FULL, cards | memory, "fp8", kv_cache_dtype=held) for held in (None, "fp8", "int4")}
    cache = {held: sum(kinds["cache"] for kinds in plan.bytes_per_device.values()) for held, plan in plans.items()}
    assert cache[None] == 2 * cache["fp8"] == KV_BYTES
    assert cache["int4"] == pytest.approx(KV_BYTES * (4.5 / 16 + 128 / TOKENS))
    for held, plan in plans.items():
        check_budgets(plan)
        assert (held is None) == ("KV cache in" not in str(plan))
    assert plans["fp8"].experts_on("cpu") < plans[None].experts_on("cpu")
    assert "KV cache in fp8" in str(plans["fp8"]).splitlines()[0]
    assert "'backend': 'quanto', 'nbits': 4" in str(plans["int4"])


# --- any model, any budgets


@st.composite
def problems(draw: Any) -> dict[str, Any]:
    """A small config with budgets, usage, quantisation and cards."""
    experts = draw(st.integers(2, 6))
    config = tiny_moe_config(
        num_experts=[experts],
        num_experts_per_tok=draw(st.integers(1, min(3, experts))),
        num_hidden_layers=draw(st.integers(1, 5)),
        moe_expert_interval=draw(st.integers(1, 2)),
        tie_word_embeddings=draw(st.booleans()),
        moe_2layer_gate=draw(st.booleans()),
    )
    layers = [n for n in range(config.num_hidden_layers) if config.is_moe_layer(n)]
    strategy = draw(st.sampled_from(["experts", "experts", "layers"]))
    usage = None
    if layers and strategy == "experts" and draw(st.booleans()):
        seed = draw(st.integers(0, 99))
        counts = torch.randint(0, 50, (len(layers), experts), generator=torch.Generator().manual_seed(seed))
        pairs = torch.randint(0, 20, (len(layers), experts, experts), generator=torch.Generator().manual_seed(seed))
        usage = ExpertUsage(layers, counts, pairs + pairs.transpose(1, 2), tokens=100)
    gpus = draw(st.integers(0, 4))
    beside = MARGIN_AND_WORKING if gpus else 0
    memory: dict[Any, Any] = {n: beside + draw(st.integers(0, 300)) * 1024 for n in range(gpus)}
    memory["cpu"] = draw(st.sampled_from([0, 2**20, 2**30]))
    quantization = draw(st.sampled_from([None, "fp8", "int8", "nf4", {"gpu": "fp8", "cpu": "int8"}]))
    return {
        "model": config,
        "max_memory": memory,
        "quantization": quantization,
        "expert_usage": usage,
        "context_tokens": 16,
        "strategy": strategy,
        "kv_cache_dtype": draw(st.sampled_from([None, "fp8", "int8", "int4", "int2"])),
        "bandwidth": {n: draw(st.sampled_from([500, 1000])) for n in range(gpus)} if draw(st.booleans()) else None,
    }


# Of these models: what a GPU needs beside weights. The random budgets lie around it.
MARGIN_AND_WORKING = Device(0, "", 0).margin + 200 * 1024


@settings(max_examples=150, deadline=None)
@given(problems())
def test_a_plan_places_everything_once_within_the_budgets(problem):
    try:
        plan = plan_device_map(**problem)
    except ValueError as error:
        assert "GiB are missing" in str(error)  # noqa: PT017
        return
    check_budgets(plan)
    with torch.device("meta"):
        model = plan.request.model_class._from_config(problem["model"])
    for name, _ in [*model.named_parameters(), *model.named_buffers()]:
        owners = [key for key in plan.device_map if name.startswith(f"{key}.")]
        assert len(owners) == 1, (name, owners)
    if problem["model"].tie_word_embeddings:
        assert plan.device_map["model.embed_tokens"] == plan.device_map["lm_head"]
    again = plan_device_map(**{**problem, "max_memory": dict(reversed(problem["max_memory"].items()))})
    assert again.device_map == plan.device_map
    assert str(again) == str(plan)
    check_least_used_leave(plan, problem["expert_usage"])


def check_least_used_leave(plan: PlacementPlan, usage: ExpertUsage | None) -> None:
    if usage is None or plan.request.strategy == "layers" or not plan.request.gpus:
        return
    rows = [row for row in plan.placement.experts if row]
    loads = {
        (place == "cpu", load)
        for row, counts in zip(rows, usage.counts.tolist(), strict=True)
        for place, load in zip(row, counts, strict=True)
    }
    on_cpu = [load for away, load in loads if away]
    on_gpus = [load for away, load in loads if not away]
    assert not on_cpu or not on_gpus or max(on_cpu) <= min(on_gpus)


@settings(max_examples=60, deadline=None)
@given(
    gpus=st.integers(1, 5),
    experts=st.integers(2, 12),
    layers=st.integers(1, 4),
    seed=st.none() | st.integers(0, 99),
    pairs=st.booleans(),
)
def test_no_worse_balance_than_one_expert(gpus, experts, layers, seed, pairs):
    config = tiny_moe_config(num_experts=[experts], num_hidden_layers=layers)
    loads = torch.ones(layers, experts, dtype=torch.int64)
    usage = None
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        loads = torch.randint(0, 50, (layers, experts), generator=generator)
        together = (
            torch.randint(0, 50, (layers, experts, experts), generator=generator)
            if pairs
            else torch.zeros(layers, experts, experts, dtype=torch.int64)
        )
        usage = ExpertUsage(list(range(layers)), loads, together + together.transpose(1, 2), tokens=100)
    plan = plan_device_map(config, dict.fromkeys(range(gpus), "8GiB"), expert_usage=usage)
    for row, counts in zip(plan.placement.experts, loads.tolist(), strict=True):
        shares = [sum(load for load, place in zip(counts, row, strict=True) if place == key) for key in range(gpus)]
        assert max(shares) - min(shares) <= max(counts)


@settings(max_examples=40, deadline=None)
@given(gpus=st.integers(1, 4), experts=st.integers(2, 8), layers=st.integers(1, 5), missing=st.integers(0, 60))
def test_equal_gpus_keep_equal_shares_when_the_cpu_takes_the_rest(gpus, experts, layers, missing):
    config = tiny_moe_config(num_experts=[experts], num_hidden_layers=layers)
    roomy = plan_device_map(config, dict.fromkeys(range(gpus), "8GiB"))
    one = roomy.bytes_per_device[0]["experts"] // max(1, roomy.experts_on(0)) or 18432
    budget = max(sum(kinds.values()) for kinds in roomy.bytes_per_device.values()) + 3 * one - missing * one // 4
    try:
        plan = plan_device_map(config, {**dict.fromkeys(range(gpus), budget), "cpu": "1GiB"})
    except ValueError:
        return
    if (len(set(plan.placement.dense)) == 1 and gpus > 1) or "cpu" in plan.placement.dense:
        return  # the dense part leaves them unequal room
    on_cpu = [row.count("cpu") for row in plan.placement.experts]
    assert max(on_cpu) - min(on_cpu) <= 1


def test_faster_gpus_take_the_dense_part_and_more_of_the_experts():
    plan = plan_device_map(FULL, {0: "l4", **dict.fromkeys(range(1, 4), "h100")}, "fp8")
    check_budgets(plan)
    assert 0 not in plan.placement.dense
    counts = Counter(place for row in plan.placement.experts for place in row)
    assert counts[0] < 0.2 * counts[1]  # 300 of 3350 GB/s


def test_slower_gpus_take_only_what_the_fast_ones_cannot():
    plan = plan_device_map(FULL, {0: "rtx5080", 1: "p40", "cpu": "192GiB"}, "int8")
    assert plan.placement.dense.count(1) < plan.placement.dense.count(0)
    left = plan.request.devices[0].budget - sum(plan.bytes_per_device[0].values())
    assert left < 2 * EXPERT_BYTES["int8"]


def test_the_shortfall_counts_experts_where_even_the_dense_part_does_not_fit():
    with pytest.raises(ValueError, match=r"1[34]\d\.\d+ GiB are missing"):
        plan_device_map(FULL, {0: "1GiB"}, "fp8")


def test_one_name_for_all_devices_is_that_name():
    plan = plan_device_map(FULL, {"cpu": "400GiB"}, {"gpu": "bf16", "cpu": "bf16"})
    assert plan.quantization_config is None


def test_layers_are_consecutive_and_whole():
    memory = {0: "24GiB", 1: "24GiB", "cpu": "400GiB"}
    for config, used in ((SkyworkConfig(), {0, 1}), (SkyworkMoeConfig(), {0, 1, "cpu"})):
        plan = plan_device_map(config, memory, "int8", strategy="layers")
        check_budgets(plan)
        places = [plan.device_map[f"model.layers.{n}"] for n in range(52)]
        assert places == sorted(places, key=str)
        assert set(places) == used


def test_the_disk_takes_what_the_cpu_does_not():
    config = tiny_moe_config()
    everything = plan_device_map(config, {"cpu": "1GiB"}, context_tokens=16)
    used = sum(everything.bytes_per_device["cpu"].values())
    plan = plan_device_map(config, {"cpu": used - 20_000, "disk": "1GiB"}, context_tokens=16)
    assert plan.experts_on("disk") > 0
    with pytest.raises(ValueError, match="GiB are missing"):  # they would have to be written there first
        plan_device_map(config, {"cpu": used - 60_000, "disk": "1GiB"}, "int8", context_tokens=2048)


# --- kept and compared


def test_saved_and_loaded(tmp_path):
    memory = {0: "rtx4090", 1: "rtx3090", "cpu": "200GiB"}
    plans = [
        plan_device_map(FULL, memory, {"gpu": "fp8", "cpu": "int8"}, bandwidth={"cpu": 60}),
        plan_device_map(FULL, memory, SkyworkFp8Config(int8_devices="without_fp8"), context_tokens=100, batch_size=2),
        plan_device_map(FULL, dict.fromkeys(range(8), "24GiB"), BitsAndBytesConfig(load_in_4bit=True)),
        plan_device_map(SkyworkConfig(), {0: "24GiB", "cpu": "64GiB"}, dtype="float16", kv_cache_dtype="int4"),
    ]
    for plan in reversed(plans):
        plan.save(tmp_path / "plan.json")
        loaded = PlacementPlan.load(tmp_path / "plan.json")
        assert loaded.placement == plan.placement
        assert str(loaded) == str(plan)
        assert loaded.dtype == plan.dtype
        assert type(loaded.quantization_config) is type(plan.quantization_config)
    assert str(loaded.will_it_help("rtx3090")) == str(plans[0].will_it_help("rtx3090"))


@pytest.mark.parametrize("content", ["", "[]", "{}", json.dumps({"format": "another"})])
def test_a_file_that_holds_something_else(content, tmp_path):
    (tmp_path / "plan.json").write_text(content)
    with pytest.raises(ValueError, match=r"plan\.json holds no placement plan"):
        PlacementPlan.load(tmp_path / "plan.json")


def test_will_it_help():
    memory = {**dict.fromkeys(range(4), "rtx4090"), "cpu": "128GiB"}
    plan = plan_device_map(FULL, memory, {"gpu": "fp8", "cpu": "int8"}, bandwidth={"cpu": 60})
    answer = plan.will_it_help("rtx3090")
    assert answer.gib == pytest.approx(CARDS["rtx3090"].memory)
    assert answer.experts_moved_off_the_cpu == plan.experts_on("cpu") - answer.after.experts_on("cpu") > 100
    assert answer.after.tokens_per_second > plan.tokens_per_second
    check_budgets(answer.after)
    assert "One more rtx3090: 23.56 GiB" in str(answer)
    assert plan.will_it_help("12GiB").gib == 12
    with pytest.raises(ValueError, match="The card is '24parsecs': expected bytes, or a size"):
        plan.will_it_help("24parsecs")
    with pytest.raises(ValueError, match=r"With a rtx3090 the model no longer fits: .* GiB are missing on GPUs"):
        plan_device_map(FULL, {"cpu": "128GiB"}, "nf4").will_it_help("rtx3090")
    with pytest.raises(ValueError, match=r"'rtx9999' is known: .*expected one of rtx3060"):
        plan.will_it_help("rtx9999")


# --- what a token reads


def test_the_bound_is_that_of_all_pairs():
    config = tiny_moe_config(num_hidden_layers=1, num_experts=[4])
    loads = torch.tensor([[1, 2, 3, 4]])
    usage = ExpertUsage([0], loads, torch.zeros(1, 4, 4, dtype=torch.int64), tokens=5)
    plan = plan_device_map(
        config, dict.fromkeys(range(2), "8GiB"), expert_usage=usage, context_tokens=8, bandwidth={0: 100, 1: 50}
    )
    expert = 3 * 32 * 48 * 2
    # Attention, its norms and the gate; keys and values; the last norm and the head.
    dense = 2 * (4 * 32 * 32 + 2 * 32 + 4 * 32) + 2 * 8 * 32 * 2 + 2 * (32 + 67 * 32)
    assert set(plan.placement.dense) == {0}
    places, speeds = plan.placement.experts[0], {0: 100e9, 1: 50e9}
    pairs = {pair: loads[0][pair[0]].item() * loads[0][pair[1]].item() for pair in combinations(range(4), 2)}
    total = sum(pairs.values())
    seconds, read = dense / 100e9, {0: float(dense), 1: 0.0}
    for pair, weight in pairs.items():
        there = Counter(places[expert_number] for expert_number in pair)
        seconds += weight / total * max(count * expert / speeds[key] for key, count in there.items())
        for key, count in there.items():
            read[key] += weight / total * count * expert
    assert plan.tokens_per_second == pytest.approx(1 / seconds)
    assert plan.bytes_read_per_token == pytest.approx(read)


def test_the_bound_of_the_dense_model_is_its_weights():
    plan = plan_device_map(SkyworkConfig(), {0: "h100"}, context_tokens=1)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(SkyworkConfig())
    read = 2 * (sum(p.numel() for p in model.parameters()) - 65519 * HIDDEN) + 2 * LAYERS * HIDDEN * 2
    assert plan.tokens_per_second == pytest.approx(3350e9 / read)
    unknown = plan_device_map(SkyworkConfig(), {0: "80GiB"})
    assert unknown.tokens_per_second is None
    assert "give the bandwidth of 0" in str(unknown)


def test_a_tied_head_is_read_too():
    read = [
        sum(plan_device_map(tiny_moe_config(tie_word_embeddings=tied), {"cpu": "1GiB"}).bytes_read_per_token.values())
        for tied in (False, True)
    ]
    assert read[1] == pytest.approx(read[0], rel=0.01)  # but for the rotary tables, which lie with the embeddings


def test_more_sequences_read_more_experts_and_decode_more_tokens():
    one, many = (
        plan_device_map(FULL, dict.fromkeys(range(2), "h200"), "fp8", context_tokens=512, batch_size=size)
        for size in (1, 8)
    )
    assert sum(one.bytes_read_per_token.values()) > sum(many.bytes_read_per_token.values())
    assert sum(one.bytes_read_per_token.values()) < 8 * sum(many.bytes_read_per_token.values())
    assert one.tokens_per_second < many.tokens_per_second < 8 * one.tokens_per_second


# --- arguments

FP8_CONFIG = AutoConfig.from_pretrained(checkpoint("skywork-moe-tiny-fp8"))


@pytest.mark.parametrize(
    ("config", "quantization", "methods"),
    [
        (FULL, None, ("", "", "")),
        (FULL, "fp8", ("fp8", "fp8", "fp8")),
        (FULL, "int8", ("int8", "int8", "int8")),
        (FULL, {"gpu": "fp8", "cpu": "int8"}, ("fp8", "fp8", "int8")),
        (FULL, {0: "fp8", 1: "int8", "cpu": "int8"}, ("fp8", "int8", "int8")),
        (FULL, {"cuda:0": "fp8", "cuda:1": "int8", "cpu": "int8"}, ("fp8", "int8", "int8")),
        (FULL, {"quant_method": "fp8", "activation_scheme": "dynamic"}, ("fp8", "fp8", "fp8")),
        (FULL, SkyworkFp8Config("none"), ("fp8-weight-only",) * 3),
        (FULL, SkyworkFp8Config(int8_devices="without_fp8"), ("fp8", "int8", "int8")),
        (FULL, SkyworkFp8Config(int8_devices=["cpu", 1]), ("fp8", "int8", "int8")),
        (FULL, SkyworkInt8Config(), ("int8", "int8", "int8")),
        (FULL, BitsAndBytesConfig(load_in_8bit=True), ("bnb-int8",) * 3),
        (FULL, BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_use_double_quant=True), ("nf4-double",) * 3),
        (FP8_CONFIG, None, ("fp8-static",) * 3),
        (FP8_CONFIG, {"gpu": "fp8", "cpu": "int8"}, ("fp8-static", "fp8-static", "int8")),
        (FP8_CONFIG, SkyworkFp8Config("dynamic"), ("fp8", "fp8", "fp8")),
        (FP8_CONFIG, "int8", ("int8", "int8", "int8")),
    ],
)
def test_every_form_of_quantization(config, quantization, methods):
    on_gpus_alone = isinstance(quantization, BitsAndBytesConfig)
    cards = dict.fromkeys(range(2), "h200") if on_gpus_alone else {0: "rtx4090", 1: "rtx3090"}
    plan = plan_device_map(config, {**cards, "cpu": "400GiB"}, quantization)
    assert tuple(plan.request.precision.methods.values()) == methods
    if quantization is None:
        assert plan.quantization_config is None
    else:
        assert plan.quantization_config is not None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"strategy": "random"}, "`strategy`='random': expected one of experts, layers"),
        ({"context_tokens": 0}, "`context_tokens`=0"),
        ({"stream_from_rows": -1}, "`stream_from_rows`=-1"),
        ({"dtype": "nope"}, "`dtype`='nope'"),
        ({"quantization": {"quant_method": "gptq", "bits": 4}}, "`quant_method`='gptq' cannot be planned"),
        (
            {"quantization": {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}},
            r"`quant_method`='fp8' cannot be planned; expected one of fp8 \(not in blocks\)",
        ),
        ({"max_memory": {0: "8GiB", "cuda:0": "8GiB"}}, "names a device twice"),
        ({"max_memory": {0: float("inf")}}, "`max_memory` of 0 is inf"),
        ({"max_memory": {0: "-5GiB"}}, "`max_memory` of 0 is '-5GiB'"),
        ({"batch_size": 0}, "`batch_size`=0"),
        ({"quantization": "int3"}, "`quantization`='int3' is unknown"),
        ({"quantization": {"gpu": "fp8"}}, "says nothing of device 'cpu'"),
        ({"quantization": {"gpu": "nf4", "cpu": "int8"}}, "only fp8 and int8 can be mixed"),
        ({"quantization": {"gpu": "fp8", "cpu": "int8", 7: "fp8"}}, "which are no devices"),
        ({"max_memory": {0: "many"}}, "No card called 'many' is known: expected one of rtx3060"),
        ({"max_memory": {0: "RTX 409"}}, "'RTX 409' is known: the nearest are rtx4090, "),
        ({"kv_cache_dtype": "fp4"}, "`kv_cache_dtype`='fp4': expected one of fp8, int8, int4, int2"),
        ({"max_memory": {0: "24parsecs"}}, "`max_memory` of 0 is '24parsecs'"),
        ({"max_memory": {0: -1}}, "`max_memory` of 0 is -1"),
        ({"max_memory": {"toaster": "1GiB"}}, "'toaster' is no device"),
        ({"bandwidth": {5: 100}}, "`bandwidth` names"),
        ({"bandwidth": {0: -5}}, "`bandwidth` of 0 is -5"),
        ({"bandwidth": {0: float("nan")}}, "`bandwidth` of 0 is nan"),
        ({"model": tiny_moe_config(experts_layout="fused")}, 'take strategy="layers"'),
        ({"model": AutoConfig.for_model("llama")}, "expected a Skywork model"),
        ({"model": FP8_CONFIG, "quantization": "bf16"}, "quantised already"),
        ({"model": FP8_CONFIG, "quantization": SkyworkInt8Config()}, "quantised as skywork_fp8 already"),
        (
            {"expert_usage": ExpertUsage([0], torch.ones(1, 4), torch.ones(1, 4, 4), tokens=1)},
            r"`expert_usage` counts \[1, 4\]",
        ),
        ({"stream_from_rows": 3, "strategy": "layers"}, '`stream_from_rows` is for experts .* strategy="layers"'),
        (
            {"expert_usage": "usage.json", "model": tiny_dense_config()},
            "`expert_usage` is for experts .* a dense model",
        ),
        ({"experts_layout": "fused"}, "`experts_layout` is for reading a config, and `model` is one already"),
        ({"model": checkpoint("skywork-moe-tiny"), "contex_tokens": 9}, "`contex_tokens` is unknown"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    options = {"model": tiny_moe_config(), "max_memory": {0: "8GiB", "cpu": "8GiB"}, **arguments}
    with pytest.raises(ValueError, match=message):
        plan_device_map(**options)


def test_bitsandbytes_has_no_place_on_the_cpu_beside_gpus():
    with pytest.raises(ValueError, match="GiB are missing"):
        plan_device_map(FULL, {0: "24GiB", "cpu": "500GiB"}, "nf4")
    plan_device_map(FULL, {"cpu": "500GiB"}, "nf4")


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("RTX 6000 Ada Generation", "rtx6000ada"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA A100-PCIE-40GB", "a100-40gb"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA L40S", "l40s"),
        ("Tesla T4", "t4"),
    ],
)
def test_cards_by_the_names_that_drivers_give(name, found):
    assert devices_of({0: name})[0].name == found


def test_a_laptops_card_is_not_the_desktops():
    with pytest.raises(ValueError, match="No card called"):
        devices_of({0: "NVIDIA GeForce RTX 4090 Laptop GPU"})


def test_dense_config_with_a_small_gpu_splits_layers():
    config = tiny_dense_config(num_hidden_layers=6)
    roomy = plan_device_map(config, {0: "8GiB"}, context_tokens=16)
    budget = sum(roomy.bytes_per_device[0].values()) - roomy.weight_bytes(0) // 2
    plan = plan_device_map(config, {0: budget, "cpu": "1GiB"}, context_tokens=16)
    assert set(plan.placement.dense) == {0, "cpu"}
    assert plan.device_map["lm_head"] == "cpu"
