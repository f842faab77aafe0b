"""`skywork-hf plan`, as a user sees it."""

from __future__ import annotations

import sys

import pytest
from test_placement_usage import skewed_usage
from tiny import tiny_moe_config

from skywork_hf import SkyworkMoeConfig, placement
from skywork_hf.cli import main
from skywork_hf.placement import PlacementPlan


@pytest.fixture
def folder(tmp_path):
    """Only a config, of 146B parameters: nothing else is read."""
    SkyworkMoeConfig().save_pretrained(tmp_path / "moe")
    return str(tmp_path / "moe")


@pytest.fixture
def tiny(tmp_path):
    tiny_moe_config().save_pretrained(tmp_path / "tiny")
    return str(tmp_path / "tiny")


def refusal(*arguments: str) -> str:
    with pytest.raises(SystemExit) as exit_:
        main(["plan", *arguments])
    message = str(exit_.value)  # a text is printed, and the status is 1
    assert message.startswith("skywork-hf: ")
    assert "\n" not in message
    return message


def test_the_table_and_the_map(folder, capsys):
    main(["plan", folder, "--gpu", "8x24GiB", "--quantization", "fp8"])
    printed = capsys.readouterr().out
    assert "one sequence of 8,192 tokens; GiB" in printed
    assert printed.count("0123456701234567") == 52
    assert "give the bandwidth of 0, 1, 2, 3, 4, 5, 6, 7" in printed
    assert "cpu" not in printed


def test_everything_that_can_be_asked(folder, tmp_path, capsys):
    options = "--gpu 2xrtx4090 --gpu rtx3090 --ram 200GiB --quantization gpu=fp8 cpu=int8 --context 2048 --batch 2"
    options += " --kv-cache-dtype fp8"
    more = f"--bandwidth cpu=60 --will-it-help rtx3090 --figure {tmp_path}/plan.png --save {tmp_path}/plan.json"
    main(["plan", folder, *options.split(), *more.split()])
    printed = capsys.readouterr().out
    assert "2 sequences of 2,048 tokens, KV cache in fp8" in printed
    assert "int8 (numba)" in printed
    assert "of the time reading experts on CPU" in printed
    assert "One more rtx3090: 23.56 GiB" in printed
    assert "measured here" not in printed
    assert (tmp_path / "plan.png").stat().st_size > 10_000
    plan = PlacementPlan.load(tmp_path / "plan.json")
    assert str(plan) in printed
    assert [device.name for device in plan.request.devices] == ["rtx4090", "rtx4090", "rtx3090", ""]


def test_the_devices_that_are_there(tiny, tmp_path, capsys):
    skewed_usage().save(tmp_path / "usage.json")
    main(["plan", tiny, "--usage", str(tmp_path / "usage.json")])
    assert "tokens a second" in capsys.readouterr().out


def test_the_bandwidth_of_the_cpu_is_measured_for_this_machine_alone(tiny, monkeypatch, capsys):
    monkeypatch.setattr(placement, "measured_bandwidth", lambda: 27e9)
    main(["plan", tiny])
    assert capsys.readouterr().out.startswith("cpu: 27 GB/s, measured here\n\n")
    for options in (["--ram", "1GiB"], ["--max-memory", "cpu=1GiB"]):
        main(["plan", tiny, *options])
        printed = capsys.readouterr().out
        assert "measured here" not in printed
        assert "give the bandwidth of cpu, or a calibration of that machine" in printed
    main(["plan", tiny, "--ram", "1GiB", "--bandwidth", "cpu=27"])
    assert "tokens a second, " in capsys.readouterr().out


