"""Shows a side-by-side record: a summary in tables, and two figures."""

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd

from benchmarks.compare import competitors as names
from benchmarks.compare.accuracy import RANDOM
from benchmarks.run import OK, OUT_OF_MEMORY, Row, format_number, table, write_whole

matplotlib.use("Agg")  # files only: no display needed
from matplotlib import pyplot as plt

# Okabe and Ito's palette, which is safe for colour-blind readers; each line also has its marker.
STYLES = {
    names.OURS: ("#D55E00", "o"),
    names.EAGER: ("#CC79A7", "v"),
    names.AUTHORS: ("#0072B2", "s"),
    names.COMPILED: ("#009E73", "^"),
    names.OPEN_CLIP: ("#7F7F7F", "D"),
    names.PENALTIES_ONLY: ("#D55E00", "o"),
    names.DENSE_PENALTIES: ("#0072B2", "s"),
}
IN_COST_FIGURE = (*names.MAIN, names.EAGER)
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
    for title, losses in (
        ("Relative error of the gradient", WITH_BOTH_TERMS),
        ("The same of the penalties alone", PENALTIES_ALONE),
    ):
        tables[title] = compare_losses(error, case, "gradient", losses)
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
    """Write `<record>-cost.png` and `<record>-error.png`. A section without rows has no figure."""
    for name, draw_section, grid in (("cost", draw_costs, (1, 2)), ("error", draw_errors, (2, 1))):
        if not (rows := section_rows(record, name)):
            continue
        size = (5.5 * grid[1], 4.0 * grid[0])
        figure, axes = plt.subplots(*grid, figsize=size, dpi=150, layout="constrained")
        figure.suptitle(f"{draw_section(pd.DataFrame(rows), axes)}, {record['device']}")
        content = io.BytesIO()
        figure.savefig(content, format="png")
        plt.close(figure)
        path = record_file.with_name(f"{record_file.stem}-{name}.png")
        write_whole(content.getvalue(), path)
        print(f"wrote {path}")


def draw_costs(rows: pd.DataFrame, axes: Any) -> str:
    """Draw time and memory over N, relative to ours, at the most frequent D. Returns a title."""
    rows = rows[rows["D"] == (d := rows["D"].mode()[0])]
    failed = rows[rows["outcome"].str.contains(OUT_OF_MEMORY)]["loss"]
    for ax, column, title in zip(axes, ("ms", "peak MB"), ("Time", "Peak memory"), strict=True):
        values = rows.pivot(index="N", columns="loss", values=column)
        draw_lines(ax, values.div(values[names.OURS], axis=0), IN_COST_FIGURE, frozenset(failed))
        ax.set(xlabel="N, pairs in the batch", title=f"{title} relative to {names.OURS}")
        ax.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 3, 5)))
        ax.yaxis.set_major_formatter("{x:g}×")
    return f"Forward and backward pass, D = {d:,}"


def draw_errors(rows: pd.DataFrame, axes: Any) -> str:
    """Draw errors over the distance of pairs, for the first dtype. Returns a title."""
    n, d, dtype = rows.loc[0, ["N", "D", "dtype"]]
    rows = rows[rows["dtype"] == dtype].replace({"|T - I|": {RANDOM: RANDOM_DISTANCE}})
    values = rows.pivot(index="|T - I|", columns="loss", values="gradient")
    for ax, what, losses in zip(
        axes, ("gradient", "penalties' gradient"), (WITH_BOTH_TERMS, PENALTIES_ALONE), strict=True
    ):
        draw_lines(ax, values, losses)
        ax.set(
            xlabel="|T − I|, distance between the features of a pair (√2: random pairs)",
            title=f"Relative error of the {what}, against float64",
        )
    return f"N = {n:,}, D = {d:,}, {dtype}"


def draw_lines(
    ax: Any, values: pd.DataFrame, losses: Sequence[str], failed: frozenset[str] = frozenset()
) -> None:
    """Draw a line for each loss over logarithmic axes.

    values: a column for each loss; the index is x. NaN is left out. failed: losses that ran out of
    memory, as the legend says.
    """
    for loss in losses:
        if loss in values and (line := values[loss].dropna()).size:
            colour, marker = STYLES[loss]
            label = f"{loss} (then out of memory)" if loss in failed else loss
            line.plot(ax=ax, loglog=True, color=colour, marker=marker, linewidth=2, label=label)
    ax.grid(alpha=0.3)
    ax.set_xticks(values.index, [f"{x:,.3g}" if x < 10 else f"{x:,}" for x in values.index])
    ax.minorticks_off()
    ax.margins(y=0.35)  # room for the legend
    if ax.lines:
        ax.legend(framealpha=1, edgecolor="white", fontsize="small")
