"""Draw the picture of the pages that is made from records.

    python .mkdocs/pictures.py

recommended.png: differences to CLIP with their intervals. Its white background keeps it readable in
dark mode.
"""

import re

import matplotlib

matplotlib.use("Agg")  # files only: no display needed
from matplotlib import pyplot as plt
from tables import ROOT, SPECS, compared_rows, interval

# A task of the table of λ, and where a cell of its columns begins, as a share of the plot's width.
TASK = re.compile(r"(.+), ([\d,]+) × ([\d,]*\d)")
COLUMNS = {"data": -1.31, "batch": -0.71, "steps": -0.45, "runs": -0.21}


def draw_recommended() -> None:
    """The recommended settings in each task of the table of λ: differences to CLIP's mean."""
    tasks, task = [], ()
    page = (ROOT / "docs/lambda.md").read_text(encoding="utf-8")
    for title, values, baseline in compared_rows(SPECS["lambda"], page):
        if title.endswith(": CLIP"):
            task = TASK.match(title).groups()
        if title.endswith("(recommended)"):
            metric = next(iter(values))
            cells = (*task, str(len(values[metric])))
            tasks.append((cells, interval(values[metric], baseline[metric])))
    figure, axes = plt.subplots(figsize=(5.2, 0.3 * len(tasks) + 1.1))
    figure.subplots_adjust(left=0.56, right=0.98, bottom=0.16, top=0.99)
    for y, (cells, (centre, low, high)) in enumerate([(COLUMNS, (0, 0, 0)), *tasks]):
        for cell, x in zip(cells, COLUMNS.values(), strict=True):
            weight = "normal" if y else "bold"
            axes.text(x, y, cell, va="center", weight=weight, transform=axes.get_yaxis_transform())
        if y:
            colour = "tab:green" if low > 0 else "tab:red" if high < 0 else "tab:gray"
            axes.plot([low, high], [y, y], color=colour, linewidth=2)
            axes.plot(centre, y, "o", color=colour)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set(yticks=[], ylim=(len(tasks) + 0.5, -0.5))
    axes.set_xlabel("points, with the 95% interval\n← worse        better →")
    figure.savefig(ROOT / "docs/recommended.png", dpi=160)


if __name__ == "__main__":
    draw_recommended()
