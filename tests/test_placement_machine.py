"""Plans that were made on another machine, on this one: GPUs that are not here, or are others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import tiny_moe_config
from transformers import AutoModelForCausalLM

from skywork_hf import SkyworkMoeForCausalLM, plan_device_map
from skywork_hf.placement import PlacementPlan, machine
from skywork_hf.placement.devices import CARDS, GIB
from skywork_hf.placement.machine import GpuHere, differences
from skywork_hf.quantization.cards import FP8_CAPABILITY, TRITON_CAPABILITY


def card(name: str, free: float | None = None) -> GpuHere:
    memory = int(CARDS[name].memory * GIB)
    has = (CARDS[name].capability >= needed for needed in (FP8_CAPABILITY, TRITON_CAPABILITY))
    return GpuHere(name, memory, memory if free is None else int(free * GIB), *has)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> Any:
    """A model of which only the config is here, so that reading anything fails otherwise than these tests expect."""
    folder = tmp_path_factory.mktemp("moe")
    tiny_moe_config(hidden_size=64, intermediate_size=96, architectures=["SkyworkMoeForCausalLM"]).save_pretrained(
        folder
    )
    return folder


@pytest.mark.parametrize(
    ("memory", "here", "message"),
    [
        ({0: "rtx4090", 1: "rtx4090"}, [], "uses GPU 0 and 1, and this machine has no GPUs: plan for the GPUs that"),
        ({0: "24GiB", 1: "24GiB"}, ["rtx4090"], "uses GPU 1, and this machine has 1 GPU:"),
        ({2: "t4", 3: "t4"}, ["t4", "t4"], "uses GPU 2 and 3, and this machine has 2 GPUs:"),
    ],
)
def test_gpus_that_are_not_here_are_named_before_anything_is_read(
    memory, here, message, folder, tmp_path, monkeypatch
):
    monkeypatch.setattr(machine, "gpus_here", lambda: [card(name) for name in here])
    plan = plan_device_map(folder, memory, context_tokens=32)
    plan.save(tmp_path / "plan.json")
    for device_map in (PlacementPlan.load(tmp_path / "plan.json"), "experts"):
        options = {"max_memory": memory, "context_tokens": 32} if device_map == "experts" else {}
        with pytest.raises(ValueError, match=message):
            AutoModelForCausalLM.from_pretrained(folder, device_map=device_map, **options)


def test_a_card_with_less_memory_than_the_plan_fills(folder, monkeypatch):
    """The margin alone may be less than planned, which is warned of: drivers differ in what torch sees."""
    plan = plan_device_map(folder, {0: "rtx4090"}, context_tokens=32)
    monkeypatch.setattr(machine, "gpus_here", lambda: [GpuHere("small", GIB // 2, GIB // 2, True, True)])
    assert "are free" in differences(plan)[0]
    monkeypatch.setattr(machine, "gpus_here", lambda: [GpuHere("tiny", 2**16, 2**16, True, True)])
    with pytest.raises(
        ValueError, match=r"GPU 0 rtx4090 holds .* GiB by the plan, and the tiny here has .* GiB: plan"
    ):
        AutoModelForCausalLM.from_pretrained(folder, device_map=plan)


def test_cards_that_run_the_plan_otherwise_are_warned_of(folder, monkeypatch):
    plan = plan_device_map(folder, {0: "rtx4090", 1: "rtx4090"}, "fp8", context_tokens=32)
    monkeypatch.setattr(machine, "gpus_here", lambda: [card("rtx4090", free=0.5), card("v100")])
    full, slow = differences(plan)
    assert full.startswith("GPU 0 rtx4090 takes 0.825")  # without the context, which is there
    assert "0.5 GiB are free" in full
    assert slow == "GPU 1 rtx4090 was to run triton, and the v100 here runs dequantize."
    with pytest.raises(ValueError, match=r"2 things are not as planned: GPU 0 .* runs dequantize\.$"):
        AutoModelForCausalLM.from_pretrained(folder, device_map=plan, strict_placement=True)


def test_where_all_is_as_planned_nothing_is_said(folder, monkeypatch):
    monkeypatch.setattr(machine, "gpus_here", lambda: [card("rtx4090"), card("rtx3090")])
    for memory in ({0: "rtx4090", 1: "24GiB"}, {1: "rtx3090", "cpu": "1GiB"}, {"lazy:7": "2GiB"}, {"cpu": "1GiB"}):
        assert differences(plan_device_map(folder, memory, "fp8", context_tokens=32)) == []
    monkeypatch.setattr(machine, "gpus_here", lambda: None)  # accelerators of another make
    assert differences(plan_device_map(folder, {5: "t4"}, context_tokens=32)) == []


def test_this_machine_is_asked(tmp_path):
    here = machine.gpus_here()
    assert here is None or len(here) == torch.cuda.device_count()
    SkyworkMoeForCausalLM(tiny_moe_config()).save_pretrained(tmp_path)
    plan = plan_device_map(tmp_path, {"cpu": "1GiB"}, context_tokens=32)
    assert (
        AutoModelForCausalLM.from_pretrained(tmp_path, device_map=plan, strict_placement=True).placement_plan is plan
    )
