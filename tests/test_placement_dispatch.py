"""Models loaded by plans and expert-level maps: results, devices, copies and waits, on simulated accelerators beside
the CPU and the disk, with accelerate's real hooks."""

from __future__ import annotations

import mmap
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated_device import SimulatedDevices
from tiny import checkpoint, golden, tiny_dense_config, tiny_moe_config, tokens
from torch import nn
from transformers import AutoModelForCausalLM, cache_utils

from skywork_hf import (
    SkyworkForCausalLM,
    SkyworkFp8Config,
    SkyworkInt8Config,
    SkyworkMoeForCausalLM,
    placement_report,
    plan_device_map,
)
from skywork_hf.modeling_skywork_moe import SkyworkMoeExpert, SkyworkMoeExperts
from skywork_hf.placement import PlacementPlan, dispatch
from skywork_hf.placement.report import log_loading
from skywork_hf.quantization import matmul
from skywork_hf.quantization.linear import SkyworkFp8Linear, SkyworkInt8Linear

MOE, FP8 = "skywork-moe-tiny", "skywork-moe-tiny-fp8"
GPUS = ("lazy:0", "lazy:1")
# Attention of one kind computes the same way everywhere; torch's math path on the simulated devices does not.
TOLERANCE = 2e-5
DENSE_PARTS = ("self_attn", "input_layernorm", "post_attention_layernorm", "block_sparse_moe.gate")


def load(path: Any, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, **{"dtype": torch.float32, **options})


def expert_map(dense: list[str], experts: list[list[str]]) -> dict[str, str]:
    """An explicit map: the device of each layer's dense part, and of each expert."""
    places = {
        "model.embed_tokens": dense[0],
        "model.rotary_emb": dense[0],
        "model.norm": dense[-1],
        "lm_head": dense[-1],
    }
    for number, (device, row) in enumerate(zip(dense, experts, strict=True)):
        layer = f"model.layers.{number}"
        places |= {f"{layer}.{part}": device for part in DENSE_PARTS}
        places |= {f"{layer}.block_sparse_moe.experts.{n}": place for n, place in enumerate(row)}
    return places


@torch.no_grad()
def logits_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return model(ids).logits.cpu()


def expert_devices(model: nn.Module) -> dict[str, set[str]]:
    """Where each expert's outputs come out, filled by the forward passes to come."""
    seen: dict[str, set[str]] = {}
    for name, module in model.named_modules():
        if isinstance(module, SkyworkMoeExpert):
            seen[name] = set()
            module.register_forward_hook(lambda _, __, output, name=name: seen[name].add(str(output.device)))
    return seen


def moe_folder(folder: Path, **changes: Any) -> Path:
    torch.manual_seed(0)
    SkyworkMoeForCausalLM(tiny_moe_config(**changes)).save_pretrained(folder)
    return folder


# --- any map computes the same

PLACES = st.lists(st.lists(st.sampled_from([*GPUS, "cpu", "disk"]), min_size=16, max_size=16), min_size=2, max_size=2)


@settings(max_examples=12, deadline=None)
@given(dense=st.lists(st.sampled_from([*GPUS, "cpu", "disk"]), min_size=2, max_size=2), experts=PLACES)
def test_any_map_gives_the_golden_logits(dense, experts):
    rows = golden(MOE)
    inputs = {key: rows[key] for key in ("input_ids", "attention_mask", "position_ids")}
    with SimulatedDevices(), torch.no_grad():
        model = load(checkpoint(MOE), device_map=expert_map(dense, experts))
        # One device alone is not accelerate's: there the caller moves the inputs, as everywhere.
        logits = model(
            **{key: value.to(dense[0] if dense[0] in GPUS else "cpu") for key, value in inputs.items()}
        ).logits.cpu()
    mask = rows["attention_mask"].bool()
    difference = (logits - rows["logits"])[mask].abs().max().item()
    print(f"largest difference of the logits: {difference:.1e}")
    assert difference <= TOLERANCE


def test_moving_whole_experts_between_gpus_changes_no_bit():
    ids = tokens(1, 12, vocab=200)
    results = []
    for seed in range(3):
        torch.manual_seed(seed)
        experts = [[GPUS[place] for place in torch.randint(2, (16,)).tolist()] for _ in range(2)]
        with SimulatedDevices():
            results.append(logits_of(load(checkpoint(MOE), device_map=expert_map([GPUS[0]] * 2, experts)), ids))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("share", [0.25, 1.0])
