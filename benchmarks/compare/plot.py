"""The pictures of a side-by-side record.

`python -m benchmarks plot RECORD.json` draws them anew, and makes the tables as well. Colours are
Okabe and Ito's, which people with any colour vision tell apart; lines differ in their marks too.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import matplotlib

from benchmarks.compare import competitors as names
from benchmarks.compare.accuracy import RANDOM
from benchmarks.compare.report import ERRORS, Row, rows_of, summary
from benchmarks.memory import OUT_OF_MEMORY
from benchmarks.record import markdown
from cyclip_loss.checks import PAPER_BATCH_SIZE
from reference_train.files import write_text, written_whole

matplotlib.use("Agg")  # files only: no display needed
from matplotlib import pyplot as plt

STYLES = {
    names.OURS: ("#D55E00", "o"),
    names.EAGER: ("#CC79A7", "v"),
    names.AUTHORS: ("#0072B2", "s"),
    names.COMPILED: ("#009E73", "^"),
    names.OPEN_CLIP: ("#7F7F7F", "D"),
}
# Of the whole loss (without penalties the gradient is different), and of the penalties alone.
WHOLE = {name: style for name, style in STYLES.items() if name != names.OPEN_CLIP}
ALONE = dict(zip(ERRORS[1], (STYLES[name] for name in ERRORS[0]), strict=False))


def main(options: argparse.Namespace) -> int:
    """Make the tables and pictures of a record anew, beside it."""
    try:
        record = json.loads(options.record.read_text())
        record["sections"]["cost"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(f"{options.record} is not a record of `python -m benchmarks`: {error!r}")
        return 2
    write_text(markdown(record, summary(record)), options.record.with_suffix(".md"))
    draw(record, options.record)
    return 0


def draw(record: dict[str, Any], beside: Path) -> None:
    """Write `<record>-cost.png` and `<record>-error.png`, as far as there is something in them."""
    cost, error = rows_of(record, "cost"), rows_of(record, "error")
    sizes = [d for _, d in {(row["N"], row["D"]) for row in cost}]
    cost = [row for row in cost if row["D"] == max(sizes, key=sizes.count)]
    error = [row for row in error if row["dtype"] == error[0]["dtype"]]
    if cost:
        figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), dpi=150, layout="constrained")
        columns = (("ms", "Time", "slower"), ("peak MB", "Peak memory", "larger"))
        for ax, (column, what, more) in zip(axes, columns, strict=True):
            _multiples(ax, cost, column)
            ax.set_title(
                f"{what} relative to CyCLIPLoss (above 1×: {more})", loc="left", fontsize=11
            )
        _save(
            figure,
            f"Forward and backward pass, D = {cost[0]['D']:,}, {record['device']}",
            beside.with_name(f"{beside.stem}-cost.png"),
        )
    if error:
        where = f"N = {error[0]['N']:,}, D = {error[0]['D']:,}, {error[0]['dtype']}"
        kinds = (("gradient", WHOLE), ("penalties' gradient", ALONE))
        figure, axes = plt.subplots(2, figsize=(5.5, 7.5), dpi=200, layout="constrained")
        for ax, (what, styles) in zip(axes, kinds, strict=True):
            title = f"Relative error of the {what},\nagainst float64: {where}"
            _lines(ax, title, error, styles, "|T - I|", "gradient")
            ax.set_xlabel("|T − I|, distance of a pair's features")
        _save(figure, record["device"], beside.with_name(f"{beside.stem}-error.png"))


def _multiples(ax: Any, rows: list[Row], column: str) -> None:
    """Each loss relative to ours, by N; where there was not enough memory the words say so."""
    ours = dict(points(rows, names.OURS, "N", column))
    places = {n: place for place, n in enumerate(sorted({row["N"] for row in rows}))}
    ax.set(yscale="log", xlabel="N, pairs in the batch", xlim=(-0.3, len(places) - 0.6))
    paper = {PAPER_BATCH_SIZE: "\n(the paper's)"}
    ax.set_xticks(list(places.values()), [f"{n:,}{paper.get(n, '')}" for n in places])
    for loss, (colour, mark) in STYLES.items():
        found = [(n, value / ours[n]) for n, value in points(rows, loss, "N", column) if n in ours]
        if found:
            at = [(places[n], times) for n, times in found]
            ax.plot(*zip(*at, strict=True), color=colour, marker=mark, linewidth=2, label=loss)
            if any(OUT_OF_MEMORY in row["outcome"] for row in rows if row["loss"] == loss):
                ax.annotate(
                    "then out of memory",
                    at[-1],
                    (6, 9),
                    textcoords="offset points",
                    ha="right",
                    fontsize="small",
                    color=colour,
                    bbox={"color": "white", "pad": 1},  # no line of the grid meets the words
                )
    ax.set_ylim(top=ax.get_ylim()[1] * 1.25)  # room for what is said of the last point
    ticks = [
        t for t in (0.5, 0.7, 1, 2, 3, 5, 10, 20, 50) if ax.get_ylim()[0] <= t <= ax.get_ylim()[1]
    ]
    ax.set_yticks(ticks, [f"{t:g}×" for t in ticks])
    ax.minorticks_off()
    ax.grid(alpha=0.3)
    ax.legend(framealpha=1, borderpad=0, edgecolor="white", fontsize="small", loc="upper left")


def _save(figure: Any, title: str, path: Path) -> None:
    figure.suptitle(title)
    with written_whole(path) as unfinished:
        figure.savefig(unfinished, format="png")
    plt.close(figure)
    print(f"wrote {path}")


def _lines(
    ax: Any, title: str, rows: list[Row], styles: dict[str, tuple[str, str]], x: str, y: str
) -> None:
    """One line a loss."""
    ax.set(xscale="log", yscale="log")
    ax.set_title(title, loc="left")
    ax.grid(alpha=0.3)
    for loss, (colour, mark) in styles.items():
        if found := points(rows, loss, x, y):
            ax.plot(*zip(*found, strict=True), color=colour, marker=mark, linewidth=2, label=loss)
    low, high = ax.get_ylim()
    ax.set_ylim(low, high * (high / low) ** 0.15)  # room for the legend
    if ax.get_legend_handles_labels()[0]:
        ax.legend(framealpha=1, edgecolor="white", fontsize="small", loc="upper right")


def points(rows: list[Row], loss: str, x: str, y: str) -> list[tuple[float, float]]:
    """Of a loss, by x, as far as it was measured and is a number. Random pairs have no distance."""
    pairs = [(row[x], row.get(y, math.nan)) for row in rows if row["loss"] == loss]
    return sorted(pair for pair in pairs if pair[0] != RANDOM and math.isfinite(pair[1]))
