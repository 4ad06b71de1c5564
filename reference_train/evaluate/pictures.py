"""Draws picture.png and similarities.png, 5.5 inches wide so that a phone can show them."""

import base64
import math
from collections.abc import Sequence
from pathlib import Path
from textwrap import fill
from typing import Any, NamedTuple

import matplotlib
import numpy as np

matplotlib.use("Agg")  # files, without a display
from matplotlib import pyplot as plt

from ..files import atomic_write
from ..losses import LOSSES
from . import published, table
from .measure import PAIRS
from .records import Result

BAR_METRICS = ("top1", "subgroup_top1", "image_to_text_r1", "consistency_1")
UNKNOWN_LOSS = "#8fa9c4"  # colour of a run whose loss is not known
# Colours of published models, lighter than ours.
PUBLISHED = {
    "CLIP": "#c3cad1",
    "CyCLIP": "#f2b8a5",
    "C-CyCLIP": "#b5dcd7",
    "I-CyCLIP": "#d3c2dc",
}
MANY_BARS = 12  # if a panel has more bars, there are three panels in a row
MAX_MODELS = 4  # whose similarities are drawn for a data set


class Bar(NamedTuple):
    """A bar in a panel of picture.png."""

    title: str
    bounds: table.Bounded  # a share (not in %) and its bounds
    colour: str
    label: str
    is_one_run: bool


def use_style() -> None:
    """Sets the look of all pictures."""
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})


def save_figure(figure: Any, path: Path) -> None:
    """Writes a figure as a PNG, and closes it."""
    try:
        with atomic_write(path) as temporary:
            figure.savefig(temporary, format="png")
    finally:
        plt.close(figure)