def test_cpu_and_disk_alone_change_no_bit(share, tmp_path):
    ids = tokens(2, 12, vocab=200)
    experts = [["disk" if number < 16 * share else "cpu" for number in range(16)] for _ in range(2)]
    placed = load(checkpoint(MOE), device_map=expert_map(["cpu"] * 2, experts))
    assert torch.equal(logits_of(placed, ids), logits_of(load(checkpoint(MOE)), ids))
    assert torch.equal(
        placed.generate(ids, max_new_tokens=5, do_sample=False),
        load(checkpoint(MOE)).generate(ids, max_new_tokens=5, do_sample=False),
    )


@pytest.fixture
def advised(monkeypatch) -> list[tuple[int, int]]:
    """The pages, from address to address, that the kernel is told to read, while models run."""
    told: list[tuple[int, int]] = []

    def note(pages: list[range]) -> None:
        told.extend((weight.start, weight.stop) for weight in pages)

    monkeypatch.setattr("skywork_hf.placement.experts.will_be_read", note)
    return told


def test_the_kernel_is_told_which_experts_on_disk_will_be_read(advised, monkeypatch):
    kept: list[range] = []
    monkeypatch.setattr("skywork_hf.placement.experts.read_only_when_told", kept.extend)
    experts = [["disk" if number < 12 else "cpu" for number in range(16)], ["cpu"] * 16]
    model = load(checkpoint(MOE), device_map=expert_map(["cpu"] * 2, experts))
    assert len(kept) == 12 * 3
    seen = expert_devices(model)
    logits_of(model, tokens(1, 3, vocab=200))
    on_disk = [name for name, place in model.hf_device_map.items() if place == "disk"]
    ran = [model.get_submodule(name) for name in on_disk if seen[name]]
    assert ran
    wanted = set()
    for weight in (parameter for expert in ran for parameter in expert.parameters()):
        start = weight.data_ptr()
        wanted.add((start - start % mmap.PAGESIZE, start + weight.nbytes))
    assert set(advised) == wanted  # not those on the CPU, and the other layer has nothing on the disk


def test_only_chosen_experts_are_read_from_a_disk_where_gradients_are_recorded(advised, tmp_path):
    """They all run, those without a token on no rows; where accelerate would read them, only chosen ones do."""
    everywhere = expert_map(["cpu"] * 2, [["disk"] * 16] * 2)
    model = load(checkpoint(MOE), device_map=everywhere)
    seen = expert_devices(model)
    model(tokens(1, 1, vocab=200))
    assert len(advised) == 2 * 2 * 3  # two experts in each of two layers
    assert all(seen.values())

    SkyworkMoeForCausalLM.from_pretrained(checkpoint(MOE)).bfloat16().save_pretrained(tmp_path)
    model = load(tmp_path, device_map=everywhere)
    seen = expert_devices(model)
    model(tokens(1, 1, vocab=200))
    assert sum(bool(devices) for devices in seen.values()) == 2 * 2


def test_experts_on_disk_are_cast_when_they_are_read(tmp_path):
    """Where the model has another dtype than the files they cannot stay mapped, and are accelerate's."""
    SkyworkMoeForCausalLM(tiny_moe_config()).bfloat16().save_pretrained(tmp_path)
    ids = tokens()
    placed = load(tmp_path, device_map=expert_map(["cpu"] * 2, [["disk"] * 4] * 2))
    assert all(parameter.is_meta for parameter in placed.model.layers[0].block_sparse_moe.experts.parameters())
    assert torch.equal(logits_of(placed, ids), logits_of(load(tmp_path), ids))


# --- experts are computed where they live


def mixed_experts() -> list[list[str]]:
    return [[(*GPUS, "cpu")[number % 3] for number in range(16)] for _ in range(2)]


