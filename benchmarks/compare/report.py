"""Draws the rows of a side-by-side run."""

import math
from pathlib import Path
from typing import Any

import matplotlib

from benchmarks.compare import competitors as names
from benchmarks.run import Row

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


def draw(rows: list[Row], device: str, file: Path) -> None:
    """Draw a PNG: time and memory over N, relative to dense losses, at the first D and dtype."""
    first = rows[0]["D"], rows[0]["dtype"]
    rows = [row for row in rows if "ms" in row and (row["D"], row["dtype"]) == first]
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.4), dpi=150, layout="constrained")
    figure.suptitle(
        f"Forward and backward pass, D = {first[0]:,}, {first[1]}, {device}\n"
        "relative to the dense loss with one product (SigLIP's to the dense SigLIP loss)"
    )
    users = [(x, names.DENSE_CLIP, "k") for x in {row["loss"] for row in rows} - names.NAMES]
    sizes = sorted({row["N"] for row in rows})
    for ax, column, title in zip(axes, ("ms", "peak MB"), ("Time", "Peak memory"), strict=True):
        found = {(row["loss"], row["N"]): row[column] for row in rows}
        ax.set(xscale="log", yscale="log")  # also without lines
        ends = []
        for loss, base, colour in (*DRAWN, *users):
            points = [
                (n, found[loss, n] / found[base, n])
                for n in sizes
                # Too little memory to be seen has no logarithm.
                if found.get((loss, n)) and found.get((base, n))
            ]
            if points:
                ax.plot(*zip(*points, strict=True), "o-", color=colour, lw=2, ms=4)
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
