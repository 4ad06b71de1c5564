"""The summary of a side-by-side record: times, peaks and errors of all losses beside each other."""

from typing import Any

from benchmarks.compare.competitors import (
    AUTHORS,
    AUTHORS_IDS,
    BESIDE,
    COMPILED,
    DENSE_PENALTIES,
    IDS,
    OURS,
    PENALTIES_ONLY,
)
from benchmarks.compare.cost import OK
from benchmarks.record import number, table

Row = dict[str, Any]
# Gradients of the same size: of the whole loss, and of its penalties alone.
ERRORS = ((OURS, AUTHORS, COMPILED), (PENALTIES_ONLY, DENSE_PENALTIES))
WITH_IDS = (OURS, IDS, AUTHORS_IDS)


def rows_of(record: dict[str, Any], section: str) -> list[Row]:
    """The rows of a section; none of one that was not reached."""
    rows: list[Row] = record["sections"].get(section, {}).get("rows", [])
    return rows


def summary(record: dict[str, Any]) -> str:
    """Tables, each value with how many times ours it is; what was not measured is left out."""
    cost, error = rows_of(record, "cost"), rows_of(record, "error")
    pairs = ("N", "D", "dtype", "|T - I|")
    of_step = beside(rows_of(record, "training step"), ("batch",), "loss / step", BESIDE)
    parts = {
        "Forward and backward, ms": beside(cost, ("N", "D"), "ms", BESIDE),
        "Peak memory, MB": beside(cost, ("N", "D"), "peak MB", BESIDE),
        "With ids: forward and backward, ms": beside(cost, ("N", "D"), "ms", WITH_IDS),
        "With ids: peak memory, MB": beside(cost, ("N", "D"), "peak MB", WITH_IDS),
        "Relative error of the gradient": beside(error, pairs, "gradient", ERRORS[0]),
        "The same of the penalties alone": beside(error, pairs, "gradient", ERRORS[1]),
        "Share of a training step": of_step,
    }
    return "\n\n".join(f"{name}\n\n{table(lines)}" for name, lines in parts.items() if lines)


def beside(
    rows: list[Row], where: tuple[str, ...], column: str, losses: tuple[str, ...]
) -> list[Row]:
    """A line for each value of `where`, a column for each loss; the first is the measure."""
    lines: dict[tuple[Any, ...], Row] = {}
    measures: dict[tuple[Any, ...], float] = {}
    for row in sorted(
        (r for r in rows if r["loss"] in losses), key=lambda r: r["loss"] != losses[0]
    ):
        at = tuple(row[key] for key in where)
        line = lines.setdefault(at, dict(zip(where, at, strict=True)))
        if column not in row:
            line[row["loss"]] = "" if row["outcome"] == OK else row["outcome"]
        elif row["loss"] == losses[0]:
            measures[at] = row[column]
            line[row["loss"]] = number(row[column])
        else:
            times = f" ({number(row[column] / measures[at])} ×)" if at in measures else ""
            line[row["loss"]] = f"{number(row[column])}{times}"
    return list(lines.values())
