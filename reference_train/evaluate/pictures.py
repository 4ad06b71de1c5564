"""The pictures, 5.5 inches wide, to be read on a phone."""

import base64
import math
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
GEOMETRY = ("inmodal_gap", "inmodal_correlation", "crossmodal_gap", "crossmodal_correlation")
MODELS = 4  # of similarities, in one picture
Bar = tuple[str, tuple[float, float, float], str]  # title; value, lowest, highest; mark


def draw(result: table.Result, path: Path) -> None:
    """A panel for each data set and headline metric: yours, and what is published."""
    shown = {(m, name): bars(result, name, m) for m in DRAWN for name in result["data_sets"]}
    shown = {what: found for what, found in shown.items() if found}
    heights = [0.65 + 0.22 * len(found) for found in shown.values()] or [1.0]
    most = max(map(len, shown.values()), default=0)
    across = min(3, len(heights)) if most > TALL else 1
    rows = [max(heights[i : i + across]) for i in range(0, len(heights), across)]
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    figure = plt.figure(figsize=(5.5 * across, sum(rows)), dpi=200, layout="constrained")
    axes = figure.subplots(len(rows), across, squeeze=False, height_ratios=rows).ravel()
    for ax in axes[len(shown) :]:
        ax.axis("off")
    for ax, ((metric, name), found) in zip(axes, shown.items(), strict=False):
        titles, numbers, _ = zip(*found, strict=True)
        value, low, high = 100 * np.array(numbers).T
        one_run = [len(table.columns(result).get(title, ())) == 1 for title in titles]
        drawn = ax.barh(
            titles,
            value,
            0.9,
            color=[COLOURS.get(t) or COLOURS.get(t.rpartition(" ")[2], "#8fa9c4") for t in titles],
            hatch=["//" if one else "" for one in one_run],
            edgecolor="white",
            linewidth=0,
            xerr=np.maximum((value - low, high - value), 0),  # as rounded, it may be below
            error_kw={"elinewidth": 0.9},
        )
        labels = [f"{100 * n[0]:.{table.digits(n[0])}f} {mark}" for _, n, mark in found]
        ax.bar_label(drawn, labels, padding=3)
        ax.invert_yaxis()
        ax.margins(x=0.16, y=0.02)  # room for the numbers
        data = result["data_sets"][name]
        title = f"{name}, {data['images']:,} images: {table.metrics_of(data)[metric].words}, %"
        if (guess := table.chance(data, metric)) is not None:
            ax.axvline(100 * guess, color="black", linestyle=":", linewidth=1.2)
            title += f" (chance {100 * guess:.2g})"
        ax.set_title(title, loc="right", fontsize=8)
    used = {mark for found in shown.values() for *_, mark in found}
    legend = "bar: mean of the runs; line: lowest to highest\n"
    legend += "hatched bar: one run; its line: 95% interval (Wilson); dotted: chance\n"
    legend += "; ".join(f"{mark}: {words}" for mark, words in table.MARKS.items() if mark in used)
    figure.supxlabel(legend.strip(), fontsize=8)
    with written_whole(path) as partial:
        figure.savefig(partial, format="png")
    plt.close(figure)


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


def draw_similarities(result: table.Result, path: Path) -> bool:
    """Three matrices for each data set and model that has them; says whether there are any.

    Of several runs of a model the first that has them. Colours mean the same throughout.
    """
    shown: list[tuple[str, dict[str, Any]]] = []
    for name in result["data_sets"]:
        rows = []
        for title, runs in table.columns(result).items():
            kept = [run[name].get("similarities") for run in runs if name in run]
            rows += [(f"{title}: {name}", found) for found in kept if found][:1]
        shown += rows[:MODELS]
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
        words = ["image–image", "text–text", "image–text − its transpose"]
        for place, metric in enumerate(GEOMETRY):
            of, number = table.COMMON[metric], found["numbers"].get(metric)
            value = "none" if number is None else table.cell((number,) * 3, of)
            words[min(place, 2)] += f"\n{of.words}: {value}"
        scales = (similarity, similarity, difference)
        for ax, matrix, scale, label in zip(row, drawn, scales, words, strict=True):
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
    with written_whole(path) as partial:
        figure.savefig(partial, format="png")
    plt.close(figure)
    return True
