"""Pictures of training. Needs matplotlib, the `figures` extra."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from .router_load import RouterLoad

# From the first layer to the last; dark to light, and read without colour too.
_COLOURS = "viridis"
_SIZE = (13.0, 7.0)  # inches


def draw_router(log_history: list[dict[str, Any]], last: RouterLoad, layers: list[int], path: Path) -> None:
    """Write what the gates did in a training as an image (after figures 2-4 of Skywork-MoE's tech report): the mean of
    their sorted probabilities at the end, and over the steps the ratios of the largest probabilities, the load, the
    drop rates and the coefficients of the auxiliary loss, a line for each MoE layer.

    Args:
        log_history: the Trainer's, with what `AdaptiveAuxLossCallback` logs.
        last: the load of the last step.
        layers: the numbers of the MoE layers.
    """
    import matplotlib  # an extra
    from matplotlib.figure import Figure

    colours = matplotlib.colormaps[_COLOURS](np.linspace(0, 0.9, len(layers)))
    entries = [entry for entry in log_history if "router/coefficient" in entry]
    figure = Figure(figsize=_SIZE, layout="constrained")
    axes = figure.subplots(2, 3).flat

    def over_steps(name: str, title: str, even: float | None = None) -> None:
        axis = next(axes)
        for layer, colour in zip(layers, colours, strict=True):
            points = [(entry["step"], entry.get(f"router/layer_{layer:02}/{name}")) for entry in entries]
            axis.plot(*zip(*points, strict=True), color=colour, linewidth=1) if points else None
        _label(axis, title, "step", even)

    axis = next(axes)
    ranks = np.arange(1, last.experts + 1)
    for row, colour in enumerate(colours):
        axis.plot(ranks, last.sorted_probabilities[row], color=colour, marker=".", linewidth=1)
    _label(axis, "the gate's probabilities, largest first, last step", "rank of the expert", 1 / last.experts)
    over_steps("max1_max2", "Max1/Max2")
    if last.experts > 2:
        over_steps("max2_max3", "Max2/Max3")
    over_steps("max_load", "tokens of the most used expert, by its even share", even=1)
    over_steps("drop_rate", "drop rate")
    over_steps("coefficient", "coefficient of the auxiliary loss")
    for unused in axes:
        unused.remove()
    scale = matplotlib.cm.ScalarMappable(matplotlib.colors.Normalize(layers[0], max(layers[-1], layers[0] + 1)))
    scale.set_cmap(matplotlib.colors.ListedColormap(colours))
    bar = figure.colorbar(scale, ax=figure.axes, fraction=0.02, label="layer")
    bar.set_ticks([layers[0], layers[-1]])
    figure.savefig(path, dpi=120)


def _label(axis: Any, title: str, below: str, even: float | None) -> None:
    axis.set_title(title, fontsize=10)
    axis.set_xlabel(below)
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_ylim(0, 1.05 * axis.get_ylim()[1])
    axis.xaxis.get_major_locator().set_params(integer=True)
    if even is not None:
        axis.axhline(even, color="#999999", linestyle="--", linewidth=1)
        axis.annotate("even", (1, even), xycoords=("axes fraction", "data"), ha="right", va="bottom", color="#777777")
