"""Pictures of plans and of usage. Needs matplotlib, the `figures` extra."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .hardware import CPU, DISK, GIB, Device
from .placer import KINDS
from .plan import PlacementPlan
from .spread import Key
from .text import device_name, speed
from .usage import ExpertUsage

ENDINGS = (".png", ".svg", ".pdf")

# Paul Tol's muted scheme, which the colour-blind tell apart, in an order that parts neighbours by lightness.
_GPU_COLOURS = ("#332288", "#DDCC77", "#117733", "#CC6677", "#88CCEE", "#882255", "#44AA99", "#999933", "#AA4499")
# For more GPUs than there are colours.
_GPU_HATCHES = ("", "////", "....", "xxxx", "----", "||||", "++++", "oooo")
# From dark to light, in a hue that is no device's.
_KIND_COLOURS = ("#1F2F40", "#4B6580", "#7F9BB5", "#B3C5D5", "#DAE3EB")
_KIND_NAMES = {"dense": "dense part", "cache": "KV cache", "working": "working space"}
_LINE = "#555555"

# All in inches. Left of the grid, and between it and the bars:
_MARGIN = 0.7
# The widest column, lowest and highest row of a grid, and the grid itself where these allow it.
_COLUMN, _LOWEST_ROW, _HIGHEST_ROW = 0.3, 0.08, 0.3
_GRID_WIDTH, _GRID_HEIGHT = 8.0, 6.8
# The column of bars, what a device takes of it, and the bar in that.
_BARS, _DEVICE, _BAR = 4.3, 0.64, 0.22


@dataclass(frozen=True)
class Style:
    """How the cells of one device look."""

    colour: str
    hatch: str = ""
    hatch_colour: str = "#FFFFFF"

    def patch(self, **options: Any) -> dict[str, Any]:
        """Arguments of a matplotlib patch."""
        return {
            "facecolor": self.colour,
            "edgecolor": self.hatch_colour,
            "hatch": self.hatch,
            "linewidth": 0,
        } | options


_STYLES = {CPU: Style("#A6A6A6"), DISK: Style("#EEEEEE", "////", "#B0B0B0")}


def draw_plan(plan: PlacementPlan, path: str | Path) -> None:
    """Layers by experts in the colours of their devices, the dense part beside them, and what fills each device.

    Args:
        path: of the image; its ending says which kind.

    Raises:
        ImportError: matplotlib is not there.
        ValueError: an ending that is none of `ENDINGS`.
    """
    _check_ending(path)
    plan_figure(plan).savefig(path, dpi=150)


def draw_usage(usage: ExpertUsage, path: str | Path) -> None:
    """How often each expert is chosen, as a multiple of what it would be if all were chosen equally.

    Raises:
        ImportError, ValueError: as `draw_plan`.
    """
    _check_ending(path)
    usage_figure(usage).savefig(path, dpi=150)


def _check_ending(path: str | Path) -> None:
    if Path(path).suffix.lower() not in ENDINGS:
        raise ValueError(f"{path}: expected a name that ends in {', '.join(ENDINGS)}.")


def plan_figure(plan: PlacementPlan) -> Any:
    """The matplotlib figure of `draw_plan`."""
    layers, experts = len(plan.placement.dense), max(map(len, plan.placement.experts))
    column, row = _cell(layers, experts)
    grid_width, grid_height = column * (experts + 1.5 if experts else 2), layers * row
    bars_height = _DEVICE * (len(plan.request.devices) + 1.2)  # the last one for the legend
    found = f"At most {speed(plan)}" if plan.tokens_per_second else ""
    page = _Page(grid_width + _MARGIN + _BARS, max(grid_height, bars_height), plan.title, found)
    styles = device_styles(plan)
    _draw_grid(page.axes(0, grid_width, grid_height), plan, styles)
    _draw_bars(page.axes(grid_width + _MARGIN, _BARS, bars_height), plan, styles, bars_height)
    return page.figure


def device_styles(plan: PlacementPlan) -> dict[Key, Style]:
    """The look of each device."""
    gpus = {gpu.key: _gpu_style(number) for number, gpu in enumerate(plan.request.gpus)}
    return {device.key: gpus.get(device.key) or _STYLES[str(device.key)] for device in plan.request.devices}


def _gpu_style(number: int) -> Style:
    turn, colour = divmod(number, len(_GPU_COLOURS))
    return Style(_GPU_COLOURS[colour], _GPU_HATCHES[turn % len(_GPU_HATCHES)])


def _draw_grid(axes: Any, plan: PlacementPlan, styles: dict[Key, Style]) -> None:
    """One cell for each layer's dense part, at the left, and one for each expert."""
    from matplotlib.patches import Rectangle

    experts = max(map(len, plan.placement.experts))
    for layer, (dense, row) in enumerate(zip(plan.placement.dense, plan.placement.experts, strict=True)):
        for column, key in [(-1.5, dense), *enumerate(row)]:
            part = "dense part" if column < 0 else f"expert {column}"
            look = styles[key].patch(gid=f"layer {layer} {part}")
            axes.add_patch(Rectangle((column + 0.04, layer + 0.06), 0.92, 0.88, **look))
    axes.set_xlim(-1.5, experts or -0.5)
    axes.set_ylim(len(plan.placement.dense), 0)
    _label_layers(axes, [layer + 0.5 for layer in range(len(plan.placement.dense))])
    _label_experts(axes, experts)
    axes.text(-1.0, 1.0, "dense\npart", transform=axes.get_xaxis_transform(), ha="center", va="bottom", fontsize=9)


