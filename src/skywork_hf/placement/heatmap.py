"""Pictures of layers by experts: the page, the grid, and how often experts are chosen, of plain counts. Needs
matplotlib, the `figures` extra."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

ENDINGS = (".png", ".svg", ".pdf")
LINE = "#555555"

# All in inches. Left of a grid, and between it and what stands beside it:
MARGIN = 0.7
# The widest column, lowest and highest row of a grid, and the grid itself where these allow it.
_COLUMN, _LOWEST_ROW, _HIGHEST_ROW = 0.3, 0.08, 0.3
_GRID_WIDTH, _GRID_HEIGHT = 8.0, 6.8


def write(figure: Any, path: str | Path) -> None:
    """Save a matplotlib figure.

    Raises:
        ValueError: an ending that is none of `ENDINGS`.
    """
    if Path(path).suffix.lower() not in ENDINGS:
        raise ValueError(f"{path}: expected a name that ends in {', '.join(ENDINGS)}.")
    figure.savefig(path, dpi=150)


def usage_figure(layers: Sequence[int], shares: Tensor, tokens: int, used_half: float) -> Any:
    """The matplotlib figure of how often each expert is chosen, as a multiple of what it would be if all were chosen
    equally.

    Args:
        layers: the numbers of the MoE layers.
        shares: [MoE layers, experts], the probability that a token chooses the expert.
        tokens: how many were counted.
        used_half: the share of calls that the most used half of the experts takes.

    Raises:
        ImportError: matplotlib is not there.
    """
    from_even = shares / shares.mean(dim=1, keepdim=True).clamp_min(1e-12)
    column, row = cell(*shares.shape)
    width, height = column * shares.shape[1], len(layers) * row
    half = f"The most used half of the experts takes {used_half:.0%} of the calls"
    scale_height = max(height, 1.6)  # as high as its label
    page = Page(max(width + 1.0, 4.5), scale_height, f"How often experts are chosen, in {tokens:,} tokens", half)
    axes = page.axes(0, width, height)
    image = _draw_shares(axes, from_even)
    label_layers(axes, layers)
    label_experts(axes, shares.shape[1])
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


def cell(layers: int, experts: int) -> tuple[float, float]:
    """Width and height of a cell, so that small models get large ones and large models fit on a page."""
    height = _GRID_HEIGHT if experts else 0.65 * _GRID_HEIGHT  # a single column would be a tower
    row = min(_HIGHEST_ROW, max(_LOWEST_ROW, height / layers))
    return min(_COLUMN, _GRID_WIDTH / max(1, experts)), row


def label_layers(axes: Any, numbers: Sequence[int]) -> None:
    """The numbers of the layers at the left of their rows, each or each fourth."""
    step = 1 if len(numbers) <= 16 else 4
    rows = [row + 0.5 for row in range(0, len(numbers), step)]
    axes.set_yticks(rows, map(str, numbers[::step]), fontsize=9)
    axes.set_ylabel("layer", fontsize=10)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def label_experts(axes: Any, experts: int) -> None:
    """The numbers of the experts above, as layers are read downwards."""
    numbers = range(0, experts, 1 if experts <= 32 else 4)
    axes.xaxis.tick_top()
    axes.xaxis.set_label_position("top")
    axes.set_xticks([number + 0.5 for number in numbers], map(str, numbers), fontsize=9)
    axes.set_xlabel("expert" if experts else "", fontsize=10)


class Page:
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
        self.width, self.height = width + 1.5 * MARGIN, height + self.top + 0.25
        self.figure = figure_class(figsize=(self.width, self.height))
        self._write("\n".join(titles), 0.2, fontsize=12, fontweight="bold")
        self._write("\n".join(founds), 0.26 + 0.21 * len(titles), fontsize=9.5, color=LINE)

    def _write(self, text: str, top: float, **options: Any) -> None:
        self.figure.text(0.3 / self.width, 1 - top / self.height, text, ha="left", va="top", **options)

    def axes(self, left: float, width: float, height: float) -> Any:
        """Axes below the title, so far from the left margin."""
        bottom = 1 - (self.top + height) / self.height
        return self.figure.add_axes(((left + MARGIN) / self.width, bottom, width / self.width, height / self.height))


def _figure_class() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('Pictures need matplotlib: pip install "skywork-hf[figures]".') from error
    return Figure
