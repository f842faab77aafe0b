"""The pictures of plans and of usage."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex, to_rgb
from matplotlib.image import imread
from tiny import tiny_dense_config, tiny_moe_config

from skywork_hf import plan_device_map
from skywork_hf.placement import ExpertUsage
from skywork_hf.placement.heatmap import usage_figure
from skywork_hf.placement.picture import device_styles, plan_figure

USAGE = ExpertUsage(
    [0, 1], torch.tensor([[1, 2, 3, 4], [4, 3, 2, 1]]), torch.zeros(2, 4, 4, dtype=torch.int64), tokens=5
)


@pytest.fixture(scope="module")
def tight():
    """A plan with experts on two GPUs and the CPU."""
    config = tiny_moe_config()
    roomy = plan_device_map(config, {0: "8GiB", 1: "8GiB"})
    budget = max(sum(kinds.values()) for kinds in roomy.bytes_per_device.values()) - 4096
    plan = plan_device_map(config, {0: budget, 1: budget, "cpu": "1GiB"})
    assert all(plan.experts_on(key) for key in (0, 1, "cpu"))
    return plan


def patches(figure) -> dict[str, object]:
    """The named rectangles of a figure."""
    return {patch.get_gid(): patch for axes in figure.axes for patch in axes.patches if patch.get_gid()}


def texts(figure) -> list[str]:
    inside = [text.get_text() for axes in figure.axes for text in axes.texts]
    legends = [text.get_text() for axes in figure.axes if axes.get_legend() for text in axes.get_legend().get_texts()]
    return [*(text.get_text() for text in figure.texts), *inside, *legends]


def test_each_cell_has_the_colour_of_its_device(tight):
    styles, drawn = device_styles(tight), patches(plan_figure(tight))
    for layer, (dense, experts) in enumerate(zip(tight.placement.dense, tight.placement.experts, strict=True)):
        cells = {f"layer {layer} dense part": dense}
        cells |= {f"layer {layer} expert {expert}": key for expert, key in enumerate(experts)}
        for name, key in cells.items():
            assert to_hex(drawn[name].get_facecolor()).upper() == styles[key].colour
    for key, style in styles.items():  # the legend
        assert to_hex(drawn[f"device {key}"].get_facecolor()).upper() == style.colour


def test_pixels_of_each_colour_are_those_of_the_cells(tight, tmp_path):
    tight.draw(tmp_path / "plan.png")
    picture = imread(tmp_path / "plan.png")[..., :3]
    cells = [*tight.placement.dense, *(key for row in tight.placement.experts for key in row)]
    areas = {
        key: float((abs(picture - to_rgb(style.colour)).max(axis=-1) < 0.01).mean())
        for key, style in device_styles(tight).items()
    }
    one = sum(areas.values()) / (len(cells) + len(areas))
    for key, area in areas.items():
        # A device's name has a sample of its colour, of about half a cell; edges of black letters are grey as the CPU.
        assert area / one == pytest.approx(cells.count(key) + 0.5, abs=1)


def test_bars_are_as_long_as_what_fills_them(tight):
    drawn = patches(plan_figure(tight))
    for device in tight.request.devices:
        kinds = tight.bytes_per_device[device.key]
        bars = {kind: drawn[f"device {device.key} {kind}"] for kind in kinds}
        whole = bars["dense"].axes.get_xlim()[1]
        left = 0.0
        for kind, size in kinds.items():
            assert bars[kind].get_x() == pytest.approx(left)
            assert bars[kind].get_width() / whole == pytest.approx(size / device.budget)
            left += bars[kind].get_width()
        assert len({to_hex(bar.get_facecolor()) for bar in bars.values()}) == 5


def test_what_is_written(tight):
    written = texts(plan_figure(tight))
    assert "one sequence of 64 tokens" in " ".join(written[0].split())
    assert "GPU 1" in written
    assert "CPU" in written
    assert {"dense part", "experts", "KV cache", "working space", "margin", "free"} <= set(written)
    assert not any("unknown" in text for text in written)


def test_the_bound_is_written_where_it_is_known():
    plan = plan_device_map(tiny_moe_config(), {"cpu": "1GiB"}, bandwidth={"cpu": 10})
    assert any(f"At most {plan.tokens_per_second:.3g} tokens a second" in text for text in texts(plan_figure(plan)))


def test_a_dense_model_has_one_column():
    plan = plan_device_map(tiny_dense_config(), {"cpu": "1GiB"})
    drawn = patches(plan_figure(plan))
    assert [name for name in drawn if name.startswith("layer")] == ["layer 0 dense part", "layer 1 dense part"]
    assert "experts" not in texts(plan_figure(plan))


def test_no_two_of_many_devices_look_alike():
    plan = plan_device_map(tiny_moe_config(), {**dict.fromkeys(range(30), "8GiB"), "cpu": "1GiB", "disk": "1GiB"})
    styles = device_styles(plan)
    assert len(styles) == len(set(styles.values())) == 32
    assert styles["disk"].hatch
    assert not styles["cpu"].hatch


@pytest.mark.parametrize("gpus", [1, 4, 8])
def test_texts_do_not_overlap(gpus):
    memory = {**dict.fromkeys(range(gpus), "rtx4090"), "cpu": "1GiB"}
    config = tiny_moe_config(num_hidden_layers=52, num_experts=[16])
    config.name_or_path = "/a/folder/whose/path/is/quite/long/and/names/a/model/of/the/size/of/Skywork-MoE-Base"
    figure = plan_figure(plan_device_map(config, memory, bandwidth={"cpu": 60}))
    FigureCanvasAgg(figure).draw()
    labels = [label for axes in figure.axes if axes.axison for label in (*axes.get_xticklabels(), axes.xaxis.label)]
    found = [*figure.texts, *labels, *(text for axes in figure.axes for text in axes.texts)]
    boxes = [text.get_window_extent() for text in found if text.get_text()]
    assert len(boxes) > 20
    for number, box in enumerate(boxes):
        assert 0 <= box.x0 < box.x1 <= figure.bbox.x1
        assert 0 <= box.y0 < box.y1 <= figure.bbox.y1
        assert not box.count_overlaps(boxes[:number])


@pytest.mark.parametrize(("ending", "magic"), [("png", b"\x89PNG"), ("PNG", b"\x89PNG"), ("pdf", b"%PDF")])
def test_the_ending_says_the_kind(ending, magic, tight, tmp_path):
    for number, drawn in enumerate((tight, USAGE)):
        drawn.draw(tmp_path / f"{number}.{ending}")
        assert (tmp_path / f"{number}.{ending}").read_bytes().startswith(magic)


def test_svg_names_its_cells(tight, tmp_path):
    tight.draw(tmp_path / "plan.svg")
    text = (tmp_path / "plan.svg").read_text()
    assert text.startswith("<?xml")
    assert 'id="layer 1 expert 3"' in text


def test_pictures_are_drawn_in_threads_without_pyplot(tight, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda number: tight.draw(tmp_path / f"{number}.png"), range(4)))
    assert len({(tmp_path / f"{number}.png").read_bytes() for number in range(4)}) == 1


def test_usage_is_coloured_by_how_often_an_expert_is_chosen():
    figure = usage_figure(USAGE.layers, USAGE.shares, USAGE.tokens, USAGE.share_of_hits(0.5))
    (image,) = figure.axes[0].collections
    # Each layer's 5 tokens choose 10 experts of 4, so that an even share is 2.5.
    expected = [[0.4, 0.8, 1.2, 1.6], [1.6, 1.2, 0.8, 0.4]]
    assert torch.allclose(torch.from_numpy(image.get_array().data).reshape(2, 4), torch.tensor(expected).double())
    assert image.norm(1.0) == 0.5  # even is the middle of the colours
    assert figure.axes[0].yaxis_inverted()  # layer 0 is on top
    assert figure.axes[1].get_ylabel() == "times the even share"
    written = texts(figure)
    assert "5 tokens" in written[0]
    assert "takes 70% of the calls" in written[1]


@pytest.mark.parametrize("name", ["plan.xyz", "plan"])
def test_an_unknown_ending(name, tight, tmp_path):
    for drawn in (tight, USAGE):
        with pytest.raises(ValueError, match=rf"{name}: expected a name that ends in \.png, \.svg, \.pdf"):
            drawn.draw(tmp_path / name)


def test_without_matplotlib(tight, tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for drawn in (tight, USAGE):
        with pytest.raises(ImportError, match=r'^Pictures need matplotlib: pip install "skywork-hf\[figures\]"\.$'):
            drawn.draw(tmp_path / "picture.png")