def test_budgets_as_accelerate_writes_them(tiny, capsys):
    budgets = ["--max-memory", "cuda:0=22GiB", "cpu=4GiB", "--max-memory", "1=1GiB"]
    main(["plan", tiny, *budgets, "--strategy", "layers", "--bandwidth", "cpu=1", "0=10", "cuda:1=9"])
    printed = capsys.readouterr().out
    assert "layers  00" in printed
    assert [line.split()[0] for line in printed.splitlines()[2:5]] == ["0", "1", "cpu"]


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("rtx4090", ["rtx4090"]),
        ("3xRTX 4090", ["rtx4090"] * 3),
        ("12x22.5GiB", [""] * 12),
        ("80 GB", [""]),
    ],
)
def test_cards(text, names, tiny, tmp_path):
    main(["plan", tiny, "--gpu", text, "--save", str(tmp_path / "plan.json")])
    plan = PlacementPlan.load(tmp_path / "plan.json")
    assert [device.name for device in plan.request.devices] == names


def test_what_does_not_fit_says_how_much_is_missing(folder):
    message = refusal(folder, "--gpu", "4x24GiB", "--quantization", "fp8")
    assert "GiB are missing" in message
    assert "more GPUs of 24 GiB" in message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--gpu 8xrtx9", "No card called 'rtx9'"),
        ("--gpu 8xrtx4090s", "'rtx4090s' is known: the nearest are rtx4090, "),
        ("--gpu 24GiB --kv-cache-dtype fp4", "`kv_cache_dtype`='fp4': expected one of fp8, int8"),
        ("--gpu x", "No card called 'x'"),
        ("--gpu 8x", "--gpu 8x: expected a card or a size"),
        ("--gpu 0x24GiB", "--gpu 0x24GiB: expected a card or a size"),
        ("--gpu 24", "--gpu 24: expected a card or a size"),
        ("--gpu=", "--gpu : expected a card or a size"),
        ("--gpu 24GiB --ram much", "`max_memory` of 'cpu' is 'much'"),
        ("--gpu 24GiB --max-memory 0=22GiB", "--max-memory names ['0'], which --gpu or --ram give"),
        ("--max-memory 24GiB", "--max-memory 24GiB: expected DEVICE=VALUE"),
        ("--gpu 24GiB --quantization int3", "'int3' is unknown"),
        ("--gpu 24GiB --quantization gpu=", "--quantization gpu=: expected DEVICE=VALUE"),
        ("--gpu 24GiB --quantization fp8 int8", "--quantization fp8: expected DEVICE=VALUE"),
        ("--gpu 24GiB --bandwidth 0=fast", "--bandwidth 0=fast: expected GB/s, as in cpu=60"),
        ("--gpu 24GiB --bandwidth 0=0", "`bandwidth` of 0 is 0.0: expected GB/s from 0.001"),
        ("--gpu 24GiB --bandwidth 0=nan", "`bandwidth` of 0 is nan: expected GB/s from 0.001"),
        ("--gpu 24GiB --bandwidth cpu=60", "`bandwidth` names ['cpu']"),
        ("--gpu 24GiB --batch 0", "`batch_size`=0"),
        ("--gpu 24GiB --strategy rows", "expected one of experts, layers"),
        ("--gpu 24GiB --will-it-help rtx9", "No card called 'rtx9'"),
        ("--gpu 24GiB --figure plan.xyz", "plan.xyz: expected a name that ends in"),
        ("--gpu 24GiB --save nowhere/plan.json", "nowhere/plan.json"),
        ("--gpu 24GiB --usage nowhere.json", "nowhere.json"),
    ],
)
def test_one_sentence_where_the_input_was_wrong(options, message, tiny):
    assert message in refusal(tiny, *options.split())


def test_a_figure_without_matplotlib(tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert 'pip install "skywork-hf[figures]"' in refusal(tiny, "--gpu", "24GiB", "--figure", "plan.png")


def test_the_help_has_an_example(capsys):
    with pytest.raises(SystemExit):
        main(["plan", "--help"])
    assert "skywork-hf plan Skywork/Skywork-MoE-Base-FP8 --gpu" in capsys.readouterr().out
