"""Pictures of runs that differ in the number of training pairs: data size, and robustness.

The number of pairs is `train_num_samples` in a run's params.txt. A picture is drawn if the runs of
an evaluation have at least two different numbers of pairs. It also shows published runs.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from matplotlib import pyplot as plt

from ..losses import LOSSES
from . import published
from .paper import why_incomparable
from .pictures import PUBLISHED, save_figure, use_style
from .records import Result
from .table import chance, series_of

# Data set -> data sets with the same task under a natural distribution shift.
SHIFTS = {
    "imagenet1k": ("imagenetv2", "imagenet-sketch", "imagenet-a", "imagenet-r"),
    "icons": ("emoji",),
}
# Goel et al. 2022 draw "standard training" as V2 = 1.2 * ImageNet - 9. Its source is not known.
STANDARD_TRAINING = {"imagenetv2": (1.2, -9.0)}
PANELS_PER_ROW = 2
MIN_RATIO = 1.2  # of two numbers of pairs, so that their labels on the axis do not overlap


class Size(NamedTuple):
    """What distinguishes the points of a line."""

    pairs: int
    series: str = ""  # what `table.series_of` returns for our runs; "": published


class Line(NamedTuple):
    """Zero-shot top-1 in %, by number of training pairs, of one loss."""

    title: str
    colour: str
    is_ours: bool
    percent: dict[Size, float]


def our_lines(result: Result, name: str) -> list[Line]:
    """A line for each loss. Its points are means over runs that differ in their seed only."""
    found: dict[str, dict[Size, list[float]]] = defaultdict(lambda: defaultdict(list))
    for title, run in result["checkpoints"].items():
        numbers = result["results"].get(title, {}).get(name, {}).get("numbers", {})
        pairs, loss = run.get("train_num_samples"), run.get("loss")
        if pairs and loss and "top1" in numbers:
            found[loss][Size(pairs, series_of(title, run))].append(100 * numbers["top1"])
    lines = []
    for loss in (loss for loss in LOSSES if loss in found):
        percent = {size: mean(found[loss][size]) for size in sorted(found[loss])}
        lines.append(Line(LOSSES[loss].title, LOSSES[loss].colour, True, percent))
    return lines


def all_lines(result: Result, name: str) -> list[Line]:
    """Our lines on a data set, and published lines if the data set is the paper's."""
    lines: list[Line] = []
    if not why_incomparable(name, result["data_sets"][name], "top1"):
        for model, percent in published.by_pairs(name).items():
            points = {Size(pairs): number for pairs, number in percent.items()}
            lines.append(Line(f"{model}, paper", PUBLISHED[model], False, points))
    return lines + our_lines(result, name)


def several_sizes(result: Result) -> list[str]:
    """The data sets that have results of runs with different numbers of training pairs."""
    return [
        name
        for name in result["data_sets"]
        if len({size.pairs for line in our_lines(result, name) for size in line.percent}) > 1
    ]


def draw_data_size(result: Result, path: Path) -> bool:
    """Draws accuracy against the number of training pairs. Returns whether there was any."""
    panels = [partial(draw_size_panel, result, name) for name in several_sizes(result)]
    return draw_panels(panels, path, "Dots are means over seeds.")


def draw_size_panel(result: Result, name: str, ax: Any) -> None:
    """Draws the accuracy on one data set."""
    lines = all_lines(result, name)
    for line in lines:
        draw_line(ax, line, [size.pairs for size in line.percent], list(line.percent.values()))
    if guess := chance(result["data_sets"][name], "top1"):
        ax.axhline(100 * guess, color="black", linestyle=":", linewidth=1, label="chance")
    ticks = sizes_with_a_label(lines)
    ax.set_xscale("log")
    ax.set_xticks(ticks, [short_number(pairs) for pairs in ticks])
    ax.minorticks_off()
    ax.set_ylim(bottom=0)
    ax.set_xlabel("training pairs")
    ax.set_title(f"{name}: zero-shot top-1, %", fontsize=8.5)


