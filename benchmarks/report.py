"""A side-by-side record as Markdown: a summary, which the README quotes, then every table."""

from typing import Any

from benchmarks.accuracy import RANDOM
from benchmarks.competitors import COMPILED, DENSE, OPEN_CLIP, OURS, OURS_PENALTIES
from benchmarks.cost import OK
from benchmarks.memory import OUT_OF_MEMORY
from benchmarks.record import heading, number, table

Row = dict[str, Any]
# Beside ours in the summary: names in the record and for people.
TITLES = {
    DENSE: "dense CyCLIP",
    COMPILED: "dense, `torch.compile`",
    OPEN_CLIP: "`open_clip.ClipLoss`, no penalties",
}
# Sizes whose memory the summary shows, and whose share of penalties.
MEMORY_AT = ((8192, 512), (32768, 512))
PENALTIES_AT = ((128, 512), (8192, 512))
NOTES = {
    "cost": "Milliseconds: median (20th to 80th percentile) of interleaved runs; where runs is 1, "
    "of the only run, in a fresh process. Peak: beyond what was held before, gradients included; "
    "on CPU of the resident set of a fresh process, which is rough below a few MB. Kept: by "
    "autograd between forward and backward, inputs not counted. Of matrix rate: 8 N² D flops at "
    "the rate of one library product, over the time.",
    "error of losses": "Relative, each loss against what it means to compute in float64: norm of "
    "the difference over norm of the exact result.",
    "error of penalties": "Of the gradient, on pairs that are nearly aligned, as a trained "
    "model's are.",
    "training step": "One step of the model with this loss: medians. Loss: its forward and "
    "backward pass. Peaks: what PyTorch's allocator handed out, beyond what was held before the "
    "step, and before the loss.",
}


def markdown(record: dict[str, Any]) -> str:
    """The record for people."""
    cells = {
        "cost": _cost,
        "error of losses": _loss_error,
        "error of penalties": _penalty_error,
        "training step": _training,
    }
    lines = [*heading(record), "## Summary", "", *summary(record)]
    for name, section in record["sections"].items():
        rows = [cells.get(name, dict)(row) for row in section["rows"]]
        lines += ["", f"## {name}", "", *([NOTES[name], ""] if name in NOTES else [])]
        lines += [*table(rows), *(f"- skipped {skipped}" for skipped in section["skipped"])]
    return "\n".join(lines) + "\n"


def find(rows: list[Row], size: tuple[int, int], loss: str) -> Row:
    """The row of a loss at a size, {} if there is none."""
    n, d = size
    return next((r for r in rows if (r["N"], r["D"], r["loss"]) == (n, d, loss)), {})


def outcome_text(row: Row) -> str:
    """How an attempt ended, for a table: nothing if well."""
    if row["outcome"] == OUT_OF_MEMORY and "limit MB" in row:
        return f"{OUT_OF_MEMORY} (had {row['limit MB'] / 1e3:.1f} GB)"
    return "" if row["outcome"] == OK else str(row["outcome"])


def percent(value: float) -> str:
    """A share."""
    return f"{100 * value:.1f} %"


# The summary


def summary(record: dict[str, Any]) -> list[str]:
    """Times, peaks and errors beside each other; what was not measured is left out."""
    rows = {name: section["rows"] for name, section in record["sections"].items()}
    lines = table(_costs(rows["cost"], record["ours"]))
    errors = _errors(rows["error of losses"], rows["error of penalties"], record["ours"])
    lines += ["", *table(errors)] if errors else []
    sentences = [*_penalties(rows["cost"]), *_shares(rows["training step"], record["ours"])]
    return [*lines, "", " ".join(sentences)] if sentences else lines


def _costs(cost: list[Row], ours: str) -> list[Row]:
    """Time by size, each beside ours; then memory where it was measured for the large sizes."""
    sizes = dict.fromkeys((row["N"], row["D"]) for row in cost)
    lines = [_beside(f"{n:,}, {d:,}", cost, (n, d), ours, "ms", _time) for n, d in sizes]
    return lines + [
        _beside(f"peak memory at {n:,}, {d:,}", cost, (n, d), ours, "peak MB", _size)
        for n, d in MEMORY_AT
        if "peak MB" in find(cost, (n, d), ours)
    ]


def _beside(
    name: str, cost: list[Row], size: tuple[int, int], ours: str, column: str, text: Any
) -> Row:
    own = find(cost, size, ours)
    cells = {"N, D": name, "CyCLIPLoss": text(own[column]) if column in own else ""}
    for loss, title in TITLES.items():
        row = find(cost, size, loss)
        if column in row and column in own:
            cells[title] = f"{text(row[column])}, {number(row[column] / own[column])} ×"
        else:
            cells[title] = outcome_text(row) if row else ""
    return cells


