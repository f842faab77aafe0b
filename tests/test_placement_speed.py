"""Expected speed: held against the bound, and what must follow from more bytes and faster devices; calibrations."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated_device import SimulatedDevices
from tiny import tiny_moe_config

from skywork_hf import SkyworkMoeConfig
from skywork_hf.cli import main
from skywork_hf.placement import PlacementPlan, devices, measure, plan_device_map
from skywork_hf.placement.calibration import Calibration, rates_of, this_machine
from skywork_hf.placement.devices import CARDS, Device
from skywork_hf.placement.rates import CARD_RATES, Disk, KernelRate, Rates, expected_cpu
from skywork_hf.placement.speed import Machine, Step, expected_seconds

GIB = 2**30
MEASURED = Rates(
    name="some CPU",
    is_measured=True,
    memory=20e9,
    kernels=tuple(
        KernelRate(part, method, kernel, rows, seconds)
        for part in ("linear", "expert")
        for method in ("", "int8", "fp8")
        for kernel, rows, seconds in (("fast", 1, 0.06), ("fast", 64, 0.5), ("dequantize", 1, 2.0))
    ),
    layer={"": 3e-4, "int8": 4e-4, "fp8": 4e-4},
    expert={"": 3e-5, "int8": 5e-5, "fp8": 5e-5},
    step=2e-4,
    elements=1e9,
    attention=1e11,
)
CALIBRATION = Calibration({"CPU": "some CPU"}, MEASURED, (), Disk(1e9, 1e-3))


def seconds_of(plan: PlacementPlan, step: Step, **changes: float) -> float:
    """What a plan's placement is expected to take on its devices, with some of them changed."""
    request, placement = plan.request, plan.placement
    faster, larger = changes.get("faster", 1.0), changes.get("larger", 1.0)
    known = {
        device.key: replace(device, bandwidth=device.bandwidth and device.bandwidth * faster)
        for device in request.devices
    }
    methods, dtype = request.precision.methods, request.precision.dtype
    rates = rates_of(known.values(), dtype, None)
    machine = Machine(known, methods, rates, Disk(1e9 * faster, 1e-3 / faster), dtype, request.config)
    parts = request.parts
    if larger != 1.0:
        layers = [
            replace(layer, experts=[replace(part, plain=part.plain + int(larger)) for part in layer.experts])
            for layer in parts.layers
        ]
        parts = replace(parts, layers=layers)

    def size(part, key):
        return part.nbytes(methods[key], parts.itemsize)

    loads = [[1.0] * len(layer) for layer in placement.experts if layer]
    lm_head = placement.device_map["lm_head"]
    where = placement.dense, lm_head, placement.experts
    return sum(expected_seconds(machine, parts, size, *where, step, loads, placement.stream_from_rows).values())


@settings(max_examples=20, deadline=None)
@given(
    gpu=st.sampled_from([None, "rtx3090", "h100", "t4"]),
    room=st.integers(0, 200),
    batch=st.integers(1, 4),
    quantization=st.sampled_from([None, "int8", "fp8"]),
    bandwidth=st.floats(1, 500),
    calibrated=st.booleans(),
)
def test_nothing_is_faster_than_its_bound_and_more_never_takes_less(
    gpu, room, batch, quantization, bandwidth, calibrated
):
    config = tiny_moe_config(num_experts=[16], hidden_size=64, intermediate_size=96, num_hidden_layers=3)
    memory = {"cpu": GIB} if gpu is None else {0: gpu, 1: 2 * GIB + room * 2**14, "cpu": GIB}
    plan = plan_device_map(
        config,
        memory,
        quantization,
        batch_size=batch,
        bandwidth={"cpu": bandwidth, **({1: 3 * bandwidth} if gpu else {})},
        calibration=CALIBRATION if calibrated else None,
    )
    assert plan.expected_tokens_per_second <= plan.tokens_per_second
    for step in (Step(batch, 64 * batch, batch), Step(64 * batch, 64 * batch, batch)):
        time = seconds_of(plan, step)
        assert time > 0
        assert seconds_of(plan, step, larger=1000) >= time
        assert seconds_of(plan, step, faster=1.5) <= time


def test_a_disk_counts_where_experts_are_on_it():
    config = tiny_moe_config(num_experts=[16])
    unknown = plan_device_map(config, {"cpu": 400_000, "disk": GIB}, bandwidth={"cpu": 10})
    assert unknown.experts_on("disk")
    assert unknown.placement.expected is None
    assert "give the bandwidth of disk, or a calibration of that machine" in str(unknown)
    plan = plan_device_map(config, {"cpu": 400_000, "disk": GIB}, calibration=CALIBRATION)
    everything = plan_device_map(config, {"cpu": GIB}, calibration=CALIBRATION)
    assert plan.placement.expected.decode["disk", "disk"] > 0
    assert plan.expected_tokens_per_second < everything.expected_tokens_per_second
    assert "reading the disk" in str(plan)
    assert "expected speeds are from speeds that were measured" in str(plan)


