"""The course of training."""

from pathlib import Path

import numpy as np
from matplotlib import pyplot as plt

from ..figures import panels
from ..losses import LOSSES

CURVES = {
    "contrastive_loss": "contrastive loss in training",
    "validation_inmodal_gap": "in-modal gap, held-out concepts",
    "validation_crossmodal_gap": "cross-modal gap, held-out concepts",
}


def draw_training(histories: dict[str, list[list[dict[str, float]]]], path: Path) -> None:
    """One line a loss: the mean over seeds. histories: loss -> seeds -> steps."""
    fig, axes = panels(3, 8.0)
    for ax, (name, title) in zip(axes, CURVES.items(), strict=True):
        for loss, runs in histories.items():
            points = [[(row["step"], row[name]) for row in run if name in row] for run in runs]
            steps, values = np.array(points).mean(axis=0).T
            looks = [np.mean(part) for part in np.array_split(values, min(200, len(values)))]
            at = [np.mean(part) for part in np.array_split(steps, min(200, len(steps)))]
            ax.plot(at, looks, color=LOSSES[loss].colour, label=LOSSES[loss].title, linewidth=1.8)
        ax.set_title(title, loc="left")
        ax.grid(alpha=0.3)
        if name != "contrastive_loss":
            ax.set_yscale("log")
    axes[-1].set_xlabel("step")
    handles, names = axes[0].get_legend_handles_labels()
    fig.legend(handles, names, frameon=False, loc="outside upper center", ncols=4)
    fig.savefig(path, format="png")
    plt.close(fig)
