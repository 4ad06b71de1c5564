"""The pictures, 5.5 inches wide, to be read on a phone."""

import base64
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np

matplotlib.use("Agg")  # files, without a display
from matplotlib import pyplot as plt

from ..files import atomic_write
from ..losses import LOSSES
from . import published, table
from .records import Result

DRAWN = ("top1", "subgroup_top1", "image_to_text_r1", "consistency_1")
UNKNOWN_LOSS = "#8fa9c4"
PUBLISHED = {  # lighter than our own
    "CLIP": "#c3cad1",
    "CyCLIP": "#f2b8a5",
    "C-CyCLIP": "#b5dcd7",
    "I-CyCLIP": "#d3c2dc",
}
MANY_BARS = 12  # if a panel has more bars, three panels are placed in a row
GEOMETRY = ("inmodal_gap", "inmodal_correlation", "crossmodal_gap", "crossmodal_correlation")
MODELS = 4  # the most models whose similarities are in one picture


class Bar(NamedTuple):
    """A number in a panel."""

    title: str
    bounds: table.Bounded  # a share, and the lowest and the highest
    colour: str
    label: str
    is_one_run: bool


def use_style() -> None:
    """Sets the look of all pictures."""
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})


def draw(result: Result, path: Path) -> None:
    """Draws a panel of bars for each data set and headline metric, with the published numbers."""
    panels = {(m, name): bars(result, name, m) for m in DRAWN for name in result["data_sets"]}
    panels = {panel: found for panel, found in panels.items() if found}
    heights = [0.65 + 0.22 * len(found) for found in panels.values()] or [1.0]
    most = max(map(len, panels.values()), default=0)
    across = min(3, len(heights)) if most > MANY_BARS else 1
    row_heights = [max(heights[i : i + across]) for i in range(0, len(heights), across)]
    use_style()
    size = (5.5 * across, sum(row_heights))
    figure = plt.figure(figsize=size, dpi=200, layout="constrained")
    axes = figure.subplots(
        len(row_heights), across, squeeze=False, height_ratios=row_heights
    ).ravel()
    for ax in axes[len(panels) :]:
        ax.axis("off")
    for ax, ((metric, name), found) in zip(axes, panels.items(), strict=False):
        draw_bars(ax, found)
        data = result["data_sets"][name]
        title = f"{name}, {data['images']:,} images: {table.metrics_of(data)[metric].title}, %"
        if (guess := table.chance(data, metric)) is not None:
            ax.axvline(100 * guess, color="black", linestyle=":", linewidth=1.2)
            title += f" (chance {100 * guess:.2g})"
        ax.set_title(title, loc="right", fontsize=8)
    used = {bar.label[-1] for found in panels.values() for bar in found}
    legend = "bar: mean of the runs; line: lowest to highest\n"
    legend += "hatched bar: one run; its line: 95% interval (Wilson); dotted: chance"
    for mark, words in published.MARKS.items():
        if mark in used:
            legend += f"\n{mark}: {words.partition(' (')[0]}"
    figure.supxlabel(legend, fontsize=8)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png")
    plt.close(figure)


def draw_bars(ax: Any, found: Sequence[Bar]) -> None:
    """Draws horizontal bars with their numbers and bounds, in %."""
    value, low, high = 100 * np.array([bar.bounds for bar in found]).T
    drawn = ax.barh(
        [bar.title for bar in found],
        value,
        0.9,
        color=[bar.colour for bar in found],
        hatch=["//" if bar.is_one_run else "" for bar in found],
        edgecolor="white",
        linewidth=0,
        xerr=np.maximum((value - low, high - value), 0),  # rounding may make a length negative
        error_kw={"elinewidth": 0.9},
    )
    ax.bar_label(drawn, [bar.label for bar in found], padding=3)
    ax.invert_yaxis()
    ax.margins(x=0.16, y=0.02)  # room for the numbers


