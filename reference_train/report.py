"""What a person sees at the end: one table, four pictures; all from `results.json`.

`python -m reference_train report FOLDER` makes them again without training.
"""

import argparse
import json
import platform
import statistics
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from .data import (
    EMOJI_FOLDER,
    SHIFT_STYLES,
    STRESS_STYLES,
    TRAIN_STYLES,
    CannotStart,
    decode,
    read_samples,
)
from .evaluate import SHOWN_STYLE
from .train import RunConfig

matplotlib.use("Agg")  # files only: no display needed
from matplotlib import pyplot as plt

TITLES = {"clip": "CLIP", "cyclip": "CyCLIP", "c-cyclip": "C-CyCLIP", "i-cyclip": "I-CyCLIP"}
COLOURS = {"clip": "#5b6b7b", "cyclip": "#e4572e", "c-cyclip": "#2a9d8f", "i-cyclip": "#8e5ea2"}
RIGHT, WRONG = "#1b8a4b", "#c0392b"
HISTORY_POINTS = 200

# the table: situation -> (heading, rows); a row is (question, label, is it a percentage?); `names`
# and `images` are among how many the right one is to be found
GEOMETRY = (
    ("inmodal_gap", "in-modal gap ↓", False),
    ("crossmodal_gap", "cross-modal gap ↓", False),
    ("alignment", "alignment ↓", False),
    ("image_uniformity", "image uniformity ↓", False),
    ("text_uniformity", "text uniformity ↓", False),
)
ROWS: dict[str, tuple[str, tuple[tuple[str, str, bool], ...]]] = {
    "new style": (
        "trained concepts, new styles",
        (
            ("image_to_name", "image → name (of {names:,.0f})", True),
            ("name_to_image", "name → image (of {images:,.0f})", True),
            ("subgroup", "subgroup, zero-shot", True),
            ("group", "group, zero-shot", True),
            ("name_consistency", "consistency: name", True),
            ("subgroup_consistency", "consistency: subgroup", True),
            *GEOMETRY,
        ),
    ),
    "new concept": (
        "new concepts, trained styles",
        (
            ("image_to_name", "image → name (of {names:,.0f})", True),
            ("name_to_image", "name → image (of {images:,.0f})", True),
            ("subgroup", "subgroup, zero-shot", True),
            ("group", "group, zero-shot", True),
            ("subgroup_consistency", "consistency: subgroup", True),
            *GEOMETRY[:3],
        ),
    ),
    "new both": (
        "new concepts, new styles",
        (
            ("image_to_name", "image → name (of {names:,.0f})", True),
            ("subgroup", "subgroup, zero-shot", True),
            ("group", "group, zero-shot", True),
            ("subgroup_consistency", "consistency: subgroup", True),
        ),
    ),
    "stress": (
        "trained concepts, black and white",
        (
            ("image_to_name", "image → name (of {names:,.0f})", True),
            ("subgroup", "subgroup, zero-shot", True),
        ),
    ),
}


# ------------------------------------------------------------------------------------------------
# results.json


def evaluated(folder: Path, split: str) -> bool:
    """Whether a run's folder holds its results on `split`."""
    path = folder / "results.json"
    return path.exists() and json.loads(path.read_text())["split"] == split


def save_run(
    folder: Path,
    config: RunConfig,
    split: str,
    seconds: float,
    device: torch.device,
    results: dict[str, Any],
) -> None:
    """Writes a run's `results.json`."""
    run = {
        "config": asdict(config),
        "split": split,
        "seconds": seconds,
        "images_per_second": config.steps * config.batch_size / seconds,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "results": results,
        "history": read_history(folder / "metrics.jsonl"),
    }
    write_json(run, folder / "results.json")


def write_json(content: Any, path: Path) -> None:
    """Whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(path)


def read_history(path: Path) -> dict[str, dict[str, list[float]]]:
    """metrics.jsonl -> {"training": columns, thinned to means, "validation": columns}."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    names = [name for name in lines[0] if not name.startswith("validation_")]
    values = np.array([[line[name] for name in names] for line in lines])
    bins = np.array_split(values, min(HISTORY_POINTS, len(values)))
    means = np.array([part.mean(axis=0) for part in bins])
    measured = [line for line in lines if any(name.startswith("validation_") for name in line)]
    columns = ["step", *(n for n in measured[0] if n.startswith("validation_"))] if measured else []
    return {
        "training": dict(zip(names, means.T.tolist(), strict=True)),
        "validation": {
            name.removeprefix("validation_"): [line[name] for line in measured] for name in columns
        },
    }


def gather_results(out: Path, split: str, emoji_folder: Path) -> None:
    """Writes `out/results.json` from the runs in `out`."""
    runs = [json.loads(path.read_text()) for path in sorted(out.glob("*/results.json"))]
    order = list(TITLES)
    runs = [run for run in runs if run["split"] == split]
    runs.sort(key=lambda run: (order.index(run["config"]["loss"]), run["config"]["seed"]))
    packages = ("torch", "open_clip_torch", "webdataset", "numpy")
    results = {
        "split": split,
        "emoji": "" if emoji_folder == EMOJI_FOLDER else str(emoji_folder),  # "": those that ship
        "versions": {"python": platform.python_version(), **{p: version(p) for p in packages}},
        "machine": {"processor": platform.machine(), "threads": torch.get_num_threads()},
        "runs": runs,
    }
    write_json(results, out / "results.json")