def _label_layers(axes: Any, rows: Sequence[float], numbers: Sequence[int] | None = None) -> None:
    """The numbers of the layers at the left, each or each fourth."""
    step = 1 if len(rows) <= 16 else 4
    axes.set_yticks(rows[::step], map(str, (numbers or range(len(rows)))[::step]), fontsize=9)
    axes.set_ylabel("layer", fontsize=10)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _label_experts(axes: Any, experts: int) -> None:
    """The numbers of the experts above, as layers are read downwards."""
    numbers = range(0, experts, 1 if experts <= 32 else 4)
    axes.xaxis.tick_top()
    axes.xaxis.set_label_position("top")
    axes.set_xticks([number + 0.5 for number in numbers], map(str, numbers), fontsize=9)
    axes.set_xlabel("expert" if experts else "", fontsize=10)


def _draw_bars(axes: Any, plan: PlacementPlan, styles: dict[Key, Style], height: float) -> None:
    """A bar for each device, as long as all others: its budget, and what fills it. Distances are inches."""
    axes.set_xlim(0, _BARS)
    axes.set_ylim(height, 0)
    axes.axis("off")
    for number, device in enumerate(plan.request.devices):
        _draw_bar(axes, plan, device, styles[device.key], number * _DEVICE)
    used = [kind for kind in KINDS if any(kinds[kind] for kinds in plan.bytes_per_device.values())]
    _draw_kinds(axes, used, (len(plan.request.devices) * _DEVICE + 0.02) / height)


def _draw_bar(axes: Any, plan: PlacementPlan, device: Device, style: Style, top: float) -> None:
    from matplotlib.patches import Rectangle

    sizes = plan.bytes_per_device[device.key]
    bar = top + 0.21
    axes.add_patch(Rectangle((0, top), 0.28, 0.15, **style.patch(gid=f"device {device.key}")))
    named = {"fontsize": 10, "va": "center"}
    axes.text(0.36, top + 0.08, device_name(plan, device.key), fontweight="bold", **named)
    filled = f"{_gib(sum(sizes.values()))} of {_gib(device.budget)} GiB"
    axes.text(_BARS, top + 0.08, filled, ha="right", **named)
    left = 0.0
    for kind, colour in zip(KINDS, _KIND_COLOURS, strict=True):
        width = _BARS * sizes[kind] / max(1, device.budget)
        axes.add_patch(Rectangle((left, bar), width, _BAR, facecolor=colour, gid=f"device {device.key} {kind}"))
        if width > 0.45:  # as wide as the number
            ink = "white" if kind in ("dense", "experts") else "black"
            centre = left + width / 2, bar + _BAR / 2 + 0.01
            axes.text(*centre, _gib(sizes[kind]), color=ink, fontsize=9, ha="center", va="center")
        left += width
    axes.add_patch(Rectangle((0, bar), _BARS, _BAR, fill=False, edgecolor=_LINE, linewidth=0.8, clip_on=False))


def _gib(size: float) -> str:
    return f"{size / GIB:.3g}"


