"""Draws differences to CLIP with their intervals, from the records: the photographs' picture.

python .mkdocs/picture.py
"""

from statistics import mean

import matplotlib.pyplot as plt
from tables import ROOT, SPECS, compared_rows, interval

NAME = "photos-batches"  # a table, whose rows are "BATCH, LOSS" and whose first column is drawn
OUT = ROOT / "reference_train/results/photos/differences.png"
COLOURS = {True: "tab:green", False: "tab:red", None: "tab:gray"}


def main() -> None:
    """Draws a row for each loss: its difference to CLIP's R@10, with the 95% interval."""
    rows = [
        (title, next(iter(values.values())), next(iter(baseline.values())))
        for title, values, baseline in compared_rows(SPECS[NAME])
    ]
    rows = [row for row in rows if row[1] == row[2] or interval(*row[1:])]
    figure, axes = plt.subplots(figsize=(8, 0.35 * len(rows) + 1.2), layout="constrained")
    labels = []
    for y, (title, values, baseline) in enumerate(rows):
        labels.append(f"{title}: {100 * mean(values):.1f}%")
        if bounds := interval(values, baseline):
            low, high = (100 * bound for bound in bounds)
            ahead = None if low <= 0 <= high else low > 0
            centre = 100 * (mean(values) - mean(baseline))
            axes.plot([low, high], [y, y], color=COLOURS[ahead], linewidth=2)
            axes.plot(centre, y, "o", color=COLOURS[ahead])
        else:
            axes.plot(0, y, "k|", markersize=12)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(rows)), labels)
    axes.invert_yaxis()
    axes.set_xlabel(
        "← worse      points of R@10, with the 95% interval      better →\n"
        "grey: no difference is shown"
    )
    figure.suptitle(
        "Photographs of products: finding the right one of 1,904 titles, and the reverse"
    )
    figure.savefig(OUT, dpi=110)


if __name__ == "__main__":
    main()