def sizes_with_a_label(lines: Sequence[Line]) -> list[int]:
    """The numbers of pairs that the axis shows.

    It shows all published numbers, and ours if their labels do not overlap with other labels.
    """
    published_first = sorted((line.is_ours, size.pairs) for line in lines for size in line.percent)
    labelled: list[int] = []
    for is_ours, pairs in published_first:
        if not is_ours or all(max(pairs / x, x / pairs) > MIN_RATIO for x in labelled):
            labelled.append(pairs)
    return sorted({*labelled})


def draw_robustness(result: Result, path: Path) -> bool:
    """Draws accuracy under a shift against accuracy without it. Returns whether there was any.

    As in the paper, the axes are linear, in %, and no line is fitted. A model above the dashed line
    y = x loses nothing under the shift.
    """
    drawable = several_sizes(result)
    panels = [
        partial(draw_shift_panel, result, base, shift)
        for base, shifts in SHIFTS.items()
        for shift in shifts
        if base in drawable and shift in drawable
    ]
    caption = "A dot is the mean over seeds for one number of training pairs."
    return draw_panels(panels, path, caption)


def draw_shift_panel(result: Result, base: str, shift: str, ax: Any) -> None:
    """Draws the accuracy on a shifted data set against the accuracy on the original one."""
    under_shift = {line.title: line.percent for line in all_lines(result, shift)}
    points = [0.1]
    for line in all_lines(result, base):
        percent = under_shift.get(line.title, {})
        common = [size for size in line.percent if size in percent]
        x, y = [line.percent[size] for size in common], [percent[size] for size in common]
        draw_line(ax, line, x, y)
        points += [*x, *y]
    end = 1.05 * max(points)
    ax.plot([0, end], [0, end], color="black", linestyle="--", linewidth=0.8, label="y = x")
    if shift in STANDARD_TRAINING:
        slope, offset = STANDARD_TRAINING[shift]
        start = -offset / slope  # where the line crosses zero
        ax.plot(
            [start, max(start, end)],
            [0, slope * max(start, end) + offset],
            color="black",
            linestyle=":",
            linewidth=1,
            label="standard training, paper",
        )
    ax.set(xlim=(0, end), ylim=(0, end), xlabel=f"{base}: zero-shot top-1, %")
    ax.set_title(f"{shift}: zero-shot top-1, %", fontsize=8.5)


def draw_line(ax: Any, line: Line, x: list[float], y: list[float]) -> None:
    """Draws our points filled on a solid line, and published points hollow on a dashed line."""
    ax.plot(
        x,
        y,
        color=line.colour,
        marker="o",
        markersize=4.5,
        markerfacecolor=line.colour if line.is_ours else "white",
        linestyle="-" if line.is_ours else "--",
        linewidth=1.4,
        label=line.title,
    )


def draw_panels(panels: Sequence[Callable[[Any], None]], path: Path, caption: str) -> bool:
    """Draws panels with one legend. Returns whether there are any panels.

    panels: functions that draw on the axes that they are given.
    """
    if not panels:
        return False
    use_style()
    columns = min(PANELS_PER_ROW, len(panels))
    rows = math.ceil(len(panels) / columns)
    size = (5.5 if columns > 1 else 4.2, 2.9 * rows + 0.9)
    figure = plt.figure(figsize=size, dpi=200, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for ax in axes[len(panels) :]:
        ax.axis("off")
    legend: dict[str, Any] = {}
    for ax, draw in zip(axes, panels, strict=False):
        draw(ax)
        handles, labels = ax.get_legend_handles_labels()
        legend |= dict(zip(labels, handles, strict=True))
    figure.legend(
        list(legend.values()),
        list(legend),
        title=caption,
        loc="outside lower center",
        ncols=3,
        fontsize=7.5,
        title_fontsize=7.5,
        frameon=False,
    )
    save_figure(figure, path)
    return True


def short_number(pairs: int) -> str:
    """500000 -> "500K", 2000000 -> "2M", 2905954 -> "2.91M"."""
    for size, letter in ((1_000_000, "M"), (1_000, "K")):
        if pairs >= size:
            return f"{pairs / size:.3g}{letter}"
    return str(pairs)