def test_rates_between_those_that_are_known():
    assert MEASURED.seconds("expert", "int8", "fast", 1) == 0.06
    assert MEASURED.seconds("expert", "fp8-static", "fast", 0.5) == 0.06
    assert 0.06 < MEASURED.seconds("expert", "int8", "fast", 8) < 0.5
    assert MEASURED.seconds("expert", "int8", "fast", 128) == 1.0
    assert MEASURED.seconds("expert", "int8", "dequantize", 1) == 2.0
    assert MEASURED.seconds("expert", "int8", "a kernel of tomorrow", 1) == 0.06  # what ran instead


def test_methods_that_were_not_measured_are_as_tables_have_them():
    cpu = rates_of([Device("cpu", "", GIB)], torch.bfloat16, CALIBRATION)["cpu"]
    assert cpu.seconds("expert", "nf4", "bitsandbytes", 1) == expected_cpu(20e9).seconds("expert", "nf4", "", 1)
    assert cpu.host("nf4", "layer") == expected_cpu(20e9).host("nf4", "layer")
    assert cpu.seconds("expert", "int8", "fast", 1) == 0.06


def test_every_card_has_a_bus():
    assert CARDS.keys() <= CARD_RATES.keys()


def streaming_plan(**options) -> PlacementPlan:
    """Of some layers as large as the real ones, more than one card holds."""
    asked = {"context_tokens": 2048, **options}
    config, memory = SkyworkMoeConfig(num_hidden_layers=9), {0: "rtx4090", "cpu": "128GiB"}
    return plan_device_map(config, memory, {"gpu": "fp8", "cpu": "int8"}, **asked)


def test_from_how_many_rows_on_experts_are_copied_follows_from_speeds():
    rows = [streaming_plan(bandwidth={"cpu": speed}).placement.stream_from_rows for speed in (60, 60, 200)]
    assert rows[0] == rows[1]
    assert 1 < rows[2] < rows[0] < 64  # memory that is read faster is copied from faster
    unknown = streaming_plan()  # stated in `rates`
    assert unknown.placement.stream_from_rows is not None
    assert unknown.placement.expected is None
    assert f"copied to a GPU where they get {rows[0]} rows of a prompt" in str(streaming_plan(bandwidth={"cpu": 60}))
    assert streaming_plan(stream_from_rows=7).placement.stream_from_rows == 7
    slow_cpu = replace(MEASURED, kernels=tuple(replace(rate, seconds=rate.seconds * 9) for rate in MEASURED.kernels))
    fewer, more = (
        streaming_plan(calibration=replace(CALIBRATION, cpu=cpu)).placement.stream_from_rows
        for cpu in (slow_cpu, MEASURED)
    )
    assert fewer < more


def test_a_plan_of_sizes_asks_nothing_of_the_cards_that_are_here(monkeypatch):
    monkeypatch.setattr(devices, "card_here", lambda key: pytest.fail("asked"))
    plan = plan_device_map(tiny_moe_config(), {0: "2GiB", "cpu": "1GiB"})
    assert plan.request.devices[0].bandwidth is None


def test_a_saved_plan_says_the_same_and_an_older_one_is_refused(tmp_path):
    plan = streaming_plan(calibration=CALIBRATION)
    plan.save(tmp_path / "plan.json")
    loaded = PlacementPlan.load(tmp_path / "plan.json")
    assert str(loaded) == str(plan)
    assert str(loaded.will_it_help("rtx3090")) == str(plan.will_it_help("rtx3090"))
    content = json.loads((tmp_path / "plan.json").read_text())
    (tmp_path / "old.json").write_text(json.dumps({**content, "format": "skywork_hf placement plan 2"}))
    with pytest.raises(ValueError, match=r"its format is 'skywork_hf placement plan 2', .* plan again"):
        PlacementPlan.load(tmp_path / "old.json")