def test_experts_run_where_the_map_puts_them_and_their_weights_stay():
    places = expert_map([GPUS[0], GPUS[1]], mixed_experts())
    ids = tokens(1, 30, vocab=200)
    with SimulatedDevices() as simulated:
        model = load(checkpoint(MOE), device_map=places)
        assert model.hf_device_map == places
        seen = expert_devices(model)
        simulated.reset()
        logits_of(model, ids)
        rows = ids.numel() * 2 * model.config.hidden_size * 4
        assert all(devices <= {places[name]} for name, devices in seen.items())
        assert {"cpu", *GPUS} == set().union(*seen.values())
        expert = next(iter(model.model.layers[0].block_sparse_moe.experts[2].parameters()))
        assert expert.device.type == "cpu"
        # Nothing as large as a layer's rows goes up but those rows; a matrix of an expert never does.
        uploads = [copy.nbytes for copy in simulated.copies if copy.source.type == "cpu"]
        assert sum(uploads) <= 2 * rows + 2 * ids.nbytes + 8 * 64


@pytest.mark.parametrize("experts", ["gpus", "mixed", "cpu"])
@pytest.mark.parametrize("length", [1, 20])
def test_the_host_waits_once_a_layer(experts, length):
    rows = {"gpus": [list(GPUS) * 8] * 2, "mixed": mixed_experts(), "cpu": [["cpu"] * 16] * 2}[experts]
    ids = tokens(1, length, vocab=200)
    with SimulatedDevices() as simulated, torch.no_grad():
        model = load(checkpoint(MOE), device_map=expert_map([GPUS[0], GPUS[0]], rows))
        ids = ids.to(GPUS[0])
        simulated.reset()
        model(ids)
        assert simulated.host_syncs == model.config.num_hidden_layers
        to_cpu = [copy for copy in simulated.copies if copy.target.type == "cpu"]
        assert sum(not copy.non_blocking for copy in to_cpu) == model.config.num_hidden_layers


def test_gpus_are_given_their_work_before_the_cpu_begins():
    order: list[str] = []
    with SimulatedDevices():
        model = load(checkpoint(MOE), device_map=expert_map([GPUS[0]] * 2, mixed_experts()))
        for module in model.model.layers[0].modules():
            if isinstance(module, SkyworkMoeExpert):
                module.register_forward_pre_hook(lambda module, _: order.append(module.w1.weight.device.type))
        logits_of(model, tokens(1, 30, vocab=200))
    assert order == sorted(order, key=lambda device: device == "cpu")
    assert set(order) == {"cpu", "lazy"}


@pytest.mark.parametrize(
    ("places", "reads"),
    [
        (("lazy:1", "lazy:2"), 1),
        (("lazy:0", "lazy:1"), 1),
        (("lazy:1", "lazy:0"), 1),
        (("cpu", "lazy:1"), 1),
        (("cpu", "lazy:0"), 1),
        (("disk", "lazy:1", "lazy:2", "lazy:0"), 1),
        (("lazy:1", "lazy:2", "lazy:1", "lazy:2"), 2),
        (("lazy:1", "lazy:1"), 2),
        (("cpu", "disk"), 2),
    ],
)
@torch.no_grad()
def test_all_devices_compute_at_the_same_time(places, reads, tmp_path):
    """The time of one token's experts, in reads of one expert's weights; the readable loop takes them one by one."""
    folder = moe_folder(tmp_path, hidden_size=64, intermediate_size=1024, num_hidden_layers=1)
    token, weights = torch.randn(1, 64), torch.full((1, len(places)), 1 / len(places))
    chosen = torch.arange(len(places)).unsqueeze(0)
    wanted = load(folder).model.layers[0].block_sparse_moe.experts(token, chosen, weights)
    with SimulatedDevices() as simulated:
        experts = [*places, *["cpu"] * 4][:4]
        model = load(folder, device_map=expert_map(["lazy:0"], [experts]))
        placed = model.model.layers[0].block_sparse_moe.experts
        nbytes = sum(parameter.nbytes for parameter in placed[0].parameters())
        inputs = [tensor.to("lazy:0") for tensor in (token, chosen, weights)]

        def took(forward: Any) -> float:
            simulated.reset()
            torch.testing.assert_close(forward(*inputs).cpu(), wanted)
            return simulated.elapsed / nbytes

        assert took(placed) == pytest.approx(reads, rel=0.05)
        assert took(lambda *args: SkyworkMoeExperts.forward(placed, *args)) == pytest.approx(len(places), rel=0.05)


