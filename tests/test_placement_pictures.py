"""The pictures of plans and of usage."""

from __future__ import annotations

import sys

import pytest
import torch
from matplotlib.colors import to_rgb
from matplotlib.image import imread
from tiny import tiny_dense_config, tiny_moe_config

from skywork_hf import plan_device_map
from skywork_hf.placement import ExpertUsage
from skywork_hf.placement.picture import device_colours

USAGE = ExpertUsage(
    [0, 1], torch.tensor([[1, 2, 3, 4], [4, 3, 2, 1]]), torch.zeros(2, 4, 4, dtype=torch.int64), tokens=5
)


def tight_plan():
    config = tiny_moe_config()
    roomy = plan_device_map(config, {0: "8GiB", 1: "8GiB"})
    budget = max(sum(kinds.values()) for kinds in roomy.bytes_per_device.values()) - 4096
    return plan_device_map(config, {0: budget, 1: budget, "cpu": "1GiB"})


def area_of(picture, colour: str) -> float:
    """The share of the pixels that have a colour."""
    return float((abs(picture[..., :3] - to_rgb(colour)).max(axis=-1) < 0.01).mean())


def test_each_device_is_there_in_its_colour(tmp_path):
    plan = tight_plan()
    plan.draw(tmp_path / "plan.png")
    picture = imread(tmp_path / "plan.png")
    colours = device_colours(plan)
    assert list(colours) == [0, 1, "cpu"]
    assert len(set(colours.values())) == 3
    # More cells, more area: the experts of the CPU are those of all that is grey.
    areas = {key: area_of(picture, colour) for key, colour in colours.items()}
    assert all(area > 0.005 for area in areas.values())
    assert (plan.experts_on(0) > plan.experts_on("cpu")) == (areas[0] > areas["cpu"])


@pytest.mark.parametrize(("ending", "magic"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_the_ending_says_the_kind(ending, magic, tmp_path):
    plan = plan_device_map(tiny_dense_config(), {"cpu": "1GiB"})
    for number, drawn in enumerate((plan, USAGE)):
        drawn.draw(tmp_path / f"{number}.{ending}")
        assert (tmp_path / f"{number}.{ending}").read_bytes().startswith(magic)


def test_usage_is_coloured_by_how_often_an_expert_is_chosen(tmp_path):
    USAGE.draw(tmp_path / "usage.svg")
    text = (tmp_path / "usage.svg").read_text()
    assert "<image" in text
    even = ExpertUsage([0], torch.full((1, 4), 5), torch.zeros(1, 4, 4, dtype=torch.int64), tokens=10)
    even.draw(tmp_path / "even.png")
    USAGE.draw(tmp_path / "skewed.png")
    rows = [imread(tmp_path / f"{name}.png")[..., :3].reshape(-1, 3) for name in ("even", "skewed")]
    assert len(set(map(tuple, rows[1].round(2).tolist()))) > len(set(map(tuple, rows[0].round(2).tolist())))


def test_an_unknown_ending(tmp_path):
    with pytest.raises(ValueError, match=r"plan\.xyz: expected a name that ends in \.png, \.svg, \.pdf"):
        tight_plan().draw(tmp_path / "plan.xyz")


def test_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'pip install "skywork-hf\[figures\]"'):
        USAGE.draw(tmp_path / "usage.png")
