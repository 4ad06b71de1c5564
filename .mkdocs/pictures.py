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
    """The table "whom": differences to CLIP, of the recommended and of stronger penalties."""
    _, recommended, strong = compared_rows(SPECS["whom"])
    columns = SPECS["whom"].splitlines()[1].split(" | ")[1:]
    uses = [column.rsplit(" = ", 1)[0] for column in columns]
    figure, axes = plt.subplots(figsize=(5.2, 0.42 * len(uses) + 0.9))
    figure.subplots_adjust(left=0.56, right=0.98, bottom=0.13, top=0.94)
    for (_, values, baseline), shift, marker in ((recommended, -0.15, "o"), (strong, 0.15, "s")):
        for y, metric in enumerate(values):
            centre, low, high = interval(values[metric], baseline[metric])
            colour = "tab:green" if low > 0 else "tab:red" if high < 0 else "tab:gray"
            axes.plot([low, high], [y + shift] * 2, color=colour, linewidth=1.5)
            axes.plot(centre, y + shift, marker, color=colour, markersize=4)
    axes.axvline(0, color="black", linewidth=0.8)
    labels = [use.replace(", ", ",\n", 1).replace(": ", ":\n", 1) for use in uses]
    axes.set_yticks(range(len(uses)), labels, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("points, with the 95% interval\n← worse        better →")
    axes.set_title("● recommended   ■ R = 128, warm-up, centred", fontsize=8, loc="right")
    figure.savefig(ROOT / "docs/whom.png", dpi=160)


if __name__ == "__main__":
    draw_whom()
