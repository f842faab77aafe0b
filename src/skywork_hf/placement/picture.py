"""The picture of a plan. Needs matplotlib, the `figures` extra."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .devices import CPU, DISK, GIB, Device, Key
from .heatmap import LINE, MARGIN, Page, cell, label_experts, label_layers
from .problem import KINDS, Solution
from .text import bound, device_name

# Paul Tol's muted scheme, which the colour-blind tell apart, in an order that parts neighbours by lightness.
_GPU_COLOURS = ("#332288", "#DDCC77", "#117733", "#CC6677", "#88CCEE", "#882255", "#44AA99", "#999933", "#AA4499")
# For more GPUs than there are colours.
_GPU_HATCHES = ("", "////", "....", "xxxx", "----", "||||", "++++", "oooo")
# From dark to light, in a hue that is no device's.
_KIND_COLOURS = ("#1F2F40", "#4B6580", "#7F9BB5", "#B3C5D5", "#DAE3EB")
_KIND_NAMES = {"dense": "dense part", "cache": "KV cache", "working": "working space"}

# In inches: the column of bars, what a device takes of it, and the bar in that.
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


def plan_figure(plan: Solution) -> Any:
    """The matplotlib figure: layers by experts in the colours of their devices, the dense part beside them, and what
    fills each device.

    Raises:
        ImportError: matplotlib is not there.
    """
    layers, experts = len(plan.placement.dense), max(map(len, plan.placement.experts))
    column, row = cell(layers, experts)
    grid_width, grid_height = column * (experts + 1.5 if experts else 2), layers * row
    bars_height = _DEVICE * (len(plan.request.devices) + 1.2)  # the last one for the legend
    found = f"At most {bound(plan)}" if plan.tokens_per_second else ""
    page = Page(grid_width + MARGIN + _BARS, max(grid_height, bars_height), plan.request.title, found)
    styles = device_styles(plan)
    _draw_grid(page.axes(0, grid_width, grid_height), plan, styles)
    _draw_bars(page.axes(grid_width + MARGIN, _BARS, bars_height), plan, styles, bars_height)
    return page.figure


def device_styles(plan: Solution) -> dict[Key, Style]:
    """The look of each device."""
    gpus = {gpu.key: _gpu_style(number) for number, gpu in enumerate(plan.request.gpus)}
    return {device.key: gpus.get(device.key) or _STYLES[str(device.key)] for device in plan.request.devices}


def _gpu_style(number: int) -> Style:
    turn, colour = divmod(number, len(_GPU_COLOURS))
    return Style(_GPU_COLOURS[colour], _GPU_HATCHES[turn % len(_GPU_HATCHES)])


def _draw_grid(axes: Any, plan: Solution, styles: dict[Key, Style]) -> None:
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
    label_layers(axes, range(len(plan.placement.dense)))
    label_experts(axes, experts)
    axes.text(-1.0, 1.0, "dense\npart", transform=axes.get_xaxis_transform(), ha="center", va="bottom", fontsize=9)


def _draw_bars(axes: Any, plan: Solution, styles: dict[Key, Style], height: float) -> None:
    """A bar for each device, as long as all others: its budget, and what fills it. Distances are inches."""
    axes.set_xlim(0, _BARS)
    axes.set_ylim(height, 0)
    axes.axis("off")
    for number, device in enumerate(plan.request.devices):
        _draw_bar(axes, plan, device, styles[device.key], number * _DEVICE)
    used = [kind for kind in KINDS if any(kinds[kind] for kinds in plan.bytes_per_device.values())]
    _draw_kinds(axes, used, (len(plan.request.devices) * _DEVICE + 0.02) / height)


def _draw_bar(axes: Any, plan: Solution, device: Device, style: Style, top: float) -> None:
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
    axes.add_patch(Rectangle((0, bar), _BARS, _BAR, fill=False, edgecolor=LINE, linewidth=0.8, clip_on=False))


def _gib(size: float) -> str:
    return f"{size / GIB:.3g}"


def _draw_kinds(axes: Any, kinds: Sequence[str], top: float) -> None:
    """What the shades of the bars mean."""
    from matplotlib.patches import Patch

    colours = dict(zip(KINDS, _KIND_COLOURS, strict=True))
    handles = [Patch(facecolor=colours[kind], label=_KIND_NAMES.get(kind, kind)) for kind in kinds]
    handles.append(Patch(facecolor="white", edgecolor=LINE, linewidth=0.8, label="free"))
    where = {"loc": "upper left", "bbox_to_anchor": (0, 1 - top), "borderaxespad": 0, "borderpad": 0}
    look = {"frameon": False, "fontsize": 9, "handlelength": 1.4, "alignment": "left", "title_fontsize": 9}
    axes.legend(handles=handles, ncols=3, title="GiB; a bar's length is the device's budget", **where, **look)
