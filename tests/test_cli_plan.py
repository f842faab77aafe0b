"""`skywork-hf plan`, as a user sees it."""

from __future__ import annotations

import pytest
from test_placement_usage import skewed_usage
from tiny import tiny_moe_config

from skywork_hf import SkyworkMoeConfig
from skywork_hf.cli import main
from skywork_hf.placement import PlacementPlan


@pytest.fixture
def folder(tmp_path):
    """Only a config: nothing else is read."""
    SkyworkMoeConfig().save_pretrained(tmp_path / "moe")
    return str(tmp_path / "moe")


@pytest.fixture
def tiny(tmp_path):
    tiny_moe_config().save_pretrained(tmp_path / "tiny")
    return str(tmp_path / "tiny")


def test_the_table_and_the_map(folder, capsys):
    main(["plan", folder, "--gpu", "8x24GiB", "--quantization", "fp8"])
    printed = capsys.readouterr().out
    assert "one sequence of 8,192 tokens; GiB" in printed
    assert printed.count("0123456701234567") == 52
    assert "give the bandwidth of 0, 1, 2, 3, 4, 5, 6, 7" in printed


def test_everything_that_can_be_asked(folder, tmp_path, capsys):
    options = "--gpu 2xrtx4090 --gpu rtx3090 --ram 200GiB --quantization gpu=fp8 cpu=int8 --context 2048 --batch 2"
    more = f"--bandwidth cpu=60 --will-it-help rtx3090 --figure {tmp_path}/plan.png --save {tmp_path}/plan.json"
    main(["plan", folder, *options.split(), *more.split()])
    printed = capsys.readouterr().out
    assert "2 sequences of 2,048 tokens" in printed
    assert "int8 (weight_int8pack_mm)" in printed
    assert "of the time reading experts on CPU" in printed
    assert "One more rtx3090: 24 GiB" in printed
    assert (tmp_path / "plan.png").stat().st_size > 10_000
    plan = PlacementPlan.load(tmp_path / "plan.json")
    assert [device.name for device in plan.request.devices] == ["rtx4090", "rtx4090", "rtx3090", ""]


def test_the_devices_that_are_there(tiny, tmp_path, capsys):
    skewed_usage().save(tmp_path / "usage.json")
    main(["plan", tiny, "--usage", str(tmp_path / "usage.json")])
    printed = capsys.readouterr().out
    assert "GB/s, measured here" in printed
    assert "tokens a second" in printed


def test_budgets_as_accelerate_writes_them(tiny, capsys):
    main(["plan", tiny, "--max-memory", "0=22GiB", "cpu=4GiB", "--strategy", "layers", "--bandwidth", "cpu=1", "0=10"])
    printed = capsys.readouterr().out
    assert "layers  00" in printed
    assert "measured here" not in printed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gpu", "4x24GiB", "--quantization", "fp8"], "GiB are missing"),
        (["--gpu", "8xrtx9"], "No card called 'rtx9'"),
        (["--gpu", "x"], "No card called 'x'"),
        (["--gpu", "24GiB", "--quantization", "int3"], "'int3' is unknown"),
        (["--gpu", "24GiB", "--quantization", "gpu="], "--quantization gpu=: expected DEVICE=VALUE"),
        (["--max-memory", "24GiB"], "--max-memory 24GiB: expected DEVICE=VALUE"),
        (["--gpu", "24GiB", "--bandwidth", "0=fast"], "could not convert string to float: 'fast'"),
        (["--gpu", "8x24GiB", "--quantization", "fp8", "--figure", "plan.xyz"], "expected a name that ends in"),
        (["--gpu", "8x24GiB", "--usage", "nowhere.json"], "nowhere.json"),
    ],
)
def test_one_sentence_where_the_input_was_wrong(folder, options, message):
    with pytest.raises(SystemExit, match="skywork-hf: ") as exit_:
        main(["plan", folder, *options])
    assert message in str(exit_.value)
