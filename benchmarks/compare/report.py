"""How a side-by-side record is shown: tables of times, peaks and errors, and two pictures.

Colours are Okabe and Ito's, which people with any colour vision tell apart; lines differ in their
marks too.
"""

import io
import math
from pathlib import Path
from statistics import mode
from typing import Any

import matplotlib

from benchmarks.compare import competitors as names
from benchmarks.compare.accuracy import RANDOM
from benchmarks.run import OK, OUT_OF_MEMORY, Row, number, table, write_whole
from cyclip_loss.usage_warnings import PAPER_BATCH_SIZE

matplotlib.use("Agg")  # files only: no display needed
from matplotlib import pyplot as plt
from matplotlib.ticker import LogLocator

Lines = dict[str, list[tuple[float, float]]]  # the points of each loss
STYLES = {
    names.OURS: ("#D55E00", "o"),
    names.EAGER: ("#CC79A7", "v"),
    names.AUTHORS: ("#0072B2", "s"),
    names.COMPILED: ("#009E73", "^"),
    names.OPEN_CLIP: ("#7F7F7F", "D"),
    names.PENALTIES_ONLY: ("#D55E00", "o"),
    names.DENSE_PENALTIES: ("#0072B2", "s"),
}
# Gradients of the same size: of the whole loss, and of its penalties alone.
WHOLE = (names.OURS, names.EAGER, names.AUTHORS, names.COMPILED)
ALONE = (names.PENALTIES_ONLY, names.DENSE_PENALTIES)


def rows_of(record: dict[str, Any], section: str) -> list[Row]:
    """The rows of a section; none of one that was not reached."""
    rows: list[Row] = record["sections"].get(section, {}).get("rows", [])
    return rows


def summary(record: dict[str, Any]) -> str:
    """Tables, each value with how many times ours it is; what was not measured is left out."""
    cost, error = rows_of(record, "cost"), rows_of(record, "error")
    step, pairs = rows_of(record, "training step"), ("N", "D", "dtype", "|T - I|")
    sets = {"": names.BESIDE} | {f", with {m}": losses for m, losses in names.WITH_MORE.items()}
    parts = {
        f"{what}{more}": compared(cost, ("N", "D"), column, losses)
        for more, losses in sets.items()
        for what, column in (("Forward and backward, ms", "ms"), ("Peak memory, MB", "peak MB"))
    } | {
        "Relative error of the gradient": compared(error, pairs, "gradient", WHOLE),
        "The same of the penalties alone": compared(error, pairs, "gradient", ALONE),
        "Share of a training step": compared(step, ("batch",), "loss / step", names.BESIDE),
    }
    return "\n\n".join(f"{name}\n\n{table(lines)}" for name, lines in parts.items() if lines)


def compared(
    rows: list[Row], where: tuple[str, ...], column: str, losses: tuple[str, ...]
) -> list[Row]:
    """A line for each value of `where`, a column for each loss; ratios are to the first loss."""
    lines: dict[tuple[Any, ...], Row] = {}
    firsts: dict[tuple[Any, ...], float] = {}
    for row in (row for loss in losses for row in rows if row["loss"] == loss):
        at = tuple(row[key] for key in where)
        line = lines.setdefault(at, dict(zip(where, at, strict=True)))
        if column not in row:
            line[row["loss"]] = "" if row["outcome"] == OK else row["outcome"]
            continue
        ratio = f" ({number(row[column] / firsts[at])} ×)" if at in firsts else ""
        line[row["loss"]] = f"{number(row[column])}{ratio}"
        if row["loss"] == losses[0]:
            firsts[at] = row[column]
    return list(lines.values())


def draw(record: dict[str, Any], beside: Path) -> None:
    """Write `<record>-cost.png` and `<record>-error.png`, as far as there is something in them."""
    cost, error = rows_of(record, "cost"), rows_of(record, "error")
    if cost:
        d = mode(row["D"] for row in cost)
        cost = [row for row in cost if row["D"] == d]
        figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), dpi=150, layout="constrained")
        columns = (("ms", "Time", "slower"), ("peak MB", "Peak memory", "larger"))
        for ax, (column, what, more) in zip(axes, columns, strict=True):
            _multiples(ax, cost, column)
            ax.set_title(f"{what} relative to {names.OURS} (above 1×: {more})", loc="left")
        title = f"Forward and backward pass, D = {d:,}, {record['device']}"
        _save(figure, title, beside.with_name(f"{beside.stem}-cost.png"))
    if error:
        n, d, dtype = (error[0][key] for key in ("N", "D", "dtype"))
        error = [row for row in error if row["dtype"] == dtype]
        kinds = (("gradient", WHOLE), ("penalties' gradient", ALONE))
        figure, axes = plt.subplots(2, figsize=(5.5, 7.5), dpi=200, layout="constrained")
        for ax, (what, losses) in zip(axes, kinds, strict=True):
            _lines(ax, {loss: points(error, loss, "|T - I|", "gradient") for loss in losses})
            ax.set(xscale="log", xlabel="|T − I|, distance of a pair's features")
            where = f"N = {n:,}, D = {d:,}, {dtype}"
            ax.set_title(f"Relative error of the {what},\nagainst float64: {where}", loc="left")
        _save(figure, record["device"], beside.with_name(f"{beside.stem}-error.png"))


def _multiples(ax: Any, rows: list[Row], column: str) -> None:
    """Each loss relative to ours, by N; where there was not enough memory the words say so."""
    ours = dict(points(rows, names.OURS, "N", column))
    lines: Lines = {
        loss: [(n, y / ours[n]) for n, y in points(rows, loss, "N", column) if n in ours]
        for loss in names.LARGE
    }
    _lines(ax, lines)
    for loss, line in lines.items():
        failed = any(OUT_OF_MEMORY in row["outcome"] for row in rows if row["loss"] == loss)
        if failed and line:
            style = {"color": STYLES[loss][0], "fontsize": "small", "ha": "right"}
            ax.annotate("then out of memory", line[-1], (6, 9), textcoords="offset points", **style)
    batches, paper = sorted({row["N"] for row in rows}), {PAPER_BATCH_SIZE: "\n(the paper's)"}
    ax.set(xscale="log", xlabel="N, pairs in the batch")
    ax.set_xticks(batches, [f"{n:,}{paper.get(n, '')}" for n in batches])
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    ax.yaxis.set_major_formatter("{x:g}×")
    ax.minorticks_off()


def _lines(ax: Any, lines: Lines) -> None:
    """One line a loss, as far as it has points, on a logarithmic axis."""
    ax.set_yscale("log")
    ax.grid(alpha=0.3)
    for loss, line in lines.items():
        if line:
            colour, mark = STYLES[loss]
            ax.plot(*zip(*line, strict=True), color=colour, marker=mark, linewidth=2, label=loss)
    low, high = ax.get_ylim()
    ax.set_ylim(low, high * (high / low) ** 0.15)  # room for the legend
    if any(lines.values()):
        ax.legend(framealpha=1, edgecolor="white", fontsize="small")


def _save(figure: Any, title: str, path: Path) -> None:
    figure.suptitle(title)
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    plt.close(figure)
    write_whole(picture.getvalue(), path)
    print(f"wrote {path}")


def points(rows: list[Row], loss: str, x: str, y: str) -> list[tuple[float, float]]:
    """Of a loss, by x, as far as it was measured and is a number. Random pairs have no distance."""
    pairs = [(row[x], row.get(y, math.nan)) for row in rows if row["loss"] == loss]
    return sorted(pair for pair in pairs if pair[0] != RANDOM and math.isfinite(pair[1]))