@pytest.mark.parametrize("moe", [False, True], ids=["dense", "moe"])
@torch.no_grad()
def test_a_layer_has_one_hook_and_what_all_layers_are_given_is_copied_once_a_device(moe, tmp_path):
    torch.manual_seed(0)
    devices = [GPUS[number] for number in (0, 0, 1, 1, 0, 0)]
    model = SkyworkMoeForCausalLM(tiny_moe_config(num_hidden_layers=6)) if moe else None
    (model or SkyworkForCausalLM(tiny_dense_config(num_hidden_layers=6))).save_pretrained(tmp_path)
    places = expert_map(devices, [[device] * 4 for device in devices])
    if not moe:
        ends = {name: device for name, device in places.items() if ".layers." not in name}
        places = ends | {f"model.layers.{number}": device for number, device in enumerate(devices)}
    ids, plain = tokens(2, 9), load(tmp_path)
    masks = torch.ones(2, 2, 9, dtype=torch.int64)
    masks[0, 0, :4] = masks[1, 1, :6] = 0
    with SimulatedDevices() as simulated:
        placed = load(tmp_path, device_map=places)
        hooks = [sum(hasattr(part, "_hf_hook") for part in layer.modules()) for layer in placed.model.layers]
        assert hooks == [0, 0, 1, 1, 1, 0]
        mask = masks[0].to(GPUS[0])
        for number in range(2):
            mask.copy_(masks[number])
            simulated.reset()
            logits = placed(ids.to(GPUS[0]), attention_mask=mask).logits
            copies = [copy.nbytes for copy in simulated.copies if str(copy.target) == GPUS[1]]
            assert copies.count(9 * 8 * 4) == 2  # cosines and sines
            real = masks[number].bool()
            wanted = plain(ids, attention_mask=masks[number]).logits[real]
            torch.testing.assert_close(logits.cpu()[real], wanted, atol=TOLERANCE, rtol=0)


def test_an_own_map_of_whole_layers_computes_their_experts_on_the_cpu():
    """As "auto" makes them: accelerate brings the attention to the GPU, and the experts stay."""
    names = ("model.embed_tokens", "model.rotary_emb", "model.layers.0", "model.norm", "lm_head")
    places = dict.fromkeys(names, GPUS[0]) | {"model.layers.1": "cpu"}
    ids = tokens(1, 12, vocab=200)
    with SimulatedDevices() as simulated:
        model = load(checkpoint(MOE), device_map=places)
        seen = expert_devices(model)
        simulated.reset()
        logits = logits_of(model, ids)
        matrix = 4 * model.config.hidden_size * model.config.intermediate_size
        assert not [copy for copy in simulated.copies if copy.nbytes == matrix and copy.source.type == "cpu"]
    assert all(devices <= {"cpu" if ".1.block" in name else GPUS[0]} for name, devices in seen.items())
    torch.testing.assert_close(logits, logits_of(load(checkpoint(MOE)), ids), atol=TOLERANCE, rtol=0)


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux what is mapped")
@pytest.mark.parametrize("place", ["cpu", "disk"])
@pytest.mark.parametrize("quantization", [None, "int8", "fp8"])
def test_experts_beside_gpus_stay_mapped(quantization, place, tmp_path):
    from test_weights import mapped_bytes

    folder = moe_folder(tmp_path / "plain")
    if quantization:
        config = {"int8": SkyworkInt8Config, "fp8": SkyworkFp8Config}[quantization]()
        load(folder, quantization_config=config).save_pretrained(tmp_path / "quantised")
        folder = tmp_path / "quantised"
    with SimulatedDevices():
        model = load(folder, device_map=expert_map([GPUS[0]] * 2, [[place] * 4] * 2))
        logits_of(model, tokens())
        assert set(placement_report(model).experts) == {place}
        for _, module in model.named_modules():
            if isinstance(module, SkyworkMoeExperts):
                assert mapped_bytes(module) == sum(parameter.nbytes for parameter in module.parameters())


# --- long prompts


