"""The figures one asks for, each computed from the rows of one run, beside what was hoped for.

A figure whose rows the run does not have says so; nothing here is a number but the sizes and the
targets.
"""

from collections.abc import Callable
from typing import Any

from benchmarks.accuracy import RANDOM
from benchmarks.competitors import COMPILED, DENSE, OPEN_CLIP, OURS_PENALTIES
from benchmarks.cost import OK
from benchmarks.memory import OUT_OF_MEMORY

HEADLINE = (8192, 512)
LARGE = (32768, 512)
SMALL = ((128, 512), (128, 1024), (512, 512), (512, 1024))
NOT_MEASURED = "not measured"

Row = dict[str, Any]


def figures(sections: dict[str, Any], ours: str) -> list[Row]:
    """One row for each figure: what, where, its value, the target, whether it is met."""
    cost = sections["cost"]["rows"]
    found = [*_headline(cost, ours), *_large(cost, ours), *_small(cost, ours)]
    found += _penalty_errors(sections["error of penalties"]["rows"])
    found += _loss_errors(sections["error of losses"]["rows"], ours)
    return found + _shares(sections["training step"]["rows"])


def find(rows: list[Row], size: tuple[int, int], loss: str) -> Row:
    """The row of a loss at a size, {} if there is none."""
    n, d = size
    return next((r for r in rows if (r["N"], r["D"], r["loss"]) == (n, d, loss)), {})


def _ratio(above: Row, below: Row, column: str) -> float | None:
    if column in above and column in below:
        return float(above[column] / below[column])
    return None


def _figure(
    what: str,
    at: str,
    value: float | str | None,
    target: str = "-",
    is_met: Callable[[Any], bool] | None = None,
) -> Row:
    row: Row = {"figure": what, "at": at, "value": NOT_MEASURED if value is None else value}
    unknown = is_met is None or value is None
    return {**row, "target": target, "met": "-" if unknown else "yes" if is_met(value) else "NO"}


def _at(size: tuple[int, int]) -> str:
    return f"N = {size[0]:,}, D = {size[1]:,}"


def _headline(cost: list[Row], ours: str) -> list[Row]:
    at, own = _at(HEADLINE), find(cost, HEADLINE, ours)
    rows = {loss: find(cost, HEADLINE, loss) for loss in (DENSE, COMPILED, OPEN_CLIP)}
    times = {loss: _ratio(row, own, "ms") for loss, row in rows.items()}
    peaks = {loss: _ratio(own, row, "peak MB") for loss, row in rows.items()}
    share = _ratio(find(cost, HEADLINE, OURS_PENALTIES), own, "ms")
    return [
        _figure(f"time: {DENSE} / CyCLIPLoss", at, times[DENSE], ">= 3", lambda x: x >= 3),
        _figure(f"time: {COMPILED} / CyCLIPLoss", at, times[COMPILED]),
        _figure(f"time: {OPEN_CLIP} / CyCLIPLoss", at, times[OPEN_CLIP], ">= 1", lambda x: x >= 1),
        _figure(
            "time: both penalties alone / CyCLIPLoss", at, share, "<= 0.12", lambda x: x <= 0.12
        ),
        _figure(f"peak: CyCLIPLoss / {DENSE}", at, peaks[DENSE], "<= 0.125", lambda x: x <= 0.125),
        _figure(f"peak: CyCLIPLoss / {OPEN_CLIP}", at, peaks[OPEN_CLIP]),
        _figure("peak, MB: CyCLIPLoss", at, own.get("peak MB")),
        _figure(f"peak, MB: {DENSE}", at, rows[DENSE].get("peak MB")),
        _figure(f"peak, MB: {OPEN_CLIP}", at, rows[OPEN_CLIP].get("peak MB")),
        _figure("kept for backward, MB: CyCLIPLoss", at, own.get("kept MB")),
        _figure(f"kept for backward, MB: {DENSE}", at, rows[DENSE].get("kept MB")),
    ]


def _large(cost: list[Row], ours: str) -> list[Row]:
    """What the dense formula takes: measured where it fits, else worked out from a smaller size."""
    at, own, dense = _at(LARGE), find(cost, LARGE, ours), find(cost, LARGE, DENSE)
    what, peak = f"peak, MB: {DENSE}", dense.get("peak MB")
    if peak is None and "peak MB" in (smaller := find(cost, HEADLINE, DENSE)):
        factor = (LARGE[0] / HEADLINE[0]) ** 2
        what += f", predicted: {factor:g} times that at N = {HEADLINE[0]:,}"
        peak = smaller["peak MB"] * factor
    return [
        _figure("peak, MB: CyCLIPLoss", at, own.get("peak MB"), "<= 2,000", lambda x: x <= 2000),
        _figure(f"{DENSE}, tried", at, (outcome_text(dense) or OK) if dense else None),
        _figure(what, at, peak, "> 24,000", lambda x: x > 24000),
    ]


def _small(cost: list[Row], ours: str) -> list[Row]:
    return [
        _figure(
            f"time: {DENSE} / CyCLIPLoss",
            _at(size),
            _ratio(find(cost, size, DENSE), find(cost, size, ours), "ms"),
            ">= 1",
            lambda x: x >= 1,
        )
        for size in SMALL
    ]


def _penalty_errors(rows: list[Row]) -> list[Row]:
    """The closest pairs of each dtype and size have the target; the others show where it begins."""
    found = []
    for row in rows:
        what = f"error of the penalties' gradient: {DENSE} / CyCLIPLoss"
        found.append(_figure(what, _pairs(row), row["dense / ours"], *_target(row, rows)))
    return found


def _loss_errors(rows: list[Row], ours: str) -> list[Row]:
    """The whole loss, in which the contrastive term's error counts as well; targets alike."""
    what = f"error of the whole image gradient: {DENSE} / CyCLIPLoss"
    found = []
    for own in (row for row in rows if row["loss"] == ours):
        dense = [r for r in rows if r["loss"] == DENSE and _pairs(r) == _pairs(own)]
        ratio = _ratio(dense[0], own, "image") if dense else None
        found.append(_figure(what, _pairs(own), ratio, *_target(own, rows)))
    return found


def _target(row: Row, rows: list[Row]) -> tuple[Any, ...]:
    """That of an error ratio: the closest pairs of each dtype and size have one."""
    closest = min(
        r["|T - I|"]
        for r in rows
        if (r["N"], r["dtype"]) == (row["N"], row["dtype"]) and r["|T - I|"] != RANDOM
    )
    return (">= 100", lambda x: x >= 100) if row["|T - I|"] == closest else ()


def _shares(rows: list[Row]) -> list[Row]:
    return [
        _figure(
            f"share of a training step: {row['loss']}",
            f"{row['model']} model, batch {row['batch']:,}",
            row["of step"],
        )
        for row in rows
        if "of step" in row
    ]


def _pairs(row: Row) -> str:
    return f"{_at((row['N'], row['D']))}, {row['dtype']}, |T - I|: {row['|T - I|']}"


def outcome_text(row: Row) -> str:
    """How an attempt ended, for a table: nothing if well."""
    if row["outcome"] == OUT_OF_MEMORY and "limit MB" in row:
        return f"{OUT_OF_MEMORY} (had {row['limit MB'] / 1e3:.1f} GB)"
    return "" if row["outcome"] == OK else str(row["outcome"])
