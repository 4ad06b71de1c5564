"""Pictures of runs on several numbers of training pairs: data size, and effective robustness.

The number of pairs is `train_num_samples` in a run's params.txt. A picture is drawn if the runs of
an evaluation have two such numbers or more. Published points stand beside ours where there are any.
"""

import math
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from matplotlib import pyplot as plt

from ..files import written_whole
from ..losses import LOSSES
from . import published
from .paper import why_incomparable
from .pictures import PUBLISHED, STYLE
from .records import Result

# Accuracy under a natural shift, over accuracy on the data set that it is a shift of.
SHIFTS = {
    "imagenet1k": ("imagenetv2", "imagenet-sketch", "imagenet-a", "imagenet-r"),
    "icons": ("emoji",),
}
# Goel et al. 2022 draw "standard training" as V2 = 1.2 * ImageNet - 9. Its source is not known.
STANDARD_TRAINING = {"imagenetv2": (1.2, -9.0)}
ACROSS = 2  # panels in a row


class Line(NamedTuple):
    """Zero-shot top-1 in %, by number of training pairs, of one loss."""

    title: str
    colour: str
    is_ours: bool
    percent: dict[int, float]


def our_lines(result: Result, name: str) -> list[Line]:
    """A line for each loss: means over the runs that have the same number of pairs."""
    found: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for title, run in result["checkpoints"].items():
        numbers = result["results"].get(title, {}).get(name, {}).get("numbers", {})
        pairs, loss = run.get("train_num_samples"), run.get("loss")
        if pairs and loss and "top1" in numbers:
            found[loss][pairs].append(100 * numbers["top1"])
    lines = []
    for loss in (loss for loss in LOSSES if loss in found):
        percent = {pairs: mean(found[loss][pairs]) for pairs in sorted(found[loss])}
        lines.append(Line(LOSSES[loss].title, LOSSES[loss].colour, True, percent))
    return lines


def all_lines(result: Result, name: str) -> list[Line]:
    """Our lines on a data set, and the published ones if it is the paper's."""
    theirs: list[Line] = []
    if not why_incomparable(name, result["data_sets"][name], "top1"):
        for model, percent in published.by_pairs(name).items():
            theirs.append(Line(f"{model}, paper", PUBLISHED[model], False, percent))
    return theirs + our_lines(result, name)


def several_sizes(result: Result) -> list[str]:
    """The data sets on which runs with different numbers of training pairs were measured."""
    return [
        name
        for name in result["data_sets"]
        if len({pairs for line in our_lines(result, name) for pairs in line.percent}) > 1
    ]


def draw_data_size(result: Result, path: Path) -> bool:
    """Accuracy over the number of training pairs; returns whether there is anything to draw."""

    def draw(ax: Any, name: str) -> None:
        for line in all_lines(result, name):
            draw_line(ax, line, list(line.percent), list(line.percent.values()))
        ax.set_xscale("log")
        ticks = sorted({pairs for line in all_lines(result, name) for pairs in line.percent})
        ax.set_xticks(ticks, [short_number(pairs) for pairs in ticks])
        ax.minorticks_off()
        ax.set_ylim(bottom=0)
        ax.set(title=f"{name}: zero-shot top-1, %", xlabel="training pairs")

    names = several_sizes(result)
    return draw_panels(
        names, draw, path, "dots: means over seeds; grey axis: pairs, on a log scale"
    )


def draw_robustness(result: Result, path: Path) -> bool:
    """Accuracy under a shift over accuracy without it; returns whether there is anything to draw.

    Raw %, as in the paper: nothing is transformed, and no line is fitted. What lies above the
    dashed line y = x loses nothing under the shift.
    """
    there = several_sizes(result)
    panels = {
        shift: base
        for base, shifts in SHIFTS.items()
        for shift in shifts
        if base in there and shift in there
    }

    def draw(ax: Any, shift: str) -> None:
        base = panels[shift]
        shifted = {line.title: line.percent for line in all_lines(result, shift)}
        points = []
        for line in all_lines(result, base):
            percent = shifted.get(line.title, {})
            common = [pairs for pairs in line.percent if pairs in percent]
            x, y = [line.percent[p] for p in common], [percent[p] for p in common]
            draw_line(ax, line, x, y)
            points += [*x, *y]
        end = 1.05 * max(points)
        ax.plot([0, end], [0, end], color="black", linestyle="--", linewidth=0.8, label="y = x")
        if shift in STANDARD_TRAINING:
            slope, offset = STANDARD_TRAINING[shift]
            start = max(0.0, -offset / slope)
            ax.plot(
                [start, end],
                [slope * start + offset, slope * end + offset],
                color="black",
                linestyle=":",
                linewidth=1,
                label="standard training, paper",
            )
        ax.set(xlim=(0, end), ylim=(0, end), xlabel=f"{base}, top-1, %")
        ax.set_title(f"{shift}: zero-shot top-1, %")

    return draw_panels(list(panels), draw, path, "dots: numbers of training pairs, fewest at left")


def draw_line(ax: Any, line: Line, x: list[float], y: list[float]) -> None:
    """Our points are filled and joined by a solid line; published ones are hollow and dashed."""
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


def draw_panels(
    names: list[str], draw: Callable[[Any, str], None], path: Path, caption: str
) -> bool:
    """A panel for each name, with one legend; returns whether there is any."""
    if not names:
        return False
    plt.rcParams.update(STYLE)
    across = min(ACROSS, len(names))
    down = math.ceil(len(names) / across)
    size = (5.5 * across / ACROSS if across > 1 else 4.2, 2.9 * down + 0.9)
    figure = plt.figure(figsize=size, dpi=200, layout="constrained")
    axes = figure.subplots(down, across, squeeze=False).ravel()
    for ax in axes[len(names) :]:
        ax.axis("off")
    legend: dict[str, Any] = {}
    for ax, name in zip(axes, names, strict=False):
        draw(ax, name)
        handles, labels = ax.get_legend_handles_labels()
        legend |= dict(zip(labels, handles, strict=True))
    figure.legend(
        list(legend.values()), list(legend), loc="outside lower center", ncols=3, fontsize=7.5
    )
    figure.supxlabel(caption, fontsize=7.5)
    with written_whole(path) as partial:
        figure.savefig(partial, format="png")
    plt.close(figure)
    return True


def short_number(pairs: int) -> str:
    """500000 -> "500K", 2000000 -> "2M", 2905954 -> "2.9M"."""
    for size, letter in ((1_000_000, "M"), (1_000, "K")):
        if pairs >= size:
            return f"{pairs / size:.1f}".removesuffix(".0") + letter
    return str(pairs)
