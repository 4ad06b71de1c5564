"""Draw the pictures of the pages.

    python .mkdocs/pictures.py

penalties.png: what the two penalties compare. recommended.png: differences to CLIP with their
intervals. White backgrounds keep them readable in dark mode.
"""

import matplotlib

matplotlib.use("Agg")  # files only: no display needed
from matplotlib import pyplot as plt
from tables import ROOT, SPECS, compared_rows, interval

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


def draw_recommended() -> None:
    """The recommended settings in each task of the table of λ: differences to CLIP's mean."""
    tasks, task = [], ""
    page = (ROOT / "docs/lambda.md").read_text(encoding="utf-8")
    for title, values, baseline in compared_rows(SPECS["lambda"], page):
        if title.endswith(": CLIP"):
            task = title.removesuffix(": CLIP").removesuffix(", E")
        if title.endswith("(recommended)"):
            metric = next(iter(values))
            tasks.append((task, interval(values[metric], baseline[metric])))
    figure, axes = plt.subplots(figsize=(8.5, 0.35 * len(tasks) + 1.4), layout="constrained")
    for y, (_, (centre, low, high)) in enumerate(tasks):
        colour = "tab:green" if low > 0 else "tab:red" if high < 0 else "tab:gray"
        axes.plot([low, high], [y, y], color=colour, linewidth=2)
        axes.plot(centre, y, "o", color=colour)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(tasks)), [task for task, _ in tasks])
    axes.invert_yaxis()
    axes.set_xlabel("← worse      points, with the 95% interval      better →")
    note = (
        "Data, pairs in a batch × steps; R@10, or the accuracy named. Grey: no difference is shown."
    )
    figure.supxlabel(note, fontsize=9)
    figure.suptitle("reference_batch_size=32, lambda_progress=True against CLIP")
    figure.savefig(ROOT / "docs/recommended.png", dpi=110)


if __name__ == "__main__":
    draw_penalties()
    draw_recommended()
