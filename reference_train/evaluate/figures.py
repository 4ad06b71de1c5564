"""Draws similarities.png, 5.5 inches wide so that a phone can show it."""

from collections.abc import Mapping
from pathlib import Path

import matplotlib
import numpy as np

from ..files import atomic_write

matplotlib.use("Agg")  # files, without a display
from matplotlib import pyplot as plt

MATRICES = ("image–image", "text–text", "image–text − its transpose")


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
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png")
    plt.close(figure)
