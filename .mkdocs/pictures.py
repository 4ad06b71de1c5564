"""Draw the picture of the pages that is made from records.

    python .mkdocs/pictures.py

whom.png: differences to CLIP with their intervals. Its white background keeps it readable in dark
mode.
"""

import matplotlib

matplotlib.use("Agg")  # files only: no display needed
from matplotlib import pyplot as plt
from tables import ROOT, SPECS, compared_rows, interval


def draw_whom() -> None:
    """The last row of the table "whom", the recommended settings: differences to CLIP's mean."""
    *_, (_, values, baseline) = compared_rows(SPECS["whom"])
    columns = SPECS["whom"].splitlines()[1].split(" | ")[1:]
    uses = [column.rsplit(" = ", 1)[0] for column in columns]
    figure, axes = plt.subplots(figsize=(5.2, 0.42 * len(uses) + 0.7))
    figure.subplots_adjust(left=0.56, right=0.98, bottom=0.14, top=0.99)
    for y, metric in enumerate(values):
        centre, low, high = interval(values[metric], baseline[metric])
        colour = "tab:green" if low > 0 else "tab:red" if high < 0 else "tab:gray"
        axes.plot([low, high], [y, y], color=colour, linewidth=2)
        axes.plot(centre, y, "o", color=colour)
    axes.axvline(0, color="black", linewidth=0.8)
    labels = [use.replace(", ", ",\n", 1).replace(": ", ":\n", 1) for use in uses]
    axes.set_yticks(range(len(uses)), labels, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("points, with the 95% interval\n← worse        better →")
    figure.savefig(ROOT / "docs/whom.png", dpi=160)


if __name__ == "__main__":
    draw_whom()