def _draw_kinds(axes: Any, kinds: Sequence[str], top: float) -> None:
    """What the shades of the bars mean."""
    from matplotlib.patches import Patch

    colours = dict(zip(KINDS, _KIND_COLOURS, strict=True))
    handles = [Patch(facecolor=colours[kind], label=_KIND_NAMES.get(kind, kind)) for kind in kinds]
    handles.append(Patch(facecolor="white", edgecolor=_LINE, linewidth=0.8, label="free"))
    where = {"loc": "upper left", "bbox_to_anchor": (0, 1 - top), "borderaxespad": 0, "borderpad": 0}
    look = {"frameon": False, "fontsize": 9, "handlelength": 1.4, "alignment": "left", "title_fontsize": 9}
    axes.legend(handles=handles, ncols=3, title="GiB; a bar's length is the device's budget", **where, **look)


def usage_figure(usage: ExpertUsage) -> Any:
    """The matplotlib figure of `draw_usage`."""
    from_even = usage.shares / usage.shares.mean(dim=1, keepdim=True).clamp_min(1e-12)
    layers, experts = usage.counts.shape
    column, row = _cell(layers, experts)
    width, height = column * experts, layers * row
    half = f"The most used half of the experts takes {usage.share_of_hits(0.5):.0%} of the calls"
    scale_height = max(height, 1.6)  # as high as its label
    page = _Page(
        max(width + 1.0, 4.5), scale_height, f"How often experts are chosen, in {usage.tokens:,} tokens", half
    )
    axes = page.axes(0, width, height)
    image = _draw_shares(axes, from_even)
    _label_layers(axes, [layer + 0.5 for layer in range(layers)], usage.layers)
    _label_experts(axes, experts)
    extend = "max" if from_even.max() > image.norm.vmax else "neither"
    scale = page.figure.colorbar(image, cax=page.axes(width + 0.25, 0.18, scale_height), extend=extend)
    scale.set_label("times the even share", fontsize=10)
    scale.ax.tick_params(labelsize=9)
    scale.outline.set_visible(False)
    return page.figure


def _draw_shares(axes: Any, from_even: Any) -> Any:
    """White is even; more is red, less is blue. Few experts are chosen very often: what is above 4 looks as 4."""
    from matplotlib.colors import TwoSlopeNorm

    norm = TwoSlopeNorm(1.0, vmin=0.0, vmax=min(4.0, max(2.0, float(from_even.max()))))
    image = axes.pcolormesh(from_even.tolist(), cmap="RdBu_r", norm=norm, edgecolors="white", linewidth=0.6)
    axes.invert_yaxis()
    return image


def _cell(layers: int, experts: int) -> tuple[float, float]:
    """Width and height of a cell, so that small models get large ones and large models fit on a page."""
    height = _GRID_HEIGHT if experts else 0.65 * _GRID_HEIGHT  # a single column would be a tower
    row = min(_HIGHEST_ROW, max(_LOWEST_ROW, height / layers))
    return min(_COLUMN, _GRID_WIDTH / max(1, experts)), row


class _Page:
    """A figure that belongs to no window, with a title; axes are put on it in inches.

    Args:
        width, height: of what is below the title, without margins.
        title: broken into lines where it is too long, as `found` is, the line below it.
    """

    def __init__(self, width: float, height: float, title: str, found: str) -> None:
        figure_class = _figure_class()
        # Inches that a letter takes on average, bold of 12 points and plain of 9.5.
        titles = textwrap.wrap(title, math.floor((width + 0.45) / 0.105))
        founds = textwrap.wrap(found, math.floor((width + 0.45) / 0.072))
        self.top = 0.75 + 0.21 * len(titles) + 0.19 * len(founds)
        self.width, self.height = width + 1.5 * _MARGIN, height + self.top + 0.25
        self.figure = figure_class(figsize=(self.width, self.height))
        self._write("\n".join(titles), 0.2, fontsize=12, fontweight="bold")
        self._write("\n".join(founds), 0.26 + 0.21 * len(titles), fontsize=9.5, color=_LINE)

    def _write(self, text: str, top: float, **options: Any) -> None:
        self.figure.text(0.3 / self.width, 1 - top / self.height, text, ha="left", va="top", **options)

    def axes(self, left: float, width: float, height: float) -> Any:
        """Axes below the title, so far from the left margin."""
        bottom = 1 - (self.top + height) / self.height
        return self.figure.add_axes(((left + _MARGIN) / self.width, bottom, width / self.width, height / self.height))


def _figure_class() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('Pictures need matplotlib: pip install "skywork-hf[figures]".') from error
    return Figure