def test_calibrations_are_written_whole_and_read_back(tmp_path):
    CALIBRATION.save(tmp_path / "machine.json")
    assert Calibration.load(tmp_path / "machine.json") == CALIBRATION
    with pytest.raises(ValueError, match="JSON compliant"):
        replace(CALIBRATION, disk=Disk(math.nan, 0.0)).save(tmp_path / "machine.json")
    assert Calibration.load(tmp_path / "machine.json") == CALIBRATION
    assert [file.name for file in tmp_path.iterdir()] == ["machine.json"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: "{", "is not JSON"),
        (lambda content: "[]", "does not hold a JSON object"),
        (lambda content: {**content, "format": "something"}, "its format is 'something'"),
        (lambda content: {key: value for key, value in content.items() if key != "cpu"}, "'cpu'"),
        (lambda content: {**content, "cpu": {**content["cpu"], "memory": -1}}, "-1 is no speed"),
        (lambda content: {**content, "cpu": {**content["cpu"], "step": "soon"}}, "not supported between"),
        (lambda content: {**content, "cpu": {**content["cpu"], "kernels": []}}, "says nothing of"),
        (lambda content: {**content, "disk": {"bandwidth": 0, "latency": 0}}, "0 is no speed"),
    ],
)
def test_one_sentence_for_what_is_no_calibration(change, message, tmp_path):
    changed = change(CALIBRATION.to_dict())
    (tmp_path / "machine.json").write_text(changed if isinstance(changed, str) else json.dumps(changed))
    with pytest.raises(ValueError, match="holds no calibration") as error:
        plan_device_map(tiny_moe_config(), {"cpu": GIB}, calibration=tmp_path / "machine.json")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_calibration_of_another_machine_is_for_plans_of_other_devices():
    machine = this_machine()
    elsewhere = replace(CALIBRATION, machine={**machine, "threads": 99, "version of torch": "1.0"})
    with pytest.raises(ValueError, match=r"its threads is 99 and here it is \d+, its version of torch is '1.0'"):
        plan_device_map(tiny_moe_config(), calibration=elsewhere)
    assert plan_device_map(tiny_moe_config(), {"cpu": GIB}, calibration=elsewhere).expected_tokens_per_second
    assert plan_device_map(tiny_moe_config(), calibration=replace(CALIBRATION, machine=machine))


def test_a_card_is_found_in_a_calibration_by_its_name():
    card = replace(MEASURED, name="rtx3090", wait=1.0, bus=1e9, streaming=1e9)
    found = replace(CALIBRATION, gpus=(card,))
    cards = {0: "RTX 3090", 1: "rtx4090"}
    plan = plan_device_map(tiny_moe_config(), cards, dtype=torch.float32, calibration=found)  # the host asks
    assert plan.placement.expected.decode["waits", 0] >= 1.0
    assert "from tables, not measured" in str(plan_device_map(tiny_moe_config(), {0: "rtx4090"}, calibration=found))


@pytest.fixture
def quick(monkeypatch):
    """Measures on little, so that it takes a second."""
    monkeypatch.setattr(measure, "_SHAPE", {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2})
    small = {
        "_HIDDEN": 64,
        "_INTERMEDIATE": 96,
        "_EXPERTS": 2,
        "_ROWS": (1, 64),
        "_ROUNDS": 1,
        "_SECONDS": 0.0,
        "_LONG": 0.0,
    }
    small |= {
        "_LAYERS": (1, 2),
        "_FILE": 3 * 2**22,
        "_PIECES": (2**16, 2**20),
        "_COPY": 2**16,
        "_WIDE_TOKENS": (2, 8),
        "_DECODED": 1,
        "_SMALL": {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "vocab_size": 64},
    }
    for name, value in small.items():
        monkeypatch.setattr(measure, name, value)
    monkeypatch.setattr(measure, "measured_bandwidth", lambda device: 10e9)


def test_calibrate_measures_and_plan_takes_it(quick, tmp_path, capsys):
    file = tmp_path / "machine.json"
    main(["calibrate", "--output", str(file), "--folder", str(tmp_path)])
    assert f"Wrote {file}." in capsys.readouterr().out
    calibration = Calibration.load(file)
    assert calibration.machine == this_machine()
    assert {rate.method for rate in calibration.cpu.kernels} == {"", "int8", "fp8"}
    tiny_moe_config().save_pretrained(tmp_path / "tiny")
    main(["plan", str(tmp_path / "tiny"), "--calibration", str(file)])
    printed = capsys.readouterr().out
    assert "measured here" not in printed
    assert "expected speeds are from speeds that were measured" in printed
    with pytest.raises(SystemExit, match=r"skywork-hf: .*nowhere\.json is not there"):
        main(["plan", str(tmp_path / "tiny"), "--calibration", "nowhere.json"])
    with pytest.raises(SystemExit, match=r"skywork-hf: .*nowhere"):
        main(["calibrate", "--folder", str(tmp_path / "nowhere")])


def test_a_gpu_is_measured_by_the_same_means(quick):
    with torch.no_grad(), SimulatedDevices() as simulated:
        rates = measure._device_rates(torch.device("lazy:0"), "a card", lambda text: None)
        assert simulated.host_syncs
    assert rates.name == "a card"
    assert all(math.isfinite(getattr(rates, name)) for name in ("wait", "latency", "bus", "streaming"))
    assert {rate.method for rate in rates.kernels} == {"", "int8", "fp8"}
