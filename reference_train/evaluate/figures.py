"""Draws picture.png and similarities.png, 5.5 inches wide so that a phone can show them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np

from ..files import atomic_write

matplotlib.use("Agg")  # files, without a display
from matplotlib import pyplot as plt

ONE_COLUMN = 12  # more panels are drawn three in a row
MATRICES = ("image–image", "text–text", "image–text − its transpose")
LEGEND = (
    "solid bar: mean of several runs; its line: lowest to highest run\n"
    "hatched bar: one run; its line: 95% interval (Wilson). dotted line: chance"
)


class Bar(NamedTuple):
    """A bar in a panel of picture.png."""

    title: str
    percent: tuple[float, float, float]  # the number, its lower and its upper bound
    colour: str
    label: str
    is_one_run: bool


class Panel(NamedTuple):
    """A panel of picture.png: a metric of a dataset."""

    title: str
    bars: list[Bar]
    chance: float | None  # in %


class Similarities(NamedTuple):
    """The similarities of a model and a dataset in similarities.png."""

    title: str
    axis: str  # what the rows and columns are
    matrices: list[np.ndarray]  # (n, n) each, in the order of `MATRICES`


def save(figure: Any, path: Path) -> None:
    """Writes a figure as a PNG, and closes it."""
    try:
        with atomic_write(path) as temporary:
            figure.savefig(temporary, format="png")
    finally:
        plt.close(figure)


def draw_bars(panels: Sequence[Panel], path: Path) -> None:
    """Draws panels of horizontal bars, with their labels and bounds, in %."""
    heights = [0.65 + 0.22 * len(panel.bars) for panel in panels] or [1.0]
    columns = 1 if len(panels) <= ONE_COLUMN else 3
    row_heights = [max(heights[i : i + columns]) for i in range(0, len(heights), columns)]
    size = (5.5 * columns, sum(row_heights))
    figure = plt.figure(figsize=size, dpi=200, layout="constrained")
    axes = figure.subplots(len(row_heights), columns, squeeze=False, height_ratios=row_heights)
    for ax in axes.flat[len(panels) :]:
        ax.axis("off")
    for ax, panel in zip(axes.flat, panels, strict=False):
        value, low, high = np.array([bar.percent for bar in panel.bars]).T
        drawn = ax.barh(
            [bar.title for bar in panel.bars],
            value,
            0.9,
            color=[bar.colour for bar in panel.bars],
            hatch=["//" if bar.is_one_run else "" for bar in panel.bars],
            edgecolor="white",
            linewidth=0,
            xerr=np.maximum((value - low, high - value), 0),  # rounding may give -1e-17
            error_kw={"elinewidth": 0.9},
        )
        ax.bar_label(drawn, [bar.label for bar in panel.bars], padding=3)
        ax.invert_yaxis()
        ax.margins(x=0.16, y=0.02)  # room for the numbers
        if panel.chance is not None:
            ax.axvline(panel.chance, color="black", linestyle=":", linewidth=1.2)
        ax.set_title(panel.title, loc="right", fontsize=8)
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(labelsize=9)
    figure.supxlabel(LEGEND, fontsize=8)
    save(figure, path)


def draw_similarities(models: Sequence[Similarities], path: Path) -> None:
    """Draws three matrices for each model, on the same colour scales."""
    lowest = min(np.min(model.matrices[:2]) for model in models)
    greatest = max(np.abs(model.matrices[2]).max() for model in models) or 1.0
    similarity = {"cmap": "viridis", "vmin": lowest, "vmax": 1}
    scales = (similarity, similarity, {"cmap": "RdBu", "vmin": -greatest, "vmax": greatest})
    figure = plt.figure(figsize=(5.5, 2.6 * len(models) + 0.6), dpi=200, layout="constrained")
    rows = figure.subfigures(len(models), 1, squeeze=False)[:, 0]
    for row, model in zip(rows, models, strict=True):
        row.suptitle(model.title, x=0.01, ha="left", fontsize=8)
        axes = row.subplots(1, len(MATRICES))
        for ax, title, matrix, scale in zip(axes, MATRICES, model.matrices, scales, strict=True):
            drawn = ax.imshow(matrix, interpolation="nearest", **scale)
            ax.set(xticks=(), yticks=())
            ax.set_title(title, fontsize=8)
            ax.set_xlabel(model.axis, fontsize=7)
            # All models have the same colour scales, so the bars of the last row are enough.
            if model is models[-1]:
                bar = row.colorbar(drawn, ax=ax, orientation="horizontal")
                bar.ax.tick_params(labelsize=7)
    save(figure, path)
