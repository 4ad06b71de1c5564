"""Draws the rows of a side-by-side run: time and memory by the number of pairs.

Figures are made for a width of 400 pixels, as on a phone. They do without colour: lines differ in
their markers and dashes. A white background keeps them readable in dark mode.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import matplotlib

from benchmarks.compare import competitors as names
from benchmarks.run import Row

matplotlib.use("Agg")  # files only: no display needed
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Milliseconds and megabytes by loss and number of pairs.
Costs = dict[tuple[str, int], tuple[float, float]]


class Line(NamedTuple):
    """How a loss is drawn. The symbol in its label looks like its marker."""

    loss: str
    label: str
    colour: str
    marker: str
    dashes: str = "-"


# By the end of the file's name. Colour-blind readers tell these colours apart.
FIGURES = {
    "cost": (
        Line(names.OUR_CLIP, "● ClipLoss", "#0072B2", "o"),
        Line(names.OPEN_CLIP, "■ open_clip.ClipLoss", "#595959", "s", ":"),
        Line(names.COMPILED[names.DENSE_CLIP], "▲ dense, compiled", "#A6467F", "^", "--"),
        Line(names.OURS, "◆ CyCLIPLoss", "#D55E00", "D"),
        Line(
            names.COMPILED[names.AUTHORS], "▼ CyCLIP's formula,\n    compiled", "black", "v", "-."
        ),
    ),
    "siglip-cost": (
        Line(names.OUR_SIGLIP, "● SigLipLoss", "#0072B2", "o"),
        Line(names.OPEN_SIGLIP, "■ open_clip.SigLipLoss", "#595959", "s", ":"),
        Line(names.COMPILED[names.DENSE_SIGLIP], "▲ dense, compiled", "#A6467F", "^", "--"),
    ),
}


def figures(rows: Iterable[Row], device: str) -> dict[str, Figure]:
    """The figures by name, of the first D and dtype. Later rows replace earlier ones."""
    rows = [row for row in rows if "ms" in row]
    first = rows[0]["D"], rows[0]["dtype"]
    costs = {
        (row["loss"], int(row["N"])): (float(row["ms"]), float(row["peak MB"]))
        for row in rows
        if (row["D"], row["dtype"]) == first
    }
    title = f"Forward and backward pass,\nD = {first[0]}, {first[1]},\n{device}"
    if users := sorted({loss for loss, _ in costs} - names.NAMES):
        beside = (*users, names.DENSE_CLIP, names.AUTHORS)  # the dense losses are not compiled here
        lines = (*FIGURES["cost"], *(Line(loss, f"✚ {loss}", "black", "P") for loss in beside))
        return {"cost": figure(costs, lines, title)}
    return {name: figure(costs, lines, title) for name, lines in FIGURES.items()}


def figure(costs: Costs, lines: Iterable[Line], title: str) -> Figure:
    """One panel for time, and one for memory."""
    plt.rcParams["font.size"] = 12.5
    drawn, panels = plt.subplots(2, figsize=(5, 8), dpi=160)
    drawn.suptitle(title, x=0.02, ha="left", fontsize="medium")
    drawn.subplots_adjust(left=0.14, right=0.55, bottom=0.08, top=0.85, hspace=0.25)
    sizes = sorted({n for _, n in costs})
    for i, (axes, unit) in enumerate(zip(panels, ("ms", "MB"), strict=True)):
        ends = []
        for loss, label, colour, marker, dashes in lines:
            found = [(n, costs[loss, n][i]) for n in sizes if (loss, n) in costs]
            # Too little memory to be seen has no logarithm.
            points = [(n, cost) for n, cost in found if cost > 0]
            if points:
                axes.loglog(
                    *zip(*points, strict=True), color=colour, marker=marker, linestyle=dashes
                )
                ends.append((points[-1][1], label, colour))
        axes.set_title(unit, loc="left", fontsize="medium")
        axes.set_xticks(sizes[::2], [f"{n:,}" for n in sizes[::2]])
        axes.yaxis.set_major_formatter("{x:,g}")
        axes.minorticks_off()
        axes.grid(alpha=0.5)
        label_ends(axes, sorted(ends, reverse=True))
    panels[1].set_xlabel("pairs")
    return drawn


def label_ends(axes: Axes, ends: list[tuple[float, str, str]]) -> None:
    """Write labels beside the right ends of lines, or below where there is no room.

    ends: y, label and colour, the highest first.
    """
    low, high = map(math.log, axes.get_ylim())
    line_height, free_below = 0.075, math.inf  # in heights of the panel
    for y, label, colour in ends:
        half = line_height * (1 + label.count("\n")) / 2
        place = min((math.log(y) - low) / (high - low), free_below - half)
        axes.text(1.03, place, label, color=colour, va="center", transform=axes.transAxes)
        free_below = place - half