def by_loss(results: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The runs of each loss, in the order of `TITLES`."""
    losses: dict[str, list[dict[str, Any]]] = {}
    for run in results["runs"]:
        losses.setdefault(run["config"]["loss"], []).append(run)
    return losses


# ------------------------------------------------------------------------------------------------
# The table


def cell(values: list[float], percentage: bool) -> str:
    """Mean, and the standard deviation where there are several seeds."""
    if percentage:
        values, digits = [100 * value for value in values], 1
    else:
        digits = 4 if abs(values[0]) < 0.1 else 3
    text = f"{statistics.mean(values):.{digits}f}"
    if len(values) > 1:
        text += f" ± {statistics.stdev(values):.{digits}f}"
    return text


def make_table(results: dict[str, Any]) -> Table:
    """The losses side by side; one section for each situation of the evaluation."""
    losses = by_loss(results)
    seeds = {len(runs) for runs in losses.values()}
    spread = ", mean ± standard deviation over seeds" if max(seeds) > 1 else ""
    table = Table(
        title=f"What training never saw ({results['split']} split; % unless it says gap, "
        f"alignment or uniformity{spread})",
        title_justify="left",
    )
    table.add_column("")
    for loss, runs in losses.items():
        count = f" ({len(runs)} seeds)" if max(seeds) > 1 else ""
        table.add_column(TITLES[loss] + count, justify="right", no_wrap=True)
    for situation, (heading, rows) in ROWS.items():
        first = results["runs"][0]["results"]["situations"][situation]
        table.add_row(f"[bold]{heading}")
        for question, label, percentage in rows:
            cells = []
            for runs in losses.values():
                values = [run["results"]["situations"][situation][question] for run in runs]
                cells.append(cell(values, percentage))
            table.add_row(f"  {label.format(**first)}", *cells)
        table.add_section()
    for label, key, digits in (
        ("seconds a run", "seconds", 0),
        ("images/s", "images_per_second", 0),
    ):
        means = [statistics.mean(run[key] for run in runs) for runs in losses.values()]
        table.add_row(label, *(f"{value:,.{digits}f}" for value in means))
    return table


# ------------------------------------------------------------------------------------------------
# The pictures: 5.5 inches wide with type of 10 points or more, to be read on a phone


def figure(rows: int, height: float) -> tuple[Any, list[Any]]:
    """Panels one above the other."""
    plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})
    fig, axes = plt.subplots(rows, 1, figsize=(5.5, height), dpi=200, layout="constrained")
    return fig, list(np.atleast_1d(axes))


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
    axes[0].legend(frameon=False)
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
    axes[0].legend(frameon=False, loc="lower right")
    fig.savefig(path)
    plt.close(fig)


def draw_names(results: dict[str, Any], path: Path) -> None:
    """A dozen emoji in a style never trained on, and the names found by the first two losses."""
    runs = [runs[0] for runs in list(by_loss(results).values())[:2]]
    folder = Path(results["emoji"] or EMOJI_FOLDER)
    wanted = {shown["code"] for shown in runs[0]["results"]["shown"]}
    images = {
        sample.info["concept"]: decode(sample.image, 64).transpose(1, 2, 0)
        for sample in read_samples([str(folder / f"{SHOWN_STYLE}.tar.xz")])
        if sample.info["concept"] in wanted
    }
    lines = (len(wanted) + 1) // 2
    fig, axes = plt.subplots(
        lines, 4, figsize=(5.5, 1.05 * lines + 0.65), dpi=200, width_ratios=[1, 1.9, 1, 1.9]
    )
    cells = np.atleast_2d(axes).reshape(-1, 2)
    for left, right in cells:
        left.axis("off")
        right.axis("off")
    for k, ((left, right), shown) in enumerate(
        zip(cells, runs[0]["results"]["shown"], strict=False)
    ):
        left.imshow(images[shown["code"]], interpolation="bilinear")
        y = 1.0
        for text, colour, weight in name_lines(shown["name"], runs, k):
            right.text(0, y, text, color=colour, weight=weight, fontsize=9.5, va="top")
            y -= 0.2 * (text.count("\n") + 1) + 0.05
    losses = " and ".join(TITLES[run["config"]["loss"]] for run in runs)
    fig.suptitle(f"What {losses} call an emoji\nin a style never trained on", fontsize=12)
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


def show(out: Path, console: Console) -> None:
    """Prints the table of `out/results.json` and saves it and the pictures beside it."""
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    table = make_table(results)
    console.print(table)
    with open(out / "table.txt", "w", encoding="utf-8") as file:
        Console(file=file, width=120).print(table)
    for name, draw in PICTURES.items():
        draw(results, out / name)
    console.print(f"pictures: {', '.join(str(out / name) for name in PICTURES)}", soft_wrap=True)
    console.print(f"numbers:  {out / 'results.json'}, {out / 'table.txt'}", soft_wrap=True)


def main(argv: Sequence[str]) -> None:
    """`python -m reference_train report FOLDER`."""
    parser = argparse.ArgumentParser(
        prog="python -m reference_train report",
        description="Makes the table and the pictures again from FOLDER/results.json.",
    )
    parser.add_argument(
        "folder", type=Path, metavar="FOLDER", help="an --out folder of earlier runs"
    )
    folder = parser.parse_args(argv).folder
    if not (folder / "results.json").is_file():
        raise CannotStart(f"report: no results.json in {folder}")
    show(folder, Console())
