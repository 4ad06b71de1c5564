"""Draw the pictures of the pages.

    python .mkdocs/pictures.py

penalties.png: what the two penalties compare. default.png and the photographs' differences.png:
differences to CLIP with their intervals. White backgrounds keep them readable in dark mode.
"""

from statistics import mean

import matplotlib

matplotlib.use("Agg")  # files only: no display needed
from matplotlib import pyplot as plt
from tables import ROOT, SPECS, compared_rows, interval

COLOURS = {True: "tab:green", False: "tab:red", None: "tab:gray"}  # ahead, behind, not shown
Row = tuple[str, list[float], list[float]]  # label, values, and those of CLIP
IN_MODAL, CROSS_MODAL, PAIR = "#D55E00", "#0072B2", "#999999"


def draw_penalties() -> None:
    """A square of two images above their texts: equal sides, equal diagonals."""
    figure, ax = plt.subplots(figsize=(7, 2.6), dpi=150, layout="constrained")
    ax.set(xlim=(-0.6, 5.9), ylim=(-0.35, 1.35))
    ax.axis("off")
    corners = {"image A": (0, 1), "image B": (2, 1), "text A": (0, 0), "text B": (2, 0)}
    lines = [
        ("image A", "image B", IN_MODAL, "-"),
        ("text A", "text B", IN_MODAL, "-"),
        ("image A", "text B", CROSS_MODAL, "--"),
        ("text A", "image B", CROSS_MODAL, "--"),
        ("image A", "text A", PAIR, ":"),
        ("image B", "text B", PAIR, ":"),
    ]
    for first, second, colour, style in lines:
        ax.plot(*zip(corners[first], corners[second], strict=True), style, color=colour, lw=2.5)
    box = {"boxstyle": "round,pad=0.4", "facecolor": "white", "edgecolor": "#444444"}
    for name, (x, y) in corners.items():
        ax.text(x, y, name, ha="center", va="center", bbox=box)
    texts = [
        ("in-modal penalty: equal solid similarities", IN_MODAL),
        ("cross-modal penalty: equal dashed similarities", CROSS_MODAL),
        ("CLIP: high dotted similarities", "#666666"),
    ]
    for row, (text, colour) in enumerate(texts):
        ax.text(2.75, 0.9 - 0.4 * row, text, color=colour, va="center", weight="bold")
    figure.savefig(ROOT / "docs/penalties.png")


def draw_differences(file: str, title: str, note: str, rows: list[Row]) -> None:
    """Draws a row for each setting: the difference of its mean to CLIP's, with the 95% interval."""
    figure, axes = plt.subplots(figsize=(8.5, 0.35 * len(rows) + 1.4), layout="constrained")
    for y, (_, values, baseline) in enumerate(rows):
        if bounds := interval(values, baseline):
            low, high = (100 * bound for bound in bounds)
            ahead = None if low <= 0 <= high else low > 0
            centre = 100 * (mean(values) - mean(baseline))
            axes.plot([low, high], [y, y], color=COLOURS[ahead], linewidth=2)
            axes.plot(centre, y, "o", color=COLOURS[ahead])
        else:
            axes.plot(0, y, "k|", markersize=12)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(rows)), [label for label, *_ in rows])
    axes.invert_yaxis()
    axes.set_xlabel("← worse      points, with the 95% interval      better →")
    figure.supxlabel(f"Grey: no difference to CLIP is shown. {note}", fontsize=9)
    figure.suptitle(title)
    figure.savefig(ROOT / file, dpi=110)


def first_column(name: str) -> list[Row]:
    """The rows of a table: title, the values in its first column, and those of the baseline."""
    return [
        (title, next(iter(values.values())), next(iter(baseline.values())))
        for title, values, baseline in compared_rows(SPECS[name])
    ]


def draw_photographs() -> None:
    """All losses on the photographs of products."""
    draw_differences(
        "reference_train/results/photos/differences.png",
        "Photographs of products: finding the right one of 1,904 titles, and the reverse",
        "Each row: pairs in a batch, loss, R@10.\nR is reference_batch_size: the penalties are as "
        "strong as the paper's with 128, a quarter of that with 32.",
        [
            (f"{title}: {100 * mean(values):.1f}%", values, baseline)
            for title, values, baseline in first_column("photos-batches")
            if values == baseline or interval(values, baseline)
        ],
    )


def draw_default() -> None:
    """The default setting in each task of the table of λ."""
    rows, task = [], ""
    for title, values, baseline in first_column("lambda"):
        if title.endswith(": CLIP"):
            task = title.removesuffix(": CLIP").removesuffix(", E")
        if title.endswith("(default)"):
            rows.append((task, values, baseline))
    draw_differences(
        "docs/default.png",
        "CyCLIPLoss(reference_batch_size=32, lambda_progress=True) against CLIP's loss",
        "Each row: data, pairs in a batch × steps; R@10, or the accuracy named.",
        rows,
    )


if __name__ == "__main__":
    draw_penalties()
    draw_photographs()
    draw_default()
