"""What is written: `evaluation.json`, `table.md` and `picture.png`."""

import argparse
import platform
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib import pyplot as plt
from rich.console import Console
from rich.markdown import Markdown

from ..figures import panels
from ..files import write_json, write_text, written_whole
from .checkpoints import Clip
from .datasets import DataSet
from .metrics import KS
from .paper import ORIGINS, PUBLISHED

METRICS: dict[str, tuple[str, float]] = {  # words in the table, factor of the number there
    "top1": ("zero-shot top-1", 100),
    "top5": ("zero-shot top-5", 100),
    "coarse": ("superclass", 100),
    "fine": ("within the superclass", 100),
    **{f"consistency_{k}": (f"consistency score, k = {k}", 100) for k in KS},
    "linear_probe": ("linear probe", 100),
    "subgroup_top1": ("subgroup top-1", 100),
    "subgroup_top5": ("subgroup top-5", 100),
    **{f"subgroup_consistency_{k}": (f"subgroup consistency, k = {k}", 100) for k in KS},
    **{f"image_to_text_r{k}": (f"image → text, R@{k}", 100) for k in (1, 5, 10)},
    **{f"text_to_image_r{k}": (f"text → image, R@{k}", 100) for k in (1, 5, 10)},
    "alignment": ("alignment", 1),
    "image_uniformity": ("image uniformity", 1),
    "text_uniformity": ("text uniformity", 1),
    "inmodal_gap": ("in-modal gap × 100", 100),
    "crossmodal_gap": ("cross-modal gap × 100", 100),
}
OF_GROUPS = ("top1", "subgroup_top1", "image_to_text_r1", "text_to_image_r1")  # in the table
PANELS = ("top1", "consistency_1", "image_to_text_r1")  # of the picture
PAPER_TITLES = ("CLIP, paper", "CyCLIP, paper")
PAPER_COLOURS = dict(zip(PAPER_TITLES, ("#c3cad1", "#5b6b7b"), strict=True))
NEEDS = {  # metrics that the paper has and you may lack
    "coarse": "superclasses need --superclasses",
    "consistency_1": "the consistency score needs a train split",
    "linear_probe": "the linear probe needs --linear-probe and a train split",
}


def start(arguments: argparse.Namespace, command: str) -> dict[str, Any]:
    """What is known before anything is computed."""
    packages = ("torch", "torchvision", "open_clip_torch")
    device = arguments.device
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command,
        "versions": {"python": platform.python_version(), **{p: version(p) for p in packages}},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "precision": arguments.precision,
        "checkpoints": [],
        "data_sets": {},
        "skipped": {},
        "results": {},
    }


def describe(data: DataSet) -> dict[str, Any]:
    """A data set in numbers."""
    groups = {group: (data.groups or []).count(group) for group in dict.fromkeys(data.groups or [])}
    return {
        "images": len(data.images),
        "train_images": len(data.train[0]) if data.train else 0,
        "classes": {q or "class": len(c.names) for q, c in data.classes.items()},
        "templates": max((len(c.templates) for c in data.classes.values()), default=0),
        "captions": sum(map(len, data.captions or [])),
        "groups": groups,
        "mean_over": [g for g in groups if g not in data.apart] if data.across_groups else [],
    }


def describe_checkpoint(clip: Clip) -> dict[str, Any]:
    """Where a column comes from."""
    checkpoint = clip.checkpoint
    return {
        "title": checkpoint.title,
        "model": checkpoint.model,
        "path": str(checkpoint.path) if checkpoint.path else checkpoint.tag,
        "epoch": clip.epoch,
    }


