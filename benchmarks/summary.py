"""What a README quotes of a side-by-side record, as Markdown: times, peaks, errors, shares.

`python -m benchmarks` puts it at the top of the record's Markdown file. A test compares the
README's lines with that file's.
"""

from typing import Any

from benchmarks.competitors import COMPILED, DENSE, OPEN_CLIP, OURS, OURS_PENALTIES
from benchmarks.figures import HEADLINE, LARGE, SMALL, Row, find, outcome_text
from benchmarks.tables import number, percent

TITLES = {
    DENSE: "dense CyCLIP",
    COMPILED: "dense, `torch.compile`",
    OPEN_CLIP: "`open_clip.ClipLoss`, no penalties",
}


def summary(record: dict[str, Any]) -> list[str]:
    """Lines of Markdown. What was not measured is left out."""
    rows = {name: section["rows"] for name, section in record["sections"].items()}
    lines = [*_costs(rows["cost"], record["ours"])]
    lines += ["", *_errors(rows["error of losses"], rows["error of penalties"], record["ours"])]
    sentences = [*_penalties(rows["cost"]), *_shares(rows["training step"], record["ours"])]
    return [*lines, "", " ".join(sentences)] if sentences else lines


def _costs(cost: list[Row], ours: str) -> list[str]:
    """Time by size, each beside ours; then memory where it was measured for the large sizes."""
    lines = _head(["N, D", "CyCLIPLoss", *TITLES.values()])
    for size in dict.fromkeys((row["N"], row["D"]) for row in cost):
        lines.append(_line(f"{size[0]:,}, {size[1]:,}", cost, size, ours, "ms", _time))
    for size in (HEADLINE, LARGE):
        if "peak MB" in find(cost, size, ours):
            name = f"peak memory at {size[0]:,}, {size[1]:,}"
            lines.append(_line(name, cost, size, ours, "peak MB", _size))
    return lines


def _line(
    name: str, cost: list[Row], size: tuple[int, int], ours: str, column: str, text: Any
) -> str:
    own = find(cost, size, ours)
    cells = [name, text(own[column]) if column in own else ""]
    for loss in TITLES:
        row = find(cost, size, loss)
        if column in row and column in own:
            cells.append(f"{text(row[column])}, {number(row[column] / own[column])} ×")
        else:
            cells.append(outcome_text(row) if row else "")
    return f"| {' | '.join(cells)} |"


def _errors(losses: list[Row], penalties: list[Row], ours: str) -> list[str]:
    """By distance of the pairs: of the whole loss, then of the penalties alone."""
    lines = _head(
        ["error of the gradient", "pairs", "CyCLIPLoss", "dense CyCLIP", "dense / CyCLIPLoss"]
    )
    for row in (row for row in losses if row["loss"] == ours):
        where = ("N", "D", "dtype", "|T - I|")
        dense = [r for r in losses if r["loss"] == DENSE and all(r[k] == row[k] for k in where)]
        if "image" in row and dense and "image" in dense[0]:
            pair = (row["image"], dense[0]["image"])
            lines.append(_error_line("whole loss", row, *pair, pair[1] / pair[0]))
    for row in penalties:
        lines.append(_error_line("penalties alone", row, row[OURS], row["dense"]))
    return lines


def _error_line(what: str, row: Row, own: float, dense: float, ratio: float | None = None) -> str:
    distance = row["|T - I|"]
    pairs = f"\\|T - I\\| = {distance}" if isinstance(distance, float) else str(distance)
    ratio = row["dense / ours"] if ratio is None else ratio
    cells = [f"{what}, N = {row['N']:,}", pairs, f"{own:.1e}", f"{dense:.1e}", number(ratio)]
    return f"| {' | '.join(cells)} |"


def _penalties(cost: list[Row]) -> list[str]:
    """One sentence: what of the loss's time the penalties take, where both were timed."""
    found = [row for row in cost if row["loss"] == OURS_PENALTIES and "times ours" in row]
    shares = [
        f"{percent(row['times ours'])} at {row['N']:,}, {row['D']:,}"
        for row in found
        if (row["N"], row["D"]) in (*SMALL[:1], HEADLINE)
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


def _head(names: list[str]) -> list[str]:
    return [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]


def _time(milliseconds: float) -> str:
    return (
        f"{number(milliseconds / 1e3)} s" if milliseconds >= 1e3 else f"{number(milliseconds)} ms"
    )


def _size(megabytes: float) -> str:
    return f"{number(megabytes / 1e3)} GB" if megabytes >= 1e4 else f"{number(megabytes)} MB"