def draw(result: Result, path: Path) -> None:
    """Draws a panel of bars for each metric of `BAR_METRICS` and each data set that has it."""
    panels = {
        (metric, name): bars(result, name, metric)
        for metric in BAR_METRICS
        for name in result["data_sets"]
    }
    panels = {panel: found for panel, found in panels.items() if found}
    heights = [0.65 + 0.22 * len(found) for found in panels.values()] or [1.0]
    max_bars = max(map(len, panels.values()), default=0)
    columns = min(3, len(heights)) if max_bars > MANY_BARS else 1
    row_heights = [max(heights[i : i + columns]) for i in range(0, len(heights), columns)]
    use_style()
    size = (5.5 * columns, sum(row_heights))
    figure = plt.figure(figsize=size, dpi=200, layout="constrained")
    axes = figure.subplots(
        len(row_heights), columns, squeeze=False, height_ratios=row_heights
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
    used_marks = {bar.label[-1] for found in panels.values() for bar in found}
    legend = "solid bar: mean of several runs; its line: lowest to highest run\n"
    legend += "hatched bar: one run; its line: 95% interval (Wilson). dotted line: chance"
    for mark, words in published.MARKS.items():
        if mark in used_marks:
            legend += f"\n{mark}: {words.partition(' (')[0]}"
    figure.supxlabel(legend, fontsize=8)
    save_figure(figure, path)


def draw_bars(ax: Any, found: Sequence[Bar]) -> None:
    """Draws horizontal bars with their labels and bounds, in %."""
    value, low, high = 100 * np.array([bar.bounds for bar in found]).T
    drawn = ax.barh(
        [bar.title for bar in found],
        value,
        0.9,
        color=[bar.colour for bar in found],
        hatch=["//" if bar.is_one_run else "" for bar in found],
        edgecolor="white",
        linewidth=0,
        xerr=np.maximum((value - low, high - value), 0),  # rounding may give -1e-17
        error_kw={"elinewidth": 0.9},
    )
    ax.bar_label(drawn, [bar.label for bar in found], padding=3)
    ax.invert_yaxis()
    ax.margins(x=0.16, y=0.02)  # room for the numbers


def bars(result: Result, name: str, metric: str) -> list[Bar]:
    """The bars of a data set and metric: our runs and, below them, published numbers.

    There are no bars if none of our runs has the metric.
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


class Matrix(NamedTuple):
    """A similarity matrix in similarities.png, and the metrics below it."""

    title: str
    axis: str  # what its rows and columns are
    metrics: tuple[str, str]  # keys of `table.COMMON`


MATRICES = (
    Matrix("image–image", "images", ("inmodal_gap", "inmodal_correlation")),
    Matrix("text–text", "texts", ("inmodal_gap", "inmodal_correlation")),
    Matrix("image–text − its transpose", "pairs", ("crossmodal_gap", "crossmodal_correlation")),
)


class Similarities(NamedTuple):
    """What similarities.png shows of one model and data set."""

    title: str
    note: str  # which pairs are shown, and which pairs the table has
    order: str  # of the rows and columns
    matrices: list[np.ndarray]  # (n, n) each, in the order of `MATRICES`
    captions: list[str]  # the metrics below each matrix


def draw_similarities(result: Result, path: Path) -> bool:
    """Draws three matrices for each data set and model that has them, on the same colour scales.

    Returns whether there were any.
    """
    shown = stored_similarities(result)
    if not shown:
        return False
    lowest = min(np.min(similarities.matrices[:2]) for similarities in shown)
    greatest = max(np.abs(similarities.matrices[2]).max() for similarities in shown) or 1.0
    similarity = {"cmap": "viridis", "vmin": lowest, "vmax": 1}
    difference = {"cmap": "RdBu", "vmin": -greatest, "vmax": greatest}
    heights = [3.1] * len(shown) + [0.6]
    use_style()
    figure = plt.figure(figsize=(5.5, sum(heights)), dpi=200, layout="constrained")
    *rows, bottom = figure.subfigures(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    for row, similarities in zip(rows, shown, strict=True):
        axes = draw_matrices(row, similarities, (similarity, similarity, difference))
    # All rows have the same colour scales, so the bars of the last row are enough.
    bar_axes = bottom.subplots(1, 2, width_ratios=(2, 1))
    for bar_ax, ax, label in zip(bar_axes, axes[1:], ("similarity", "difference"), strict=True):
        bar = figure.colorbar(ax.images[0], cax=bar_ax, orientation="horizontal")
        bar.set_label(label, fontsize=8)
        bar_ax.tick_params(labelsize=7.5)
    save_figure(figure, path)
    return True


def draw_matrices(figure: Any, similarities: Similarities, scales: Sequence[Any]) -> Any:
    """Draws the matrices of one model in a row. Returns their axes.

    scales: the colour scale of each matrix.
    """
    heading = f"{similarities.title}\n{similarities.note}"
    figure.suptitle(heading, x=0.01, ha="left", fontsize=8)
    axes = figure.subplots(1, len(MATRICES))
    for ax, matrix, values, caption, scale in zip(
        axes, MATRICES, similarities.matrices, similarities.captions, scales, strict=True
    ):
        ax.imshow(values, interpolation="nearest", **scale)
        ax.set(xticks=(), yticks=(), anchor="N")
        ax.spines[:].set(visible=True, linewidth=0.5)
        ax.set_title(matrix.title, fontsize=8)
        axis = f"{matrix.axis}, {similarities.order}"
        ax.set_ylabel(axis, fontsize=7)
        ax.set_xlabel(f"{axis}\n\n{caption}", fontsize=7)
    return axes


def stored_similarities(result: Result) -> list[Similarities]:
    """The similarities of each model that is drawn.

    Each column of the table is a model, of which the first run with similarities is drawn. For each
    data set, at most `MAX_MODELS` models are drawn.
    """
    shown: list[Similarities] = []
    for name in result["data_sets"]:
        models = []
        for column in table.columns(result):
            runs = [run[name] for run in column.runs if run.get(name, {}).get("similarities")]
            if runs:
                models.append(column_similarities(result, name, column, runs[0]))
        shown += models[:MAX_MODELS]
    return shown


def column_similarities(
    result: Result, name: str, column: table.Column, run: dict[str, Any]
) -> Similarities:
    """What similarities.png shows for a column of the table. run: the run of it that is drawn."""
    data = result["data_sets"][name]
    stored = run["similarities"]
    rounded = np.frombuffer(base64.b64decode(stored["matrices"]), np.int8)
    num_pairs = math.isqrt(len(rounded) // 3)
    image_image, text_text, image_text = rounded.reshape(3, num_pairs, num_pairs) / 127
    in_table = {
        key: bounds[0]
        for key in table.COMMON
        if (bounds := table.summary(result, column.runs, name, key))
    }
    runs = f", one of {len(column.runs)} runs" if len(column.runs) > 1 else ""
    tasks = list(data["classes"])
    return Similarities(
        title=f"{column.title}: {name}{runs}",
        note=pairs_note(data, run, num_pairs, len(column.runs)),
        order=f"sorted by {tasks[-1]}" if tasks else "in the data set's order",
        matrices=[image_image, text_text, image_text - image_text.T],
        captions=[matrix_caption(matrix, stored["numbers"], in_table) for matrix in MATRICES],
    )


def matrix_caption(matrix: Matrix, shown: dict[str, float], in_table: dict[str, float]) -> str:
    """The metrics of the pairs that a matrix shows, with the numbers of table.md in brackets."""
    lines = []
    for key in matrix.metrics:
        metric = table.COMMON[key]
        kind, _, title = metric.title.partition(" ")  # "in-modal", "gap × 100"
        number, table_number = (
            table.cell((x[key], x[key], x[key]), metric) if key in x else "none"
            for x in (shown, in_table)
        )
        lines.append(f"{title}: {number} (table: {table_number})")
    return "\n".join([kind, *lines])


def pairs_note(data: dict[str, Any], run: dict[str, Any], num_pairs: int, num_runs: int) -> str:
    """Says which pairs similarities.png shows, and which pairs table.md has."""
    styles = data["mean_over"]
    shown = f"Shown: {num_pairs} pairs"
    if run["groups"]:  # the pairs come from the first group
        shown += f" in {'style' if styles else 'group'} {next(iter(run['groups']))}"
    counts = [data["groups"][style] for style in styles] or [data["images"]]
    in_table = f"table: {sum(min(PAIRS, count) for count in counts):,} pairs"
    averaged = [f"{num_runs} runs"] if num_runs > 1 else []
    averaged += styles
    if averaged:
        in_table += f", the mean over {', '.join(averaged)}"
    return fill(f"{shown}; {in_table}.", 98)
