"""The pictures, drawn from `results.json`: 5.5 inches wide, to be read on a phone."""

import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from ..data.emoji import EMOJI_FOLDER, SHIFT_STYLES, STRESS_STYLES, TRAIN_STYLES
from ..data.samples import decode, read_samples
from .results import TITLES, by_loss

matplotlib.use("Agg")  # files only: no display needed
from matplotlib import pyplot as plt

COLOURS = {"clip": "#5b6b7b", "cyclip": "#e4572e", "c-cyclip": "#2a9d8f", "i-cyclip": "#8e5ea2"}
RIGHT, WRONG = "#1b8a4b", "#c0392b"


def figure(rows: int, height: float) -> tuple[Any, list[Any]]:
    """Panels one above the other."""
    plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})
    fig, axes = plt.subplots(rows, 1, figsize=(5.5, height), dpi=200, layout="constrained")
    return fig, list(np.atleast_1d(axes))


def legend_above(fig: Any, ax: Any) -> None:
    """One legend for all panels, where it hides nothing."""
    handles, names = ax.get_legend_handles_labels()
    columns = min(len(names), 4)
    fig.legend(
        handles,
        names,
        frameon=False,
        loc="outside upper center",
        ncols=columns,
        handlelength=1.2,
        columnspacing=1.2,
    )


def draw_lines(ax: Any, results: dict[str, Any], kind: str, name: str) -> None:
    """One line a loss: the mean over seeds, shaded from the lowest to the highest."""
    for loss, runs in by_loss(results).items():
        histories = [run["history"][kind] for run in runs]
        values = np.array([history[name] for history in histories])
        if not values.any():  # a penalty that this loss does not have
            continue
        steps = histories[0]["step"]
        ax.plot(steps, values.mean(axis=0), color=COLOURS[loss], label=TITLES[loss], linewidth=1.8)
        if len(runs) > 1:
            low, high = values.min(axis=0), values.max(axis=0)
            ax.fill_between(steps, low, high, color=COLOURS[loss], alpha=0.2, linewidth=0)
    ax.set_xlabel("step")
    ax.grid(alpha=0.3)


