"""Pictures of plans and of usage. Needs matplotlib, the `figures` extra."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .hardware import CPU, DISK, GIB
from .placer import KINDS
from .plan import PlacementPlan
from .spread import Key
from .text import device_name, speed
from .usage import ExpertUsage

ENDINGS = (".png", ".svg", ".pdf")
# Paul Tol's muted and bright schemes, which the colour-blind tell apart.
_GPU_COLOURS = (
    *("#4477AA", "#EE6677", "#228833", "#CCBB44", "#66CCEE", "#AA3377", "#332288", "#DDCC77"),
    *("#117733", "#88CCEE", "#882255", "#44AA99", "#999933", "#CC6677", "#AA4499", "#EE8866"),
)
_COLOURS = {CPU: "#BBBBBB", DISK: "#E8E8E8"}
_KIND_COLOURS = {
    "dense": "#004488",
    "experts": "#DDAA33",
    "cache": "#BB5566",
    "working": "#AAAAAA",
    "context": "#777777",
}
_KIND_NAMES = {"dense": "dense part", "cache": "KV cache", "working": "working space"}


def draw_plan(plan: PlacementPlan, path: str | Path) -> None:
    """Layers by experts in the colours of their devices, the dense part beside them, and what fills each device.

    Args:
        path: of the image; its ending says which kind.

    Raises:
        ImportError: matplotlib is not there.
        ValueError: an ending that is none of `ENDINGS`.
    """
    layers, experts = len(plan.placement.dense), max(map(len, plan.placement.experts))
    figure = _figure(path, width=11, height=max(3.5, 1.8 + 0.13 * layers))
    grid, bars = figure.subplots(1, 2, width_ratios=[max(2, experts + 2), 12])
    colours = device_colours(plan)
    _draw_grid(grid, plan, colours, experts)
    _draw_bars(bars, plan)
    figure.legend(
        handles=_patches({device_name(plan, key): colour for key, colour in colours.items()}),
        loc="outside lower left",
        ncols=min(5, len(colours)),
        frameon=False,
    )
    figure.suptitle(f"{plan.title}\nat most {speed(plan)}", fontsize=10)
    figure.savefig(path, dpi=150)


def device_colours(plan: PlacementPlan) -> dict[Key, str]:
    """The colour of each device that holds weights."""
    gpus = [gpu.key for gpu in plan.request.gpus]
    used = [device.key for device in plan.request.devices if plan.weight_bytes(device.key)]
    return {key: _COLOURS.get(str(key)) or _GPU_COLOURS[gpus.index(key) % len(_GPU_COLOURS)] for key in used}


def _draw_grid(axes: Any, plan: PlacementPlan, colours: dict[Key, str], experts: int) -> None:
    """One cell for each layer's dense part, at the left, and one for each expert."""
    from matplotlib.patches import Rectangle

    for layer, (dense, row) in enumerate(zip(plan.placement.dense, plan.placement.experts, strict=True)):
        cells = [(-1.6, dense), *enumerate(row)]
        for column, key in cells:
            axes.add_patch(Rectangle((column, layer), 0.92, 0.88, color=colours[key], linewidth=0))
    axes.set_xlim(-1.8, experts)
    axes.set_ylim(len(plan.placement.dense), -0.2)
    axes.set_xticks([-1.14, *(n + 0.46 for n in range(experts))], ["dense", *map(str, range(experts))], fontsize=7)
    step = 1 if len(plan.placement.dense) <= 12 else 4
    layers = range(0, len(plan.placement.dense), step)
    axes.set_yticks([layer + 0.44 for layer in layers], map(str, layers), fontsize=7)
    axes.set_xlabel("expert" if experts else "")
    axes.set_ylabel("layer")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _draw_bars(axes: Any, plan: PlacementPlan) -> None:
    """What fills each device, beside its budget."""
    devices = [device for device in plan.request.devices if device.budget]
    for row, device in enumerate(devices):
        axes.barh(row, device.budget / GIB, color="none", edgecolor="#333333", linewidth=0.8, height=0.7)
        left = 0.0
        for kind in KINDS:
            size = plan.bytes_per_device[device.key][kind] / GIB
            axes.barh(row, size, left=left, color=_KIND_COLOURS[kind], height=0.7)
            left += size
    axes.set_yticks(range(len(devices)), [device_name(plan, device.key) for device in devices], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("GiB, and the budget's outline")
    axes.spines[["top", "right"]].set_visible(False)
    names = {_KIND_NAMES.get(kind, kind): colour for kind, colour in _KIND_COLOURS.items()}
    axes.legend(
        handles=_patches(names), loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, frameon=False, fontsize=8
    )


def draw_usage(usage: ExpertUsage, path: str | Path) -> None:
    """How often each expert is chosen, as a multiple of what it would be if all were chosen equally.

    Raises:
        ImportError, ValueError: as `draw_plan`.
    """
    layers, experts = usage.counts.shape
    figure = _figure(path, width=max(5.0, 2.5 + 0.35 * experts), height=max(3.0, 1.8 + 0.14 * layers))
    axes = figure.subplots()
    even = usage.shares.sum(dim=1, keepdim=True) / experts
    image = axes.imshow((usage.shares / even).tolist(), aspect="auto", cmap="viridis", vmin=0)
    figure.colorbar(image, label="times the even share")
    step = 1 if layers <= 12 else 4
    axes.set_yticks(range(0, layers, step), [str(number) for number in usage.layers[::step]])
    axes.set_xticks(range(experts))
    axes.set_xlabel("expert")
    axes.set_ylabel("layer")
    half = usage.share_of_hits(0.5)
    axes.set_title(f"{usage.tokens:,} tokens; the most used half of the experts takes {half:.0%}", fontsize=10)
    figure.savefig(path, dpi=150)


def _figure(path: str | Path, width: float, height: float) -> Any:
    """An empty figure that belongs to no window."""
    if Path(path).suffix not in ENDINGS:
        raise ValueError(f"{path}: expected a name that ends in {', '.join(ENDINGS)}.")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('Pictures need matplotlib: pip install "skywork-hf[figures]".') from error
    return Figure(figsize=(width, height), layout="constrained")


def _patches(colours: dict[str, str]) -> list[Any]:
    from matplotlib.patches import Patch

    return [Patch(color=colour, label=name) for name, colour in colours.items()]