@pytest.mark.parametrize("quantization", [None, "int8", "fp8"])
def test_experts_with_many_rows_are_copied_to_the_gpu(quantization, tmp_path):
    folder = moe_folder(tmp_path)
    places = expert_map([GPUS[0]] * 2, [["cpu"] * 4] * 2)
    config = {"int8": SkyworkInt8Config(), "fp8": SkyworkFp8Config(), None: None}[quantization]
    ids = tokens(2, 10)
    expected = logits_of(load(folder, quantization_config=config), ids)
    with SimulatedDevices() as simulated:
        model = load(folder, device_map=places, quantization_config=config)
        experts = [module for module in model.modules() if isinstance(module, SkyworkMoeExperts)]
        assert all(container.stream_from_rows for container in experts)  # measured
        seen = expert_devices(model)
        for container in experts:
            container.stream_from_rows = 5
        simulated.reset()
        logits = logits_of(model, ids)
        assert simulated.host_syncs == len(experts) + 1  # the last for the logits
        streamed = logits_of(model, ids[:1, :1])  # one token: nobody has five rows
        weights = {parameter.device.type for container in experts for parameter in container.parameters()}
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(streamed, expected[:1, :1], atol=1e-4, rtol=1e-4)
    assert set().union(*seen.values()) == {"cpu", GPUS[0]}
    assert weights == {"cpu"}


def test_training_computes_on_the_cpu_whatever_the_rows(tmp_path):
    folder = moe_folder(tmp_path)
    with SimulatedDevices():
        model = load(folder, device_map=expert_map([GPUS[0]] * 2, [["cpu", GPUS[0], "cpu", GPUS[1]]] * 2))
        for module in model.modules():
            if isinstance(module, SkyworkMoeExperts):
                module.stream_from_rows = 1
        seen = expert_devices(model)
        ids = tokens()
        model(ids, labels=ids).loss.backward()
        found = {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}
    assert all(devices <= {model.hf_device_map[name]} for name, devices in seen.items())
    plain = load(folder)
    plain(ids, labels=ids).loss.backward()
    expected = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-4)


# --- plans


def tight_plan(folder: Any, quantization: Any = None) -> PlacementPlan:
    """For two GPUs that are a little too small, so that the CPU has a part."""
    on_gpus = quantization["gpu"] if isinstance(quantization, dict) else quantization
    roomy = plan_device_map(folder, dict.fromkeys(GPUS, "8GiB"), on_gpus, context_tokens=32)
    everything = max(sum(roomy.bytes_per_device[key].values()) for key in GPUS)
    for percent in range(100, 0, -1):
        weights = max(map(roomy.weight_bytes, GPUS)) * (100 - percent) // 100
        memory = {**dict.fromkeys(GPUS, everything - weights), "cpu": "8GiB"}
        plan = plan_device_map(folder, memory, quantization, context_tokens=32)
        if plan.weight_bytes("cpu"):
            return plan
    raise AssertionError("everything fits")


@pytest.mark.parametrize("quantization", [None, "int8", "fp8", {"gpu": "fp8", "cpu": "int8"}])
def test_a_plan_is_loaded_as_it_was_made(quantization, tmp_path):
    folder = moe_folder(tmp_path, hidden_size=64, intermediate_size=96, num_experts=[8])
    plan = tight_plan(folder, quantization)
    ids = tokens()
    assert 0 < plan.experts_on("cpu") < 16
    with SimulatedDevices():
        model = load(folder, device_map=plan, dtype=None)
        report = placement_report(model)
        logits = logits_of(model, ids)
        generated = model.generate(ids, max_new_tokens=4, do_sample=False).cpu()
        kinds = {
            (module.w1.weight.device.type, type(module.w1)) for module in model.modules() if hasattr(module, "w1")
        }
    assert report.problems == []
    assert {key: report.weight_bytes[key] for key in (*GPUS, "cpu")} == {
        key: plan.weight_bytes(key) for key in (*GPUS, "cpu")
    }
    if isinstance(quantization, dict):
        assert kinds == {("lazy", SkyworkFp8Linear), ("cpu", SkyworkInt8Linear)}
    here = load(folder, quantization_config=plan.quantization_config) if not isinstance(quantization, dict) else None
    if here is not None:
        torch.testing.assert_close(logits, logits_of(here, ids), atol=1e-4, rtol=1e-4)
        assert torch.equal(generated, here.generate(ids, max_new_tokens=4, do_sample=False))


