"""Draw the picture of the pages that is made from records.

    python .mkdocs/pictures.py

whom.png: what the penalties do to one index of images and texts, and to retrieval. It is made for a
width of 400 pixels. A white background keeps it readable in dark mode.
"""

from statistics import mean

import matplotlib

matplotlib.use("Agg")  # files only: no display needed
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from tables import ROOT, SPECS, compared_rows, interval

# The tables, and the titles of their panels.
PANELS = {
    "picture-index": """○ CLIP, penalties: ● recommended, ■ strong
Small models of photographs, batches of 256,
five seeds (icons: 128, three). Unseen titles,
titles of unseen types, unseen icons

One index of both, R@10 in %""",
    "picture-retrieval": "Retrieval, R@10: points from CLIP's",
}
PAGE = (ROOT / "reference_train/results/README.md").read_text()  # names the commits of the records
WORSE, BETTER = "#D55E00", "#0072B2"  # which colour-blind readers tell apart


def whom() -> Figure:
    """Each column of a table is a line, with 95% intervals, below its title and its numbers."""
    plt.rcParams["font.size"] = 13.5
    figure, panels = plt.subplots(2, figsize=(5, 9), height_ratios=(6, 5), layout="constrained")
    for axes, (table, title) in zip(panels, PANELS.items(), strict=True):
        axes.set_title(title, loc="left", fontsize="medium")
        columns = SPECS[table].splitlines()[1].split(" | ")[1:]
        losses = [values.values() for _, values, _ in compared_rows(SPECS[table], PAGE)]
        for y, (column, *values) in enumerate(zip(columns, *losses, strict=True)):
            means = [100 * mean(seeds.values()) for seeds in values]
            clip = means[0]
            zero = clip if table == "picture-retrieval" else 0
            for i, x in enumerate(means):
                # CLIP has no difference to itself.
                _, low, high = interval(values[i], values[0]) or (0, 0, 0)
                colour = BETTER if low > 0 else WORSE if high < 0 else "black"
                line = {"color": colour, "markerfacecolor": colour if i else "white"}
                axes.plot([clip + low - zero, clip + high - zero], [y, y], **line)
                axes.plot(x - zero, y, "oos"[i], **line)
                y += 0.13
            text = f"{column.partition(' = ')[0]}: " + " → ".join(f"{x:.1f}" for x in means)
            axes.text(0.01, y - 0.64, text, color=colour, transform=axes.get_yaxis_transform())
        axes.set(ylim=(len(columns) - 0.4, -0.7), yticks=[])
        axes.grid(alpha=0.5)
    return figure


if __name__ == "__main__":
    whom().savefig(ROOT / "docs/whom.png", dpi=160)
