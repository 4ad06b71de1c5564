"""The pictures, drawn from `results.json`: 5.5 inches wide, to be read on a phone."""

import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import pyplot as plt

from ..data.emoji import EMOJI_FOLDER, SHIFT_STYLES, SIZE, STRESS_STYLES, TRAIN_STYLES
from ..data.samples import decode, read_samples
from ..figures import panels
from ..losses import LOSSES
from .results import by_loss

RIGHT, WRONG = "#1b8a4b", "#c0392b"


def save(fig: Any, path: Path, legend_of: Any) -> None:
    """Saves the figure with one legend for all panels, where it hides nothing."""
    handles, names = legend_of.get_legend_handles_labels()
    fig.legend(
        handles,
        names,
        frameon=False,
        loc="outside upper center",
        ncols=min(len(names), 4),
        handlelength=1.2,
        columnspacing=1.2,
    )
    fig.savefig(path)
    plt.close(fig)


def draw_lines(ax: Any, results: dict[str, Any], kind: str, name: str, title: str) -> None:
    """One line a loss: the mean over seeds, shaded from the lowest to the highest."""
    for loss, runs in by_loss(results).items():
        histories = [run["history"][kind] for run in runs]
        values = np.array([history[name] for history in histories])
        if not values.any():  # a penalty that this loss does not have
            continue
        steps, look = histories[0]["step"], LOSSES[loss]
        ax.plot(steps, values.mean(axis=0), color=look.colour, label=look.title, linewidth=1.8)
        if len(runs) > 1:
            low, high = values.min(axis=0), values.max(axis=0)
            ax.fill_between(steps, low, high, color=look.colour, alpha=0.2, linewidth=0)
    ax.set_title(title, loc="left")
    ax.set_xlabel("step")
    ax.grid(alpha=0.3)


def draw_loss(results: dict[str, Any], path: Path) -> None:
    """The terms of the loss over training, each with the weight it had."""
    fig, axes = panels(3, 8.0)
    titles = {
        "contrastive_loss": "contrastive loss in training",
        "inmodal_cyclic_loss": "in-modal penalty × λ",
        "crossmodal_cyclic_loss": "cross-modal penalty × λ",
    }
    for ax, (name, title) in zip(axes, titles.items(), strict=True):
        draw_lines(ax, results, "training", name, title)
        if ax.lines:
            # the scale of what follows the warm-up: the penalties start out many times as high
            settled = [line.get_ydata()[len(line.get_ydata()) // 10 :].max() for line in ax.lines]
            ax.set_ylim(0, 1.3 * max(settled))
    save(fig, path, axes[0])


def draw_consistency(results: dict[str, Any], path: Path) -> None:
    """The two consistency gaps over training, measured on validation concepts."""
    fig, axes = panels(2, 6.4)
    titles = {
        "inmodal_gap": "in-modal gap: image–image against\ntext–text similarity, held-out concepts",
        "crossmodal_gap": "cross-modal gap: (image i, text j) against\n"
        "(image j, text i), held-out concepts",
    }
    for ax, (name, title) in zip(axes, titles.items(), strict=True):
        draw_lines(ax, results, "validation", name, title)
        ax.set_yscale("log")
    save(fig, path, axes[0])


def draw_styles(results: dict[str, Any], path: Path) -> None:
    """Accuracy in each drawing style."""
    never_seen = [("new style", style) for style in SHIFT_STYLES]
    never_seen += [("stress", style) for style in STRESS_STYLES]
    held_out = [("new concept", style) for style in TRAIN_STYLES]
    held_out += [("new both", style) for style in SHIFT_STYLES]
    notes = {"stress": "\n(stress)", "new both": "\n(new style)"}
    losses = by_loss(results)
    height = 0.8 / len(losses)

    def draw(ax: Any, question: str, bars: list[tuple[str, str]], title: str) -> None:
        for k, (loss, runs) in enumerate(losses.items()):
            styles = [run["results"]["styles"] for run in runs]
            values = np.array(
                [[100 * s[sit][style][question] for sit, style in bars] for s in styles]
            )
            drawn = ax.barh(
                np.arange(len(bars)) + (k - (len(losses) - 1) / 2) * height,
                values.mean(axis=0),  # of (seeds, bars)
                height,
                xerr=values.std(axis=0, ddof=1) if len(runs) > 1 else None,
                color=LOSSES[loss].colour,
                label=LOSSES[loss].title,
            )
            ax.bar_label(drawn, fmt="%.0f", padding=3, fontsize=10)
        broken = [style.replace("fluent-emoji-", "fluent-emoji-\n") for _, style in bars]
        labels = [b + notes.get(sit, "") for b, (sit, _) in zip(broken, bars, strict=True)]
        ax.set_yticks(range(len(bars)), labels)
        ax.invert_yaxis()
        ax.margins(x=0.12)  # room for the numbers
        ax.set_title(title, loc="left")

    heights = [len(never_seen), len(held_out)]  # bars as thick in both
    fig, (top, bottom) = panels(2, 9.6, height_ratios=heights)
    draw(top, "image_to_name", never_seen, "image → name, top-1 %,\nin styles never trained on")
    draw(bottom, "subgroup", held_out, "zero-shot subgroup, top-1 %,\nof concepts never trained on")
    save(fig, path, top)


def draw_names(results: dict[str, Any], path: Path) -> None:
    """A dozen emoji in styles never trained on, and the names found by the first two losses."""
    runs = [runs[0] for runs in list(by_loss(results).values())[:2]]
    all_shown = runs[0]["results"]["shown"]
    styles = sorted({shown["style"] for shown in all_shown})
    shards = [str(EMOJI_FOLDER / f"{style}.tar.xz") for style in styles]
    images = {(s.info["style"], s.info["concept"]): s.image for s in read_samples(shards)}
    lines = (len(all_shown) + 1) // 2
    fig, axes = plt.subplots(
        lines, 4, figsize=(5.5, 1.2 * lines + 0.7), dpi=200, width_ratios=[1, 1.9, 1, 1.9]
    )
    for ax in axes.flat:
        ax.axis("off")
    for k, ((left, right), shown) in enumerate(zip(axes.reshape(-1, 2), all_shown, strict=False)):
        image = decode(images[shown["style"], shown["code"]], SIZE)
        left.imshow(image.transpose(1, 2, 0), interpolation="bilinear")
        y = 1.0
        for text, colour, weight in name_lines(shown["name"], runs, k):
            right.text(0, y, text, color=colour, weight=weight, fontsize=9.5, va="top")
            y -= 0.17 * (text.count("\n") + 1) + 0.05
    losses = " and ".join(LOSSES[run["config"]["loss"]].title for run in runs)
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
        mark, colour = (f"✗ {found}", WRONG) if found != name else ("✓", RIGHT)
        text = f"{LOSSES[run['config']['loss']].title} {mark}"
        yield textwrap.fill(text, 21, max_lines=2), colour, "normal"


PICTURES = {
    "loss.png": draw_loss,
    "consistency.png": draw_consistency,
    "styles.png": draw_styles,
    "names.png": draw_names,
}