def bars(result: Result, name: str, metric: str) -> list[Bar]:
    """The bars of a data set: our runs and, below them, published numbers.

    Without runs of ours there are no bars.
    """
    data = result["data_sets"][name]
    if metric not in table.metrics_of(data):
        return []
    found: list[Bar] = []
    for column in table.columns(result):
        if bounds := table.summary(result, column.runs, name, metric):
            colour = LOSSES[column.loss].colour if column.loss else UNKNOWN_LOSS
            label = f"{100 * bounds[0]:.{table.digits(bounds[0])}f} "
            found.append(Bar(column.title, bounds, colour, label, len(column.runs) == 1))
    if found:
        for row in table.comparable(name, data, [metric])[0]:
            for model, percent in row.percent.items() if row.metric == metric else ():
                share = percent / 100
                label = f"{percent:.{table.digits(share)}f} {row.mark}"
                title = f"{model}, {row.source}"
                found.append(Bar(title, (share, share, share), PUBLISHED[model], label, False))
    return found


def draw_similarities(result: Result, path: Path) -> bool:
    """Draws three matrices for each data set and model that has them, on the same colour scales.

    Returns whether there are any.
    """
    shown = kept_similarities(result)
    if not shown:
        return False
    matrices = []
    for _, found in shown:
        rounded = np.frombuffer(base64.b64decode(found["matrices"]), np.int8)
        pairs = math.isqrt(len(rounded) // 3)
        image_image, text_text, image_text = rounded.reshape(3, pairs, pairs) / 127
        matrices.append((image_image, text_text, image_text - image_text.T))
    lowest = min(np.min(drawn[:2]) for drawn in matrices)
    greatest = max(np.abs(drawn[2]).max() for drawn in matrices) or 1.0
    similarity = {"cmap": "viridis", "vmin": lowest, "vmax": 1}
    difference = {"cmap": "RdBu", "vmin": -greatest, "vmax": greatest}
    figure = plt.figure(figsize=(5.5, 2.5 * len(shown) + 0.5), dpi=200, layout="constrained")
    axes = figure.subplots(len(shown), 3, squeeze=False)
    for row, (title, found), drawn in zip(axes, shown, matrices, strict=True):
        captions = matrix_captions(found["numbers"])
        scales = (similarity, similarity, difference)
        for ax, matrix, scale, label in zip(row, drawn, scales, captions, strict=True):
            ax.imshow(matrix, interpolation="nearest", **scale)
            ax.set(xticks=(), yticks=())
            ax.spines[:].set(visible=True, linewidth=0.5)
            ax.set_xlabel(label, fontsize=7.5)
        row[0].set_title(f"{title}, {len(drawn[0])} pairs", loc="left", fontsize=9)
    for columns, label in ((axes[:, :2], "similarity"), (axes[:, 2:], "difference")):
        image, aspect, room = columns[0, 0].images[0], 20 * columns.shape[1], 0.05 / len(shown)
        bar = figure.colorbar(
            image, ax=columns, location="bottom", aspect=aspect, fraction=room, pad=room
        )
        bar.set_label(label, fontsize=8)
        bar.ax.tick_params(labelsize=7.5)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png")
    plt.close(figure)
    return True


def kept_similarities(result: Result) -> list[tuple[str, dict[str, Any]]]:
    """The title and the similarities of each model that is drawn.

    A column of the table is drawn by its first run that has similarities. A data set has at most
    `MODELS` models.
    """
    shown: list[tuple[str, dict[str, Any]]] = []
    for name in result["data_sets"]:
        models = []
        for column in table.columns(result):
            kept = [run[name].get("similarities") for run in column.runs if name in run]
            models += [(f"{column.title}: {name}", found) for found in kept if found][:1]
        shown += models[:MODELS]
    return shown


def matrix_captions(numbers: dict[str, float]) -> list[str]:
    """The captions below the three matrices, with the numbers of `GEOMETRY`."""
    captions = ["image–image", "text–text", "image–text − its transpose"]
    for place, name in enumerate(GEOMETRY):
        metric, number = table.COMMON[name], numbers.get(name)
        value = "none" if number is None else table.cell((number, number, number), metric)
        captions[min(place, 2)] += f"\n{metric.title}: {value}"
    return captions