def markdown(result: dict[str, Any]) -> str:
    """`table.md`: a table for each data set, and notes."""
    out = [f"# Evaluation of {result['date']}", "", f"    {result['command']}", ""]
    notes = [
        "In %, but for alignment, uniformity and gaps, where lower is better.",
        "Paper: Goel et al. 2022, RN50 on CC3M; "
        + "; ".join(f"{origin[0]}: {words}" for origin, words in ORIGINS.items())
        + ".",
    ]
    for name, data in result["data_sets"].items():
        columns = {title: found.get(name) for title, found in result["results"].items()}
        if not any(columns.values()):
            continue
        paper = {m: p for m in METRICS if (p := PUBLISHED.get((name, m)))}
        rows = [
            [words, *(cell(c, "numbers", metric) for c in columns.values())]
            + [f"{number:.2f} {p.origin[0]}" for p in [paper.get(metric)] if p for number in p[:2]]
            for metric, (words, _) in METRICS.items()
        ]
        rows += [
            [f"{group}: {METRICS[metric][0]}", *(cell(c, group, metric) for c in columns.values())]
            for group in data["groups"]
            for metric in OF_GROUPS
        ]
        heads = ["", *columns, *(PAPER_TITLES if paper else ())]
        out += [f"## {name}: {sizes(data)}", ""]
        out += [f"| {' | '.join(heads)} |", "|---" + "|---:" * (len(heads) - 1) + "|"]
        for row in rows:
            if any(row[1:]):
                out.append(f"| {' | '.join(row + [''] * (len(heads) - len(row)))} |")
        out.append("")
        if data["mean_over"]:
            notes.append(f"{name}: the mean over {', '.join(data['mean_over'])}.")
        notes += [
            f"{name}: {why}."
            for metric, why in NEEDS.items()
            if metric in paper and not any(cell(c, "numbers", metric) for c in columns.values())
        ]
    notes += [f"Skipped: {name}: {why}." for name, why in result["skipped"].items()]
    return "\n".join([*out, *(f"- {note}" for note in notes)]) + "\n"


def cell(found: dict[str, Any] | None, where: str, metric: str) -> str:
    """A number of a checkpoint on a data set, or on a group of it; empty if there is none."""
    numbers = {} if found is None else {**found["groups"], "numbers": found["numbers"]}[where]
    return f"{METRICS[metric][1] * numbers[metric]:.2f}" if metric in numbers else ""


def sizes(data: dict[str, Any]) -> str:
    """A data set in words."""
    counts = {"images": data["images"], "train images": data["train_images"]}
    counts |= {"classes" if q == "class" else f"{q}s": n for q, n in data["classes"].items()}
    counts |= {"templates": data["templates"], "captions": data["captions"]}
    return ", ".join(f"{count:,} {what}" for what, count in counts.items() if count)


def draw(result: dict[str, Any], path: Path) -> None:
    """Yours beside the paper's; 5.5 inches wide, to be read on a phone."""
    titles = [*result["results"], *PAPER_TITLES]
    several = matplotlib.colormaps["tab10" if len(titles) <= 10 else "tab20"]
    colours = {title: several(i % several.N) for i, title in enumerate(titles)} | PAPER_COLOURS
    shown_sets = {metric: panel for metric in PANELS if (panel := bars(result, metric))}
    heights = [
        0.9 + sum(0.2 + 0.17 * len(of) for of in panel.values()) for panel in shown_sets.values()
    ]
    fig, axes = panels(max(1, len(heights)), 1 + sum(heights), height_ratios=heights or None)
    handles: dict[str, Any] = {}
    for ax, (metric, panel) in zip(axes, shown_sets.items(), strict=False):
        y, ticks = 0.0, []
        for of_set in panel.values():
            ticks.append(y + (len(of_set) - 1) / 2)
            for title, value in of_set.items():
                drawn = ax.barh(y, value, 0.9, color=colours[title])
                ax.bar_label(drawn, fmt="%.1f", padding=3, fontsize=9)
                handles.setdefault(title, drawn)
                y += 1
            y += 0.8
        ax.set_yticks(ticks, list(panel))
        ax.set_ylim(y - 1.1, -0.7)
        ax.margins(x=0.12)  # room for the numbers
        ax.set_title(f"{METRICS[metric][0]}, %", loc="left")
    shown = [title for title in titles if title in handles]
    fig.legend(
        [handles[title] for title in shown],
        shown,
        frameon=False,
        loc="outside upper center",
        ncols=2,
        handlelength=1.2,
    )
    fig.savefig(path, format="png")
    plt.close(fig)


def bars(result: dict[str, Any], metric: str) -> dict[str, dict[str, float]]:
    """data set -> column -> the metric in %, where you have it."""
    panel: dict[str, dict[str, float]] = {}
    for name in result["data_sets"]:
        for title, found in result["results"].items():
            value = found.get(name, {"numbers": {}})["numbers"].get(metric)
            if value is not None:
                panel.setdefault(name, {})[title] = 100 * value
        if name in panel and (paper := PUBLISHED.get((name, metric))):
            panel[name] |= dict(zip(PAPER_TITLES, paper[:2], strict=True))
    return panel


def write(result: dict[str, Any], out: Path, console: Console) -> None:
    """The three files, and the table on the terminal."""
    table = markdown(result)
    write_json(result, out / "evaluation.json")
    write_text(table, out / "table.md")
    with written_whole(out / "picture.png") as path:
        draw(result, path)
    console.print(Markdown(table))
    console.print(f"\nWritten to {out}", highlight=False)
