"""The pictures, 5.5 inches wide, to be read on a phone."""

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")  # files, without a display
from matplotlib import pyplot as plt

from ..files import written_whole
from ..losses import LOSSES
from . import table

DRAWN = ("top1", "subgroup_top1", "image_to_text_r1", "consistency_1")
COLOURS = {look.title: look.colour for look in LOSSES.values()}
for _source in table.NOTES:
    COLOURS |= dict(zip(table.titles(_source), ("#c3cad1", "#f2b8a5"), strict=True))
TALL = 12  # more bars than that in a panel are too many for panels one above the other
Bar = tuple[str, tuple[float, float, float], str]  # title; value, lowest, highest; mark


def panels(heights: list[float], across: int = 1) -> tuple[Any, list[Any]]:
    """A figure and its panels, each 5.5 inches wide. heights: in inches; across: how many a row."""
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    rows = [max(heights[i : i + across]) for i in range(0, len(heights), across)]
    figure = plt.figure(figsize=(5.5 * across, sum(rows)), dpi=200, layout="constrained")
    axes = figure.subplots(len(rows), across, squeeze=False, height_ratios=rows).ravel()
    for ax in axes[len(heights) :]:
        ax.axis("off")
    return figure, list(axes)


def save(figure: Any, path: Path) -> None:
    """Writes a picture whole."""
    with written_whole(path) as partial:
        figure.savefig(partial, format="png")
    plt.close(figure)


def draw(result: table.Result, path: Path) -> None:
    """A panel for each data set and headline metric: yours, and what is published."""
    shown = {(m, name): bars(result, name, m) for m in DRAWN for name in result["data_sets"]}
    shown = {what: found for what, found in shown.items() if found}
    most = max(map(len, shown.values()), default=0)
    heights = [0.65 + 0.22 * len(found) for found in shown.values()] or [1.0]
    figure, axes = panels(heights, across=min(3, len(heights)) if most > TALL else 1)
    marks = set()
    for ax, ((metric, name), found) in zip(axes, shown.items(), strict=False):
        for y, (title, (value, low, high), mark) in enumerate(found):
            one_run = len(table.columns(result).get(title, ())) == 1
            colour = COLOURS.get(title) or COLOURS.get(title.rpartition(" ")[2], "#8fa9c4")
            hatch = "//" if one_run else None
            ax.barh(y, 100 * value, 0.9, color=colour, hatch=hatch, edgecolor="white", linewidth=0)
            ax.plot([100 * low, 100 * high], [y, y], color="black", linewidth=0.9)
            label = f" {100 * value:.{table.digits(value)}f} {mark}"
            ax.text(100 * max(value, high), y, label, va="center", fontsize=9)
            marks.add(mark)
        ax.set_yticks(range(len(found)), [title for title, *_ in found], fontsize=9)
        ax.invert_yaxis()
        ax.margins(x=0.16, y=0.02)  # room for the numbers
        data = result["data_sets"][name]
        title = f"{name}, {data['images']:,} images: {table.metrics_of(data)[metric].words}, %"
        if (guess := table.chance(data, metric)) is not None:
            ax.axvline(100 * guess, color="black", linestyle=":", linewidth=1.2)
            title += f" (chance {100 * guess:.2g})"
        ax.set_title(title, loc="right", fontsize=8)
    legend = "bar: mean of the runs; line: lowest to highest\n"
    legend += "hatched bar: one run; its line: 95% interval (Wilson); dotted: chance\n"
    legend += "; ".join(f"{mark}: {words}" for mark, words in table.MARKS.items() if mark in marks)
    figure.supxlabel(legend.strip(), fontsize=8)
    save(figure, path)


def bars(result: table.Result, name: str, metric: str) -> list[Bar]:
    """The bars of a data set, where you have it, and the published ones below: shares."""
    if metric not in table.metrics_of(result["data_sets"][name]):
        return []
    found: list[Bar] = []
    for title, runs in table.columns(result).items():
        if numbers := table.summary(result, runs, name, metric):
            found.append((title, numbers, ""))
    if found and not result["data_sets"][name].get("unlike_paper"):
        for source, published in table.published(name).items():
            if metric in published:
                *values, mark = published[metric]
                for title, value in zip(table.titles(source), values, strict=True):
                    found.append((title, (value / 100,) * 3, mark))
    return found


CURVES = {
    "contrastive_loss": "contrastive loss in training",
    "validation_inmodal_gap": "in-modal gap, held-out concepts",
    "validation_crossmodal_gap": "cross-modal gap, held-out concepts",
}


def draw_training(histories: dict[str, list[list[dict[str, float]]]], path: Path) -> None:
    """The course of training: one line a loss, the mean over seeds.

    histories: loss -> seeds -> steps.
    """
    figure, axes = panels([2.7] * len(CURVES))
    for ax, (name, title) in zip(axes, CURVES.items(), strict=True):
        for loss, runs in histories.items():
            points = [[(row["step"], row[name]) for row in run if name in row] for run in runs]
            course = np.array(points).mean(axis=0)  # (steps, 2)
            x, y = np.array([p.mean(0) for p in np.array_split(course, min(200, len(course)))]).T
            look = LOSSES[loss]
            ax.plot(x, y, color=look.colour, label=look.title, linewidth=1.8)
        ax.set_title(title, loc="left")
        ax.grid(alpha=0.3)
        if name != "contrastive_loss":
            ax.set_yscale("log")
    axes[0].legend(frameon=False)
    axes[-1].set_xlabel("step")
    save(figure, path)
