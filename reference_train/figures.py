"""What all pictures have in common: files without a display, 5.5 inches wide, for a phone."""

from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt


def panels(rows: int, height: float, **more: Any) -> tuple[Any, list[Any]]:
    """A figure and its panels, one above the other. height: in inches; more: of `plt.subplots`."""
    plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(
        *(rows, 1),
        figsize=(5.5, height),
        dpi=200,
        layout="constrained",
        squeeze=False,
        **more,
    )
    return figure, list(axes[:, 0])