def draw_loss(results: dict[str, Any], path: Path) -> None:
    """The terms of the loss over training, each with the weight it had."""
    fig, (top, *rest) = figure(3, 8.0)
    titles = {
        "contrastive_loss": "contrastive loss in training",
        "inmodal_cyclic_loss": "in-modal penalty × λ",
        "crossmodal_cyclic_loss": "cross-modal penalty × λ",
    }
    for ax, (name, title) in zip((top, *rest), titles.items(), strict=True):
        draw_lines(ax, results, "training", name)
        ax.set_title(title, loc="left")
        if ax.lines:
            # the scale of what follows the warm-up: the penalties start out many times as high
            settled = [line.get_ydata()[len(line.get_ydata()) // 10 :].max() for line in ax.lines]
            ax.set_ylim(0, 1.3 * max(settled))
            ax.legend(frameon=False)
    fig.savefig(path)
    plt.close(fig)


def draw_consistency(results: dict[str, Any], path: Path) -> None:
    """The two consistency gaps over training, measured on validation concepts."""
    fig, axes = figure(2, 6.4)
    titles = {
        "inmodal_gap": "in-modal gap: image–image against\ntext–text similarity, held-out concepts",
        "crossmodal_gap": "cross-modal gap: (image i, text j) against\n"
        "(image j, text i), held-out concepts",
    }
    for ax, (name, title) in zip(axes, titles.items(), strict=True):
        draw_lines(ax, results, "validation", name)
        ax.set_title(title, loc="left")
        ax.set_yscale("log")
    legend_above(fig, axes[0])
    fig.savefig(path)
    plt.close(fig)


def draw_styles(results: dict[str, Any], path: Path) -> None:
    """Accuracy in each drawing style."""
    fig, axes = figure(2, 8.4)
    never_seen = [("new style", style) for style in SHIFT_STYLES]
    stress = [("stress", style) for style in STRESS_STYLES]
    held_out = [("new concept", style) for style in TRAIN_STYLES]
    held_out += [("new both", style) for style in SHIFT_STYLES]
    panels = (
        (
            "image_to_name",
            never_seen + stress,
            "image → name, top-1 %,\nin styles never trained on",
        ),
        ("subgroup", held_out, "zero-shot subgroup, top-1 %,\nof concepts never trained on"),
    )
    losses = by_loss(results)
    for ax, (question, bars, title) in zip(axes, panels, strict=True):
        for k, (loss, runs) in enumerate(losses.items()):
            height = 0.8 / len(losses)
            values = np.array(
                [
                    [100 * r["results"]["styles"][s][style][question] for s, style in bars]
                    for r in runs
                ]
            )  # (seeds, bars)
            y = np.arange(len(bars)) + (k - (len(losses) - 1) / 2) * height
            spread = values.std(axis=0, ddof=1) if len(runs) > 1 else None
            drawn = ax.barh(
                y, values.mean(axis=0), height, xerr=spread, color=COLOURS[loss], label=TITLES[loss]
            )
            ax.bar_label(drawn, fmt="%.0f", padding=3, fontsize=10)
        labels = []
        for situation, style in bars:
            note = {"stress": "\n(stress)", "new both": "\n(new style)"}.get(situation, "")
            labels.append(style.replace("fluent-emoji-", "fluent-emoji-\n") + note)
        ax.set_yticks(range(len(bars)), labels)
        ax.invert_yaxis()
        ax.margins(x=0.12)  # room for the numbers
        ax.set_title(title, loc="left")
    legend_above(fig, axes[0])
    fig.savefig(path)
    plt.close(fig)


def draw_names(results: dict[str, Any], path: Path) -> None:
    """A dozen emoji in styles never trained on, and the names found by the first two losses."""
    runs = [runs[0] for runs in list(by_loss(results).values())[:2]]
    folder = Path(results["emoji"] or EMOJI_FOLDER)
    all_shown = runs[0]["results"]["shown"]
    wanted = {(shown["style"], shown["code"]) for shown in all_shown}
    shards = [str(folder / f"{style}.tar.xz") for style in sorted({s for s, _ in wanted})]
    images = {}
    for sample in read_samples(shards):
        key = sample.info["style"], sample.info["concept"]
        if key in wanted:
            images[key] = decode(sample.image, 64).transpose(1, 2, 0)
    lines = (len(all_shown) + 1) // 2
    fig, axes = plt.subplots(
        lines, 4, figsize=(5.5, 1.2 * lines + 0.7), dpi=200, width_ratios=[1, 1.9, 1, 1.9]
    )
    cells = np.atleast_2d(axes).reshape(-1, 2)
    for left, right in cells:
        left.axis("off")
        right.axis("off")
    for k, ((left, right), shown) in enumerate(zip(cells, all_shown, strict=False)):
        left.imshow(images[shown["style"], shown["code"]], interpolation="bilinear")
        y = 1.0
        for text, colour, weight in name_lines(shown["name"], runs, k):
            right.text(0, y, text, color=colour, weight=weight, fontsize=9.5, va="top")
            y -= 0.17 * (text.count("\n") + 1) + 0.05
    losses = " and ".join(TITLES[run["config"]["loss"]] for run in runs)
    verb = "call" if len(runs) > 1 else "calls"
    fig.suptitle(f"What {losses} {verb} an emoji\nin a style never trained on", fontsize=12)
    fig.subplots_adjust(left=0.01, right=0.99, top=1 - 0.6 / fig.get_figheight(), bottom=0.01)
    fig.savefig(path)
    plt.close(fig)


def name_lines(name: str, runs: list[dict[str, Any]], k: int) -> Iterator[tuple[str, str, str]]:
    """The lines beside an emoji: its name, then what each run found; (text, colour, weight)."""
    yield textwrap.fill(name, 19, max_lines=2), "black", "bold"
    for run in runs:
        found = run["results"]["shown"][k]["found"]
        mark, colour = ("✓", RIGHT) if found == name else ("✗", WRONG)
        text = f"{TITLES[run['config']['loss']]} {mark} {'' if found == name else found}"
        yield textwrap.fill(text.strip(), 21, max_lines=2), colour, "normal"


PICTURES = {
    "loss.png": draw_loss,
    "consistency.png": draw_consistency,
    "styles.png": draw_styles,
    "names.png": draw_names,
}