def test_whole_layers_of_a_plan_compute_on_the_cpu(tmp_path):
    torch.manual_seed(0)
    SkyworkForCausalLM(tiny_dense_config(num_hidden_layers=4)).save_pretrained(tmp_path)
    plan = tight_plan(tmp_path)
    places = plan.placement.dense
    assert set(places) == {*GPUS, "cpu"}
    ids = tokens()
    with SimulatedDevices() as simulated:
        model = load(tmp_path, device_map=plan)
        simulated.reset()
        logits = logits_of(model, ids)
        largest = max(copy.nbytes for copy in simulated.copies)
        assert largest <= ids.numel() * 67 * 4  # the logits: no weight moved
        generated = model.generate(ids, max_new_tokens=4, do_sample=False).cpu()
    here = load(tmp_path)
    torch.testing.assert_close(logits, logits_of(here, ids), atol=TOLERANCE, rtol=0)
    assert torch.equal(generated, here.generate(ids, max_new_tokens=4, do_sample=False))


def test_experts_in_one_step(tmp_path):
    folder = moe_folder(tmp_path)
    model = load(folder, device_map="experts", context_tokens=32)
    assert set(model.placement_plan.device_map.values()) == {"cpu"}
    assert model.placement_plan.request.context_tokens == 32
    ids = tokens()
    assert torch.equal(logits_of(model, ids), logits_of(load(folder), ids))
    with SimulatedDevices():
        memory = {**dict.fromkeys(GPUS, "2GiB"), "cpu": "1GiB"}
        model, info = load(
            folder,
            device_map="experts",
            max_memory=memory,
            context_tokens=32,
            output_loading_info=True,
            quantization_config=SkyworkInt8Config(),
            stream_from_rows=7,
        )
    assert not any(info.values())
    assert model.placement_plan.experts_on("cpu") == 0
    assert {str(parameter.device) for parameter in model.parameters()} == set(GPUS)


def test_what_does_not_fit_is_refused_before_anything_is_read(tmp_path):
    folder = moe_folder(tmp_path)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"does not fit .* GiB are missing"):
        load(folder, device_map="experts", max_memory={"cpu": "100KiB"})


def test_a_placed_model_saves_as_any_other(tmp_path):
    folder = moe_folder(tmp_path / "first")
    experts = [["cpu", GPUS[0], GPUS[1], "disk"]] * 2
    with SimulatedDevices():
        load(folder, device_map=expert_map([GPUS[0], GPUS[1]], experts)).save_pretrained(tmp_path / "second")
    for (name, one), (other_name, other) in zip(
        load(folder).state_dict().items(), load(tmp_path / "second").state_dict().items(), strict=True
    ):
        assert name == other_name
        assert torch.equal(one, other)


def test_adapters_train_on_a_placed_model(tmp_path):
    peft = pytest.importorskip("peft")
    folder = moe_folder(tmp_path)
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "w1", "w2"], init_lora_weights=False)

    def gradients(model: Any) -> dict[str, torch.Tensor]:
        torch.manual_seed(1)
        adapted = peft.get_peft_model(model, lora)
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora" in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) / 8)
        ids = (torch.arange(20) % 60 + 3).view(2, 10)
        adapted(input_ids=ids, labels=ids).loss.backward()
        return {name: p.grad.cpu() for name, p in adapted.named_parameters() if p.grad is not None}

    with SimulatedDevices():
        places = expert_map([GPUS[0], GPUS[1]], [["cpu", GPUS[0], GPUS[1], "cpu"]] * 2)
        placed = gradients(load(folder, device_map=places))
    plain = gradients(load(folder))
    assert placed.keys() == plain.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(placed[name], gradient, atol=1e-5, rtol=1e-4)


# --- nothing silent


@pytest.mark.skipif(not hasattr(cache_utils, "Fp8QuantizedLayer"), reason="transformers has no cache in FP8")
def test_a_cache_that_is_planned_in_fp8_is_generated_with(tmp_path):
    model = load(moe_folder(tmp_path), device_map="experts", context_tokens=32, kv_cache_dtype="fp8")
    call = "generate(cache_implementation=\"quantized\", cache_config={'backend': 'fp8'})"
    assert call in str(model.placement_plan)
    options = {"cache_implementation": "quantized", "cache_config": {"backend": "fp8"}}
    assert model.generate(tokens(1, 8), max_new_tokens=4, min_new_tokens=4, **options).shape == (1, 12)


