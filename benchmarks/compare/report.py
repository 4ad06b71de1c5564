"""Shows a side-by-side record: a summary in tables, and a figure."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd

from benchmarks.compare import competitors as names
from benchmarks.run import OK, OUT_OF_MEMORY, Row, format_number, table

matplotlib.use("Agg")  # files only: no display needed
from matplotlib import pyplot as plt

# Okabe and Ito's palette, which is safe for colour-blind readers; each line also has its marker.
STYLES = {
    names.OURS: ("#D55E00", "o"),
    names.OUR_COMPILED: ("#E69F00", "P"),
    names.AUTHORS: ("#0072B2", "s"),
    names.COMPILED: ("#009E73", "^"),
    names.OPEN_CLIP: ("#7F7F7F", "D"),
}


def section_rows(record: dict[str, Any], section: str) -> list[Row]:
    """The rows of a section. An interrupted run may lack sections, which then have no rows."""
    rows: list[Row] = record["sections"].get(section, {}).get("rows", [])
    return rows


def summary(record: dict[str, Any]) -> str:
    """The tables of the summary, with ratios to the first loss. Empty tables are left out."""
    cost, error = section_rows(record, "cost"), section_rows(record, "error")
    tables = {}
    for group, losses in names.TABLES.items():
        for title, column in (("Forward and backward, ms", "ms"), ("Peak memory, MB", "peak MB")):
            tables[title + group] = compare_losses(cost, ("N", "D"), column, losses)
    for group, losses in names.IN_ERRORS.items():
        case = ("N", "D", "dtype", "|T - I|")
        title = f"Relative error of the gradient{group}"
        tables[title] = compare_losses(error, case, "gradient", losses)
    return "\n\n".join(f"{title}\n\n{table(rows)}" for title, rows in tables.items() if rows)


def compare_losses(
    rows: list[Row], case_columns: tuple[str, ...], column: str, losses: Sequence[str]
) -> list[Row]:
    """A row for each case of two losses or more, with a column for each loss.

    Ratios are to the first loss.
    """
    compared: dict[tuple[Any, ...], Row] = {}
    first_values: dict[tuple[Any, ...], float] = {}
    for row in (row for loss in losses for row in rows if row["loss"] == loss):
        case = tuple(row[key] for key in case_columns)
        cells = compared.setdefault(case, dict(zip(case_columns, case, strict=True)))
        if column not in row:
            cells[row["loss"]] = "" if row["outcome"] == OK else row["outcome"]
            continue
        cell = format_number(row[column])
        if row["loss"] == losses[0]:
            first_values[case] = row[column]
        elif case in first_values:
            cell += f" ({format_number(row[column] / first_values[case])} ×)"
        cells[row["loss"]] = cell
    return [cells for cells in compared.values() if len(cells) > len(case_columns) + 1]


def draw(record: dict[str, Any], file: Path) -> None:
    """Draw time and memory over N, relative to ours, at the most frequent D, into a PNG file."""
    rows = pd.DataFrame(section_rows(record, "cost"))
    if rows.empty:
        return
    rows = rows[rows["D"] == (d := rows["D"].mode()[0])]
    failed = set(rows[rows["outcome"].str.contains(OUT_OF_MEMORY)]["loss"])
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), dpi=150, layout="constrained")
    figure.suptitle(f"Forward and backward pass, D = {d:,}, {record['device']}")
    for ax, column, title in zip(axes, ("ms", "peak MB"), ("Time", "Peak memory"), strict=True):
        values = rows.pivot(index="N", columns="loss", values=column)
        draw_lines(ax, values.div(values[names.OURS], axis=0), failed)
        ax.set(xlabel="N, pairs in the batch", title=f"{title} relative to {names.OURS}")
    figure.savefig(file)
    plt.close(figure)


def draw_lines(ax: Any, values: pd.DataFrame, failed: set[str]) -> None:
    """Draw a line for each loss of `STYLES` over logarithmic axes.

    values: a column for each loss; the index is N. NaN is left out. failed: losses that ran out of
    memory, as the legend says.
    """
    for loss, (colour, marker) in STYLES.items():
        if loss in values and (line := values[loss].dropna()).size:
            label = f"{loss} (then out of memory)" if loss in failed else loss
            line.plot(ax=ax, loglog=True, color=colour, marker=marker, linewidth=2, label=label)
    ax.grid(alpha=0.3)
    ax.set_xticks(values.index, [f"{n:,}" for n in values.index])
    ax.minorticks_off()
    ax.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 3, 5)))
    ax.yaxis.set_major_formatter("{x:g}×")
    ax.margins(y=0.35)  # room for the legend
    ax.legend(framealpha=1, edgecolor="white", fontsize="small")
