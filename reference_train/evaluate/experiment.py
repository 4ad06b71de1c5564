"""Evaluations of several runs, averaged: `python -m reference_train.evaluate.experiment --help`.

Runs are told apart by their names, as `reference_train/icons.sh` gives them: LOSS-SEED, and
lambda-LOSS-BATCH-REFERENCE for those of several batch sizes.
"""

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from matplotlib import pyplot as plt

from cyclip_loss.checks import PAPER_BATCH_SIZE

from ..arguments import Parser
from ..data.emoji import STRESS_STYLES
from ..errors import CannotStart, run
from ..figures import panels
from ..files import write_text, written_whole
from ..losses import LOSSES

Results = dict[str, dict[str, Any]]  # column -> data set -> numbers and groups


class Row(NamedTuple):
    """A number of the table: where it is in an evaluation."""

    words: str
    data: str
    metric: str
    group: str = ""
    percent: bool = True
    drawn: bool = False  # in the picture of the seeds, too

    def of(self, found: dict[str, Any]) -> float | None:
        """The number in one column's results, in % if it is a share."""
        results = found.get(self.data, {"numbers": {}, "groups": {}})
        numbers = results["groups"].get(self.group, {}) if self.group else results["numbers"]
        value = numbers.get(self.metric)
        return None if value is None else value * (100 if self.percent else 1)


[STRESS] = STRESS_STYLES
ICONS_TOP5 = Row("held-out icons: name, top-5", "icons", "top5")
EMOJI_TOP5 = Row("emoji: name, top-5", "emoji", "top5")
OVER_BATCHES = (ICONS_TOP5, EMOJI_TOP5)
ROWS = (
    Row("held-out icons: name, top-1", "icons", "top1", drawn=True),
    ICONS_TOP5,
    Row("held-out icons: image → caption, R@1", "icons", "image_to_text_r1"),
    Row("held-out icons: caption → image, R@1", "icons", "text_to_image_r1"),
    Row("held-out icons: image → caption, R@10", "icons", "image_to_text_r10"),
    Row("held-out icons: caption → image, R@10", "icons", "text_to_image_r10"),
    Row("emoji: name, top-1", "emoji", "top1", drawn=True),
    EMOJI_TOP5,
    Row("emoji: subgroup, top-1", "emoji", "subgroup_top1", drawn=True),
    Row("emoji: subgroup, top-5", "emoji", "subgroup_top5"),
    Row("emoji, black and white: name, top-1", "emoji", "top1", STRESS, drawn=True),
    Row("emoji, black and white: subgroup, top-1", "emoji", "subgroup_top1", STRESS, drawn=True),
    Row("stamps: class, top-1", "stamps", "top1"),
    Row("stamps: class, top-5", "stamps", "top5"),
    Row("stamps, drawings: class, top-1", "stamps", "top1", "drawings", drawn=True),
    Row("stamps, photographs: class, top-1", "stamps", "top1", "photographs", drawn=True),
    Row("stamps: image → caption, R@5", "stamps", "image_to_text_r5"),
    Row("stamps: caption → image, R@5", "stamps", "text_to_image_r5"),
    Row("emoji: consistency score of names, k = 1", "emoji", "consistency_1"),
    Row("emoji: consistency score of names, k = 10", "emoji", "consistency_10"),
    Row("emoji: consistency score of subgroups, k = 1", "emoji", "subgroup_consistency_1"),
    Row("emoji: consistency score of subgroups, k = 10", "emoji", "subgroup_consistency_10"),
    Row("icons: image uniformity", "icons", "image_uniformity", percent=False),
    Row("icons: text uniformity", "icons", "text_uniformity", percent=False),
    Row("icons: alignment", "icons", "alignment", percent=False),
    Row("icons: in-modal gap × 100", "icons", "inmodal_gap"),
    Row("icons: cross-modal gap × 100", "icons", "crossmodal_gap"),
)