def misplaced(monkeypatch: Any, path: str = "model.layers.1.block_sparse_moe.experts.2") -> None:
    """Have loading put one expert elsewhere than the plan that is then kept says."""
    kept = dispatch.compute_where_the_weights_are

    def change(model: Any, plan: Any = None) -> None:
        kept(model, plan)
        moved = {**plan.placement.device_map, path: "disk"}
        model.placement_plan = replace(plan, placement=replace(plan.placement, device_map=moved))

    monkeypatch.setattr(dispatch, "compute_where_the_weights_are", change)


def test_what_is_elsewhere_is_warned_of_after_loading_and_an_error_where_asked(tmp_path, monkeypatch, caplog):
    folder = moe_folder(tmp_path)
    misplaced(monkeypatch)
    model = load(folder, device_map="experts", context_tokens=32)
    said = "`model.layers.1.block_sparse_moe.experts.2` is on 'cpu', planned on 'disk'."
    assert said in placement_report(model).problems
    assert [record.message for record in caplog.records if said in record.message] == [
        f"One thing is not as planned: {said} strict_placement=True makes errors of it."
    ]
    with pytest.raises(ValueError, match=r"One thing is not as planned: `model\.layers\.1\..*'disk'\.$"):
        load(folder, device_map="experts", context_tokens=32, strict_placement=True)


def test_an_expert_left_in_16_bit_is_always_an_error(tmp_path, monkeypatch):
    folder = moe_folder(tmp_path)
    kept = dispatch.compute_where_the_weights_are

    def change(model: Any, plan: Any = None) -> None:
        kept(model, plan)
        path = "model.layers.1.block_sparse_moe.experts.2.w2"
        model.set_submodule(path, model.get_submodule(path).dequantize(torch.bfloat16))

    monkeypatch.setattr(dispatch, "compute_where_the_weights_are", change)
    with pytest.raises(ValueError, match=r"experts\.2\.w2` was left in bfloat16"):
        load(folder, device_map="experts", context_tokens=32, quantization_config=SkyworkInt8Config())


def test_the_report_never_raises_and_names_what_differs(tmp_path, monkeypatch):
    """Of another shape, on other devices, by a map with gaps; as where the card that is there has no FP8 unit."""
    folder = moe_folder(tmp_path / "moe", hidden_size=64, intermediate_size=96)
    monkeypatch.setattr(matmul, "has_fp8_unit", lambda device: False)
    plan = plan_device_map(folder, {0: "rtx4090"}, "fp8", context_tokens=32)
    assert plan.kernel(0) == "scaled_mm"
    model = load(folder, quantization_config=SkyworkFp8Config())
    elsewhere = placement_report(model, plan).problems
    assert any("is on 'cpu', planned on 0" in problem for problem in elsewhere)
    assert any("'cpu' holds " in problem and "0 GiB were planned" in problem for problem in elsewhere)
    monkeypatch.setattr("skywork_hf.placement.report._key_of", lambda *_: 0)
    assert "runs numba on 0, where scaled_mm was planned" in str(placement_report(model, plan))
    monkeypatch.undo()
    SkyworkForCausalLM(tiny_dense_config()).save_pretrained(tmp_path / "dense")
    for other in (plan_device_map(tmp_path / "dense", {"cpu": "1GiB"}), plan_device_map(folder, {"cpu": "1GiB"})):
        other.placement.device_map.pop("model.layers.1.block_sparse_moe.experts.3", None)
        assert placement_report(model, other).problems
    model.hf_device_map = {"lm_head": "disk"}
    assert placement_report(model, plan).problems
    with pytest.raises(TypeError, match=r"`lenient` is no argument .* is in the report's `problems`"):
        placement_report(model, lenient=True)


