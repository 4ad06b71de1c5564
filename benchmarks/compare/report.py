"""Shows a side-by-side record: a summary in tables, and two pictures.

The colours are from Okabe and Ito's palette, which is safe for colour-blind readers. Each line also
has its own marker.
"""

import io
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import mode
from typing import Any

import matplotlib

from benchmarks.compare import competitors as names
from benchmarks.compare.accuracy import RANDOM
from benchmarks.run import OK, OUT_OF_MEMORY, Row, format_number, table, write_whole
from cyclip_loss.usage_warnings import PAPER_BATCH_SIZE

matplotlib.use("Agg")  # files only: no display needed
from matplotlib import pyplot as plt
from matplotlib.ticker import LogLocator

Points = list[tuple[float, float]]
STYLES = {
    names.OURS: ("#D55E00", "o"),
    names.EAGER: ("#CC79A7", "v"),
    names.AUTHORS: ("#0072B2", "s"),
    names.COMPILED: ("#009E73", "^"),
    names.OPEN_CLIP: ("#7F7F7F", "D"),
    names.PENALTIES_ONLY: ("#D55E00", "o"),
    names.DENSE_PENALTIES: ("#0072B2", "s"),
}
IN_COST_PICTURE = (*names.MAIN, names.EAGER)
# Losses whose errors are compared with each other, because they compute the same function.
WITH_BOTH_TERMS = (names.OURS, names.EAGER, names.AUTHORS, names.COMPILED)
PENALTIES_ALONE = (names.PENALTIES_ONLY, names.DENSE_PENALTIES)
# Independent random vectors of unit length are about this far apart if D is large.
RANDOM_DISTANCE = math.sqrt(2)


def section_rows(record: dict[str, Any], section: str) -> list[Row]:
    """The rows of a section. An interrupted run may lack sections, which then have no rows."""
    rows: list[Row] = record["sections"].get(section, {}).get("rows", [])
    return rows


def summary(record: dict[str, Any]) -> str:
    """The tables of the summary, with ratios to the first loss. Empty tables are left out."""
    cost, error = section_rows(record, "cost"), section_rows(record, "error")
    step = section_rows(record, "training step")
    tables = {}
    for group, losses in names.TABLES.items():
        for title, column in (("Forward and backward, ms", "ms"), ("Peak memory, MB", "peak MB")):
            tables[title + group] = compare_losses(cost, ("N", "D"), column, losses)
    case = ("N", "D", "dtype", "|T - I|")
    tables["Relative error of the gradient"] = compare_losses(
        error, case, "gradient", WITH_BOTH_TERMS
    )
    penalties_alone = compare_losses(error, case, "gradient", PENALTIES_ALONE)
    tables["The same of the penalties alone"] = penalties_alone
    share = compare_losses(step, ("batch",), "loss / step", names.MAIN)
    tables["Share of a training step"] = share
    return "\n\n".join(f"{title}\n\n{table(rows)}" for title, rows in tables.items() if rows)


def compare_losses(
    rows: list[Row], case_columns: tuple[str, ...], column: str, losses: Sequence[str]
) -> list[Row]:
    """A row for each case, with a column for each loss. Ratios are to the first loss."""
    compared: dict[tuple[Any, ...], Row] = {}
    first_values: dict[tuple[Any, ...], float] = {}
    for row in (row for loss in losses for row in rows if row["loss"] == loss):
        case = tuple(row[key] for key in case_columns)
        cells = compared.setdefault(case, dict(zip(case_columns, case, strict=True)))
        if column not in row:
            cells[row["loss"]] = "" if row["outcome"] == OK else row["outcome"]
            continue
        cell = format_number(row[column])
        if case in first_values:
            cell += f" ({format_number(row[column] / first_values[case])} ×)"
        cells[row["loss"]] = cell
        if row["loss"] == losses[0]:
            first_values[case] = row[column]
    return list(compared.values())


def draw(record: dict[str, Any], record_file: Path) -> None:
    """Write `<record>-cost.png` and `<record>-error.png`. A section without rows has no picture."""
    if cost := section_rows(record, "cost"):
        path = record_file.with_name(f"{record_file.stem}-cost.png")
        _draw_cost(cost, record["device"], path)
    if errors := section_rows(record, "error"):
        path = record_file.with_name(f"{record_file.stem}-error.png")
        _draw_errors(errors, record["device"], path)


