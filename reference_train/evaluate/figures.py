"""Draws picture.png and similarities.png, 5.5 inches wide so that a phone can show them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd

from ..files import atomic_write

matplotlib.use("Agg")  # files, without a display
from matplotlib import pyplot as plt

MATRICES = ("image–image", "text–text", "image–text − its transpose")


def draw_bars(panels: Mapping[str, pd.DataFrame], path: Path) -> None:
    """Draws a panel of horizontal bars for each metric, in %.

    panels: title -> a table with a row for each dataset and, for "mean", "min" and "max", a column
    for each model.
    """
    heights = [1 + 0.2 * table["mean"].size for table in panels.values()]
    figure = plt.figure(figsize=(5.5, sum(heights)), dpi=200, layout="constrained")
    axes = figure.subplots(len(panels), squeeze=False, height_ratios=heights)[:, 0]
    for ax, (title, table) in zip(axes, panels.items(), strict=True):
        table = table[::-1]  # the first dataset is drawn on top
        mean = table["mean"]
        # From the mean to the lowest and to the highest: (models, 2, datasets).
        bounds = np.stack([mean - table["min"], table["max"] - mean]).transpose(2, 0, 1)
        mean.plot.barh(ax=ax, xerr=bounds, colormap="tab20", fontsize=7, legend=False)
        ax.set(title=title, ylabel="")
        ax.margins(x=0.16)  # room for the numbers
        for bars in ax.containers[1::2]:  # each is behind its error bars
            ax.bar_label(bars, fmt="%.3g", padding=3, fontsize=7)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower right", ncols=2)
    save(figure, path)


def draw_similarities(models: Mapping[str, np.ndarray], path: Path) -> None:
    """Draws three matrices for each model, on the same colour scales.

    models: title -> (3, n, n), the products I_i · I_j, T_i · T_j and I_i · T_j.
    """
    size = (5.5, 2.3 * len(models) + 0.5)
    figure = plt.figure(figsize=size, dpi=200, layout="constrained")
    rows = figure.subplots(len(models), 3, squeeze=False)
    matrices = [np.stack((x[0], x[1], x[2] - x[2].T)) for x in models.values()]
    greatest = max(np.abs(x[2]).max() for x in matrices) or 1.0
    similarity = {"cmap": "viridis", "vmin": min(x[:2].min() for x in matrices), "vmax": 1}
    difference = {"cmap": "RdBu", "vmin": -greatest, "vmax": greatest}
    for row, title, shown in zip(rows, models, matrices, strict=True):
        row[0].set_title(f"{title}", loc="left", fontsize=8)
        for i, ax in enumerate(row):
            ax.imshow(shown[i], **(difference if i == 2 else similarity))
            ax.set(xticks=(), yticks=())
            ax.set_xlabel(MATRICES[i], fontsize=7)
    for ax in rows[-1]:
        figure.colorbar(ax.images[0], ax=ax, orientation="horizontal")
    save(figure, path)


def save(figure: Any, path: Path) -> None:
    """Writes a figure as a PNG, and closes it."""
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png")
    plt.close(figure)
