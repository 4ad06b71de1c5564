"""Two more pictures: the course of training, and what the models call an emoji."""

import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import pyplot as plt

from ..data.emoji import EmojiSet
from ..figures import panels
from ..losses import LOSSES

RIGHT, WRONG = "#1b8a4b", "#c0392b"
CURVES = {
    "contrastive_loss": "contrastive loss in training",
    "validation_inmodal_gap": "in-modal gap, held-out concepts",
    "validation_crossmodal_gap": "cross-modal gap, held-out concepts",
}


def draw_training(histories: dict[str, list[list[dict[str, float]]]], path: Path) -> None:
    """One line a loss: the mean over seeds. histories: loss -> seeds -> steps."""
    fig, axes = panels(3, 8.0)
    for ax, (name, title) in zip(axes, CURVES.items(), strict=True):
        for loss, runs in histories.items():
            points = [[(row["step"], row[name]) for row in run if name in row] for run in runs]
            steps, values = np.array(points).mean(axis=0).T
            looks = [np.mean(part) for part in np.array_split(values, min(200, len(values)))]
            at = [np.mean(part) for part in np.array_split(steps, min(200, len(steps)))]
            ax.plot(at, looks, color=LOSSES[loss].colour, label=LOSSES[loss].title, linewidth=1.8)
        ax.set_title(title, loc="left")
        ax.grid(alpha=0.3)
        if name != "contrastive_loss":
            ax.set_yscale("log")
    axes[-1].set_xlabel("step")
    handles, names = axes[0].get_legend_handles_labels()
    fig.legend(handles, names, frameon=False, loc="outside upper center", ncols=4)
    fig.savefig(path, format="png")
    plt.close(fig)


def draw_names(shown: dict[str, list[dict[str, Any]]], emoji: EmojiSet, path: Path) -> None:
    """A dozen emoji in styles never trained on, and the names found. shown: loss -> emoji."""
    row_of = {
        (style, emoji.concepts[i].code): row
        for style, concepts in emoji.concept.items()
        for row, i in enumerate(concepts.tolist())
    }
    titles, first = [LOSSES[loss].title for loss in shown], next(iter(shown.values()))
    lines = (len(first) + 1) // 2
    fig, axes = plt.subplots(
        lines, 4, figsize=(5.5, 1.2 * lines + 0.7), dpi=200, width_ratios=[1, 1.9, 1, 1.9]
    )
    for ax in axes.flat:
        ax.axis("off")
    for k, ((left, right), of) in enumerate(zip(axes.reshape(-1, 2), first, strict=False)):
        image = emoji.images[of["style"]][row_of[of["style"], of["code"]]]
        left.imshow(image.permute(1, 2, 0).numpy(), interpolation="bilinear")
        y = 1.0
        found = {
            title: of_loss[k]["found"]
            for title, of_loss in zip(titles, shown.values(), strict=True)
        }
        for text, colour, weight in name_lines(of["name"], found):
            right.text(0, y, text, color=colour, weight=weight, fontsize=9.5, va="top")
            y -= 0.17 * (text.count("\n") + 1) + 0.05
    verb = "call" if len(titles) > 1 else "calls"
    title = f"What {' and '.join(titles)} {verb} an emoji\nin a style never trained on"
    fig.suptitle(title, fontsize=12)
    fig.subplots_adjust(left=0.01, right=0.99, top=1 - 0.6 / fig.get_figheight(), bottom=0.01)
    fig.savefig(path, format="png")
    plt.close(fig)


def name_lines(name: str, found: dict[str, str]) -> Iterator[tuple[str, str, str]]:
    """The lines next to an emoji: its name, then what each loss found; (text, colour, weight)."""
    yield textwrap.fill(name, 19, max_lines=2), "black", "bold"
    for title, guess in found.items():
        text, colour = (f"{title} ✓", RIGHT) if guess == name else (f"{title} ✗ {guess}", WRONG)
        yield textwrap.fill(text, 21, max_lines=2), colour, "normal"
