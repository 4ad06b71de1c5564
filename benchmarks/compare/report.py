"""Shows the rows of a side-by-side run: tables with a line for each loss, and a figure."""

import math
from pathlib import Path
from typing import Any

import matplotlib

from benchmarks.compare import competitors as names
from benchmarks.run import OK, Row, Section, format_number, table

matplotlib.use("Agg")  # files only: no display needed
from matplotlib import pyplot as plt

# What is drawn: the loss, what it is compared with, and its colour, which colour-blind readers tell
# apart.
DRAWN = (
    (names.AUTHORS, names.DENSE_CLIP, "#0072B2"),
    (names.OPEN_CLIP, names.DENSE_CLIP, "#7F7F7F"),
    (names.COMPILED_CLIP, names.DENSE_CLIP, "#CC79A7"),
    (names.OURS, names.DENSE_CLIP, "#D55E00"),
    (names.OUR_CLIP, names.DENSE_CLIP, "#009E73"),
    (names.OUR_SIGLIP, names.DENSE_SIGLIP, "#E69F00"),
)
SUMMARY = {
    # column of the rows: the table's title, and whether it shows ratios
    "ms": ("Forward and backward, ms", True),
    "peak MB": ("Peak memory, MB", True),
    "pairs/s": ("Pairs per second", False),
    "share of a step": ("Share of a step", False),
    "gradient": ("Relative error of the gradient", True),
}


def summary(sections: dict[str, Section]) -> str:
    """A table for each column of SUMMARY, with the cases as columns and a line for each loss."""
    tables = []
    for section in sections.values():
        for column, (title, with_ratios) in SUMMARY.items():
            if any(column in row for row in section.rows):
                lines = compare_losses(section.rows, column, with_ratios)
                tables.append(f"{title}\n\n{table(lines)}")
    return "\n\n".join(tables)


def compare_losses(rows: list[Row], column: str, with_ratios: bool) -> list[Row]:
    """A line for each loss, with a cell for each case. Ratios are to the first line."""
    first = {case(row): row for row in rows if row["loss"] == rows[0]["loss"]}
    lines: dict[str, Row] = {}
    for row in rows:
        cell = "" if row["outcome"] == OK else row["outcome"]
        if column in row:
            cell = format_number(row[column])
            base = first.get(case(row), {})
            if with_ratios and column in base and base is not row:
                cell += f" ({format_number(row[column] / base[column])} ×)"
        lines.setdefault(row["loss"], {"loss": row["loss"]})[case(row)] = cell
    return list(lines.values())


def case(row: Row) -> str:
    """The heading of a row's case."""
    distance = f", {row['|T - I|']}" if "|T - I|" in row else ""
    return f"{row['N']:,} × {row['D']:,}, {row['dtype']}{distance}"


def draw(rows: list[Row], device: str, file: Path) -> None:
    """Draw a PNG: time and memory over N, relative to dense losses, at the first D and dtype."""
    rows = [row for row in rows if (row["D"], row["dtype"]) == (rows[0]["D"], rows[0]["dtype"])]
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.4), dpi=150, layout="constrained")
    figure.suptitle(
        f"Forward and backward pass, D = {rows[0]['D']:,}, {rows[0]['dtype']}, {device}\n"
        "relative to the dense loss with one product (SigLIP's to the dense SigLIP loss)"
    )
    users = [(x, names.DENSE_CLIP, "k") for x in {row["loss"] for row in rows} - names.NAMES]
    sizes = sorted({row["N"] for row in rows})
    for ax, column, title in zip(axes, ("ms", "peak MB"), ("Time", "Peak memory"), strict=True):
        found = {(row["loss"], row["N"]): row[column] for row in rows if "ms" in row}
        ends = []
        for loss, base, colour in (*DRAWN, *users):
            points = [
                (n, found[loss, n] / found[base, n])
                for n in sizes
                if (loss, n) in found and (base, n) in found
            ]
            if points:
                ax.loglog(*zip(*points, strict=True), "o-", color=colour, lw=2, ms=4)
                ends.append((math.log2(points[-1][1]), loss.split(", no")[0], colour))
        label_ends(ax, sorted(ends))
        ax.axhline(1, color="black", lw=1)
        ax.set(xlabel="N, pairs in the batch", title=title)
        ax.grid(alpha=0.3)
        ax.set_xticks(sizes, [f"{n:,}" for n in sizes], rotation=30)
        ax.minorticks_off()
        ax.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter("{x:g}×")
    figure.savefig(file)
    plt.close(figure)


def label_ends(ax: Any, ends: list[tuple[float, str, str]]) -> None:
    """Write names at the right ends of lines, far enough apart. ends: log2 y, name, colour."""
    low, high = map(math.log2, ax.get_ylim())
    place = -math.inf
    for y, name, colour in ends:
        place = max(y, place + (high - low) / 14)
        at = {"xy": (1.01, 2**place), "xycoords": ax.get_yaxis_transform()}
        ax.annotate(name, **at, color=colour, va="center", fontsize="small", annotation_clip=False)
