"""The pictures of an evaluation, 5.5 inches wide, to be read on a phone."""

from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib
from matplotlib import pyplot as plt

from ..figures import panels
from ..losses import LOSSES
from .table import METRICS, PAPER_TITLES, Result, chance, columns, interval, published, queries
from .table import values as values_of

DRAWN = ("top1", "subgroup_top1", "image_to_text_r1", "consistency_1")
PAPER_COLOURS = dict(zip(PAPER_TITLES, ("#c3cad1", "#5b6b7b"), strict=True))
OF_LOSSES = {look.title: look.colour for look in LOSSES.values()}


def draw(result: Result, path: Path) -> None:
    """Yours and the paper's. What can be chosen from as many classes shares an axis."""
    titles = [*columns(result), *PAPER_TITLES]
    several = matplotlib.colormaps["tab10" if len(titles) <= 10 else "tab20"]
    colours: dict[str, Any] = {title: several(i % several.N) for i, title in enumerate(titles)}
    colours |= OF_LOSSES | PAPER_COLOURS
    axes_of: dict[tuple[str, float | None], dict[str, list[dict[str, Any]]]] = {}
    for metric in DRAWN:
        for name, data in result["data_sets"].items():
            if found := bars(result, name, metric):
                by_lot = chance(data, metric)
                axes_of.setdefault((metric, by_lot), {})[f"{name}\n{data['images']:,} images"] = (
                    found
                )
    heights = [0.9 + sum(0.25 + 0.19 * len(b) for b in sets.values()) for sets in axes_of.values()]
    fig, axes = panels(max(1, len(heights)), 0.8 + sum(heights), height_ratios=heights or None)
    handles: dict[str, Any] = {}
    for ax, ((metric, by_lot), sets) in zip(axes, axes_of.items(), strict=False):
        y, ticks = 0.0, []
        for found in sets.values():
            ticks.append(y + (len(found) - 1) / 2)
            for bar in found:
                drawn = ax.barh(y, bar["value"], 0.9, color=colours[bar["title"]])
                ax.plot([bar["low"], bar["high"]], [y, y], color="black", linewidth=0.9)
                label = f"{bar['value']:.{1 if bar['value'] >= 10 else 2}f}{bar['mark']}"
                at = (max(bar["value"], bar["high"]), y)
                ax.annotate(label, at, (3, 0), textcoords="offset points", va="center", fontsize=9)
                handles.setdefault(bar["title"], drawn)
                y += 1
            y += 0.8
        ax.set_yticks(ticks, list(sets), fontsize=9)
        ax.set_ylim(y - 1.1, -0.7)
        ax.margins(x=0.16)  # room for the numbers
        title = METRICS[metric].words
        if by_lot is not None:
            ax.axvline(100 * by_lot, color="black", linestyle=":", linewidth=1.2)
            title += f", % (chance {100 * by_lot:.2g})"
        ax.set_title(title, loc="left", fontsize=11)
    shown = [title for title in titles if title in handles]
    fig.legend(
        [handles[title] for title in shown],
        shown,
        frameon=False,
        loc="outside upper center",
        ncols=2 if any(len(title) > 12 for title in shown) else 4,
        handlelength=1.2,
    )
    fig.savefig(path, format="png")
    plt.close(fig)


def bars(result: Result, name: str, metric: str) -> list[dict[str, Any]]:
    """The bars of a data set, where you have it, and the paper's below: in %."""
    data = result["data_sets"][name]
    found: list[dict[str, Any]] = []
    for title, runs in columns(result).items():
        if shares := values_of(runs, name, metric):
            low, high = interval(shares, queries(result, name, metric))
            found.append({"title": title, "mark": "", "value": 100 * mean(shares)})
            found[-1] |= {"low": 100 * low, "high": 100 * high}
    if found and (paper := published(data, name, metric)):
        mark = " q" if paper[2] == "quoted" else ""
        found += [
            {"title": title, "mark": mark, "value": value, "low": value, "high": value}
            for title, value in zip(PAPER_TITLES, paper[:2], strict=True)
        ]
    return found