def _errors(losses: list[Row], penalties: list[Row], ours: str) -> list[Row]:
    """By distance of the pairs: of the whole loss, then of the penalties alone."""
    lines = []
    for row in (row for row in losses if row["loss"] == ours):
        where = ("N", "D", "dtype", "|T - I|")
        dense = [r for r in losses if r["loss"] == DENSE and all(r[k] == row[k] for k in where)]
        if "image" in row and dense and "image" in dense[0]:
            lines.append(_error("whole loss", row, row["image"], dense[0]["image"]))
    return lines + [_error("penalties alone", r, r[OURS], r["dense"]) for r in penalties]


def _error(what: str, row: Row, own: float, dense: float) -> Row:
    distance = row["|T - I|"]
    return {
        "error of the gradient": f"{what}, N = {row['N']:,}",
        "pairs": distance if distance == RANDOM else f"|T - I| = {distance}",
        "CyCLIPLoss": f"{own:.1e}",
        "dense CyCLIP": f"{dense:.1e}",
        "dense / CyCLIPLoss": number(dense / own),
    }


def _penalties(cost: list[Row]) -> list[str]:
    """One sentence: what of the loss's time the penalties take, where both were timed."""
    found = [(size, find(cost, size, OURS_PENALTIES)) for size in PENALTIES_AT]
    shares = [
        f"{percent(row['times ours'])} at {n:,}, {d:,}"
        for (n, d), row in found
        if "times ours" in row
    ]
    if not shares:
        return []
    return [f"Both penalties alone take {' and '.join(shares)} of CyCLIPLoss's time."]


def _shares(training: list[Row], ours: str) -> list[str]:
    """One sentence: what of a training step each loss takes."""
    names = {ours: "CyCLIPLoss", **TITLES}
    shares = [
        f"{percent(row['of step'])} with {names[row['loss']]}"
        for row in training
        if row["loss"] in names and "of step" in row
    ]
    if not shares:
        return []
    row = training[0]
    return [
        f"Of a training step of the {row['model']} model, batch {row['batch']:,}, the loss is "
        f"{', '.join(shares)}."
    ]


def _time(milliseconds: float) -> str:
    seconds = milliseconds / 1e3
    return f"{number(seconds)} s" if seconds >= 1 else f"{number(milliseconds)} ms"


def _size(megabytes: float) -> str:
    return f"{number(megabytes / 1e3)} GB" if megabytes >= 1e4 else f"{number(megabytes)} MB"


# The tables


def _spread(row: Row, name: str) -> str:
    prefix = f"{name} " if name else ""
    median, low, high = (row[f"{prefix}{part}"] for part in ("ms", "p20", "p80"))
    if row.get("runs") == 1:
        return number(median)
    return f"{number(median)} ({number(low)} to {number(high)})"


def _cost(row: Row) -> Row:
    cells = {name: row[name] for name in ("N", "D", "loss", "lacks")}
    if "ms" in row:
        for title, name in (("forward", "forward"), ("backward", "backward"), ("both, ms", "")):
            cells[title] = _spread(row, name)
    for name in ("runs", "times ours", "peak MB", "kept MB"):
        if name in row:
            cells[name] = row[name]
    if "of matrix rate" in row:
        cells["of matrix rate"] = percent(row["of matrix rate"])
    return {**cells, "outcome": outcome_text(row)}


def _loss_error(row: Row) -> Row:
    cells = {name: row[name] for name in ("N", "D", "dtype", "|T - I|", "loss", "lacks")}
    titles = {"value": "value", "image": "image gradient", "text": "text gradient",
              "logit_scale": "logit-scale gradient"}  # fmt: skip
    cells |= {title: f"{row[name]:.1e}" for name, title in titles.items() if name in row}
    return {**cells, "outcome": outcome_text(row)}


def _penalty_error(row: Row) -> Row:
    return {**row, OURS: f"{row[OURS]:.1e}", "dense": f"{row['dense']:.1e}"}


def _training(row: Row) -> Row:
    cells = {name: row[name] for name in ("model", "batch", "features", "loss", "lacks")}
    if "step ms" in row:
        cells["step, ms"], cells["loss, ms"] = _spread(row, "step"), _spread(row, "loss")
        cells |= {"of step": percent(row["of step"]), "images per s": row["images per s"]}
    for part in ("step", "loss"):
        if f"{part} peak MB" in row:
            cells[f"peak of {part}, MB"] = row[f"{part} peak MB"]
    return {**cells, "outcome": outcome_text(row)}