def test_loading_says_where_experts_are_and_which_kernels_run(tmp_path, caplog, monkeypatch):
    """And what is slow, as a warning; also of experts on a device that the plan has not."""
    caplog.set_level("INFO", logger="skywork_hf")
    load(moe_folder(tmp_path), device_map="experts", context_tokens=32, quantization_config=SkyworkInt8Config())
    said = [record for record in caplog.records if record.name.endswith("report")]
    assert [record.levelname for record in said] == ["INFO", "INFO"]
    assert said[0].message.endswith("one sequence of 32 tokens: experts 8 on CPU.")
    assert said[1].message.startswith("Experts run for one token, by dtype and kernel, on CPU: int8 ")
    caplog.clear()
    plan = plan_device_map(tmp_path, {0: "p40"}, "fp8", context_tokens=32, dtype="bfloat16")
    monkeypatch.setattr("skywork_hf.placement.report._key_of", lambda *_: "lazy:7")
    log_loading(placement_report(load(tmp_path), plan), plan)
    assert "experts 8 on GPU lazy:7." in caplog.records[0].message
    assert caplog.records[2].levelname == "WARNING"
    assert caplog.records[2].message.startswith("Slow: 0: no fast kernel for one token of fp8 (dequantize); ")
    assert "0: no bfloat16 unit" in caplog.records[2].message


def test_the_report_of_a_model_without_a_plan(tmp_path):
    report = placement_report(load(moe_folder(tmp_path)))
    assert report.planned_bytes is None
    assert report.experts["cpu"] == {("float32", "linear"): 8}
    assert "8 x float32 linear" in str(report)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"quantization_config": SkyworkInt8Config()}, r"`quantization_config`=\{'cpu': 'int8'\} is not the plan's"),
        ({"experts_layout": "fused"}, "`experts_layout`=fused is not the plan's modular"),
        (
            {"num_hidden_layers": 1, "router_aux_loss_coef": 0.5},
            "`num_hidden_layers`, `router_aux_loss_coef`=1, 0.5 is not the plan's 2, 0.01",
        ),
        ({"max_memory": {"cpu": "2KiB"}}, "`max_memory`=.* is not the plan's"),
        ({"dtype": torch.float16}, "`dtype`=torch.float16 is not the plan's torch.float32"),
        ({"torch_dtype": "bfloat16"}, "`torch_dtype`=bfloat16 is not the plan's torch.float32"),
        ({"context_tokens": 9}, "`context_tokens` is for .* a plan has its own"),
    ],
)
def test_what_differs_from_a_plan_is_refused(arguments, message):
    plan = plan_device_map(checkpoint(MOE), {"cpu": "1GiB"}, context_tokens=32, dtype=torch.float32)
    with pytest.raises(ValueError, match=message):
        load(checkpoint(MOE), device_map=plan, **arguments)


def test_what_a_plan_says_may_be_said_again(tmp_path):
    folder = moe_folder(tmp_path)
    plan = plan_device_map(folder, {"cpu": "1GiB"}, "int8", context_tokens=32)
    again = {"max_memory": {"cpu": "1GiB"}, "dtype": "float32", "quantization_config": SkyworkInt8Config()}
    model = load(folder, device_map=plan, router_aux_loss_coef=0.5, **again)
    assert model.config.router_aux_loss_coef == 0.5
    assert placement_report(model).experts["cpu"] == {("int8", plan.kernel("cpu")): 8}


@pytest.mark.parametrize("name", [MOE, "skywork-13b-tiny"])
@pytest.mark.parametrize("device_map", [None, "cpu", {"": "cpu"}])
@pytest.mark.parametrize(
    "argument",
    [
        {"context_tokens": 9},
        {"batch_size": 2},
        {"strategy": "layers"},
        {"expert_usage": "usage.json"},
        {"bandwidth": {"cpu": 60}},
        {"stream_from_rows": 3},
        {"kv_cache_dtype": "fp8"},
        {"strict_placement": True},
    ],
    ids=lambda argument: next(iter(argument)),
)
def test_what_is_for_planning_is_refused_without(name, device_map, argument):
    with pytest.raises(ValueError, match=f'`{next(iter(argument))}` is for device_map="experts"'):
        load(checkpoint(name), device_map=device_map, **argument)


@pytest.mark.parametrize("device_map", [None, "experts"])
def test_the_old_name_is_refused_with_the_new_one(device_map):
    with pytest.raises(ValueError, match=r"`lenient_placement` is gone: .* `strict_placement=True`"):
        load(checkpoint(MOE), device_map=device_map, lenient_placement=True)


@pytest.mark.parametrize("device_map", ["expert", "Experts", "plan.json"])
def test_a_device_map_that_nobody_knows(device_map):
    with pytest.raises(ValueError, match=f"`device_map`='{device_map}' is unknown: expected \"experts\""):
        load(checkpoint(MOE), device_map=device_map)