def main(argv: Sequence[str]) -> None:
    """The command line."""
    parser = Parser(
        prog="python -m reference_train.evaluate.experiment",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=__doc__,
    )
    parser.add_argument("evaluations", nargs="+", type=Path, metavar="EVALUATION.json")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    arguments = parser.parse_args(argv)
    results: Results = {}
    for path in arguments.evaluations:
        try:
            results |= json.loads(path.read_text(encoding="utf-8"))["results"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CannotStart(f"{path} is no evaluation.json: {error}") from error
    seeds, batches = by_seed(results), by_batch(results)
    if not seeds and not batches:
        raise CannotStart("no column is called LOSS-SEED or lambda-LOSS-BATCH-REFERENCE")
    arguments.out.mkdir(parents=True, exist_ok=True)
    if seeds:
        write_text(table(seeds), arguments.out / "experiment.md")
        with written_whole(arguments.out / "experiment.png") as path:
            draw(seeds, path)
    if batches:
        with written_whole(arguments.out / "lambda.png") as path:
            draw_batches(batches, path)
    print(f"Written to {arguments.out}")


def by_seed(results: Results) -> dict[str, list[dict[str, Any]]]:
    """loss -> the results of its seeds."""
    matches = {name: re.fullmatch(r"(.+)-(\d+)", name) for name in results}
    return {
        loss: runs
        for loss in LOSSES
        if (runs := [results[name] for name, m in matches.items() if m and m[1] == loss])
    }


def by_batch(results: Results) -> dict[str, dict[int, dict[str, Any]]]:
    """What is compared -> batch size -> results."""
    lines: dict[str, dict[int, dict[str, Any]]] = {}
    for name, found in results.items():
        if match := re.fullmatch(r"lambda-([a-z-]+)-(\d+)-(\d+)", name):
            loss, batch, reference = match[1], int(match[2]), int(match[3])
            references = {reference, PAPER_BATCH_SIZE} if batch == PAPER_BATCH_SIZE else {reference}
            for line in {loss} if loss == "clip" else {f"{loss}-{r}" for r in references}:
                lines.setdefault(line, {})[batch] = found
    return lines


def numbers(row: Row, runs: list[dict[str, Any]]) -> list[float]:
    """A row's number in each of the runs that have it."""
    return [value for found in runs if (value := row.of(found)) is not None]


def table(seeds: dict[str, list[dict[str, Any]]]) -> str:
    """`experiment.md`: the mean of each loss, its range over seeds, and CyCLIP's gain."""
    heads = [f"{LOSSES[loss].title} ({len(runs)})" for loss, runs in seeds.items()]
    both = {"clip", "cyclip"} <= seeds.keys()
    out = [
        "Mean over seeds (how many), lowest to highest in brackets; in % but for uniformity and",
        "alignment. Gain: CyCLIP's mean over CLIP's.",
        "",
        f"| | {' | '.join(heads)} |{' gain |' if both else ''}",
        f"|---|{'---:|' * (len(heads) + both)}",
    ]
    for row in ROWS:
        of = {loss: numbers(row, runs) for loss, runs in seeds.items()}
        if not any(of.values()):
            continue
        cells = [spread(values) for values in of.values()]
        if both:
            gain = row.percent and of["clip"] and of["cyclip"] and "gap" not in row.metric
            cells.append(
                f"{100 * (mean(of['cyclip']) / mean(of['clip']) - 1):+.0f} %" if gain else ""
            )
        out.append(f"| {row.words} | {' | '.join(cells)} |")
    return "\n".join(out) + "\n"


def spread(values: list[float]) -> str:
    """Mean and range."""
    if len(values) < 2:
        return f"{values[0]:.2f}" if values else ""
    return f"{mean(values):.2f} ({min(values):.2f} – {max(values):.2f})"


def draw(seeds: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Bars for the means, a dot for each seed."""
    rows = [row for row in ROWS if row.drawn and all(numbers(row, runs) for runs in seeds.values())]
    fig, [ax] = panels(1, 0.9 + 0.22 * len(rows) * (len(seeds) + 1))
    for place, (loss, runs) in enumerate(seeds.items()):
        y = [i * (len(seeds) + 1) + place for i in range(len(rows))]
        values = [numbers(row, runs) for row in rows]
        look = LOSSES[loss]
        ax.barh(y, [mean(v) for v in values], 0.9, color=look.colour, alpha=0.75, label=look.title)
        for at, of_seeds in zip(y, values, strict=True):
            ax.plot(of_seeds, [at] * len(of_seeds), "o", color="black", markersize=2.5)
            ax.annotate(
                f"{mean(of_seeds):.1f}",
                (max(of_seeds), at),
                (5, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
            )
    middle = (len(seeds) - 1) / 2
    ax.set_yticks(
        [i * (len(seeds) + 1) + middle for i in range(len(rows))],
        [row.words.replace(": ", ":\n") for row in rows],
        fontsize=9,
    )
    ax.invert_yaxis()
    ax.set_xlabel("%")
    fig.legend(frameon=False, loc="outside upper center", ncols=4, handlelength=1.2)
    fig.savefig(path, format="png")
    plt.close(fig)


def draw_batches(batches: dict[str, dict[int, dict[str, Any]]], path: Path) -> None:
    """What λ = 0.25 does at each batch size, as it stands and with a reference batch size."""
    looks = {
        "clip": ("CLIP", LOSSES["clip"].colour, "o-"),
        "cyclip-128": ("CyCLIP, reference_batch_size=128", LOSSES["cyclip"].colour, "o-"),
        "cyclip-0": ("CyCLIP, λ = 0.25 as it stands", LOSSES["cyclip"].colour, "s:"),
    }
    fig, axes = panels(len(OVER_BATCHES), 1 + 2.2 * len(OVER_BATCHES))
    for ax, row in zip(axes, OVER_BATCHES, strict=True):
        for line, (title, colour, style) in looks.items():
            found = {n: row.of(of) for n, of in sorted(batches.get(line, {}).items())}
            ax.plot(list(found), list(found.values()), style, color=colour, label=title)
        sizes = sorted({n for of in batches.values() for n in of})
        ax.set_xscale("log", base=2)
        ax.set_xticks(sizes, [f"{n:,}" for n in sizes])
        ax.set_ylim(bottom=0)
        ax.set_title(f"{row.words}, %", loc="left")
        ax.grid(alpha=0.3)
    axes[-1].set_xlabel("batch size, at the same number of pairs")
    handles, titles = axes[0].get_legend_handles_labels()
    fig.legend(handles, titles, frameon=False, loc="outside upper center", ncols=1)
    fig.savefig(path, format="png")
    plt.close(fig)


if __name__ == "__main__":
    run(main)