def _draw_cost(rows: list[Row], device: str, path: Path) -> None:
    """Time and peak memory relative to ours, at the D that most rows have."""
    d = mode(row["D"] for row in rows)
    rows = [row for row in rows if row["D"] == d]
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), dpi=150, layout="constrained")
    panels = (("ms", "Time", "slower"), ("peak MB", "Peak memory", "larger"))
    for ax, (column, title, above) in zip(axes, panels, strict=True):
        _draw_multiples(ax, rows, column)
        ax.set_title(f"{title} relative to {names.OURS} (above 1×: {above})", loc="left")
    _save(figure, f"Forward and backward pass, D = {d:,}, {device}", path)


def _draw_errors(rows: list[Row], device: str, path: Path) -> None:
    """Errors of the gradients over the distance of pairs, for the first dtype of the record."""
    n, d, dtype = (rows[0][key] for key in ("N", "D", "dtype"))
    rows = [row for row in rows if row["dtype"] == dtype]
    distances = sorted({row["|T - I|"] for row in rows} - {RANDOM})
    ticks = [f"{distance:g}" for distance in distances]
    figure, axes = plt.subplots(2, figsize=(5.5, 7.5), dpi=200, layout="constrained")
    panels = (("gradient", WITH_BOTH_TERMS), ("penalties' gradient", PENALTIES_ALONE))
    for ax, (gradient, losses) in zip(axes, panels, strict=True):
        _draw_lines(ax, {loss: points(rows, loss, "|T - I|", "gradient") for loss in losses})
        ax.set(xscale="log", xlabel="|T − I|, distance between the features of a pair")
        ax.set_xticks([*distances, RANDOM_DISTANCE], [*ticks, "random\npairs"])
        ax.tick_params(axis="x", which="minor", bottom=False)
        case = f"N = {n:,}, D = {d:,}, {dtype}"
        ax.set_title(f"Relative error of the {gradient},\nagainst float64: {case}", loc="left")
    _save(figure, device, path)


def _draw_multiples(ax: Any, rows: list[Row], column: str) -> None:
    """Draw the values of a column over N, divided by ours. Mark where a loss ran out of memory."""
    ours = dict(points(rows, names.OURS, "N", column))
    lines = {
        loss: [(n, y / ours[n]) for n, y in points(rows, loss, "N", column) if n in ours]
        for loss in IN_COST_PICTURE
    }
    _draw_lines(ax, lines)
    for loss, line in lines.items():
        failed = any(OUT_OF_MEMORY in row["outcome"] for row in rows if row["loss"] == loss)
        if failed and line:
            style = {"color": STYLES[loss][0], "fontsize": "small", "ha": "right"}
            ax.annotate("then out of memory", line[-1], (6, 9), textcoords="offset points", **style)
    batch_sizes = sorted({row["N"] for row in rows})
    notes = {PAPER_BATCH_SIZE: "\n(the paper's)"}
    ax.set(xscale="log", xlabel="N, pairs in the batch")
    ax.set_xticks(batch_sizes, [f"{n:,}{notes.get(n, '')}" for n in batch_sizes])
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    ax.yaxis.set_major_formatter("{x:g}×")
    ax.minorticks_off()


def _draw_lines(ax: Any, lines: dict[str, Points]) -> None:
    """Draw a line for each loss that has points, over a logarithmic axis."""
    ax.set_yscale("log")
    ax.grid(alpha=0.3)
    for loss, line in lines.items():
        if line:
            colour, marker = STYLES[loss]
            ax.plot(*zip(*line, strict=True), color=colour, marker=marker, linewidth=2, label=loss)
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


def points(rows: list[Row], loss: str, x: str, y: str) -> Points:
    """The values of columns x and y for a loss, sorted by x. Only finite y are drawn.

    Random pairs are drawn at `RANDOM_DISTANCE`.
    """
    found = [
        (RANDOM_DISTANCE if row[x] == RANDOM else row[x], row.get(y, math.nan))
        for row in rows
        if row["loss"] == loss
    ]
    return sorted(point for point in found if math.isfinite(point[1]))
