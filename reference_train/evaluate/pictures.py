"""The pictures of an evaluation, 5.5 inches wide, to be read on a phone."""

import re
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib
from matplotlib import pyplot as plt

from cyclip_loss.warn import PAPER_BATCH_SIZE

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
            low, high = interval(shares, queries(data, metric))
            found.append({"title": title, "mark": "", "value": 100 * mean(shares)})
            found[-1] |= {"low": 100 * low, "high": 100 * high}
    if found and (paper := published(data, name, metric)):
        mark = " q" if paper[2] == "quoted" else ""
        found += [
            {"title": title, "mark": mark, "value": value, "low": value, "high": value}
            for title, value in zip(PAPER_TITLES, paper[:2], strict=True)
        ]
    return found


# ------------------------------------------------------------------------------------------------
# Over batch sizes, of the runs that icons.sh calls lambda-LOSS-BATCH-REFERENCE

OVER_BATCHES = {"icons": "held-out icons: name, top-5, %", "emoji": "emoji: name, top-5, %"}


def by_batch(results: dict[str, dict[str, Any]]) -> dict[str, dict[int, dict[str, Any]]]:
    """What is compared -> batch size -> results."""
    lines: dict[str, dict[int, dict[str, Any]]] = {}
    for name, found in results.items():
        if match := re.fullmatch(r"lambda-([a-z-]+)-(\d+)-(\d+)", name):
            loss, batch, reference = match[1], int(match[2]), int(match[3])
            references = {reference, PAPER_BATCH_SIZE} if batch == PAPER_BATCH_SIZE else {reference}
            for line in {loss} if loss == "clip" else {f"{loss}-{r}" for r in references}:
                lines.setdefault(line, {})[batch] = found
    return lines


def draw_batches(batches: dict[str, dict[int, dict[str, Any]]], path: Path) -> None:
    """What λ = 0.25 does at each batch size, as it stands and with a reference batch size."""
    looks = {
        "clip": ("CLIP", LOSSES["clip"].colour, "o-"),
        "cyclip-128": ("CyCLIP, reference_batch_size=128", LOSSES["cyclip"].colour, "o-"),
        "cyclip-0": ("CyCLIP, λ = 0.25 as it stands", LOSSES["cyclip"].colour, "s:"),
    }
    sizes = sorted({n for of in batches.values() for n in of})
    fig, axes = panels(len(OVER_BATCHES), 1 + 2.2 * len(OVER_BATCHES))
    for ax, (data, title) in zip(axes, OVER_BATCHES.items(), strict=True):
        for line, (words, colour, style) in looks.items():
            found = sorted(batches.get(line, {}).items())
            shares = {n: of[data]["numbers"]["top5"] for n, of in found if data in of}
            ax.plot(
                list(shares), [100 * s for s in shares.values()], style, color=colour, label=words
            )
        ax.set_xscale("log", base=2)
        ax.set_xticks(sizes, [f"{n:,}" for n in sizes])
        ax.set_ylim(bottom=0)
        ax.set_title(title, loc="left")
        ax.grid(alpha=0.3)
    axes[-1].set_xlabel("batch size, at the same number of pairs")
    handles, titles = axes[0].get_legend_handles_labels()
    fig.legend(handles, titles, frameon=False, loc="outside upper center", ncols=1)
    fig.savefig(path, format="png")
    plt.close(fig)
