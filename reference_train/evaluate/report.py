"""The table, the JSON and the picture."""

import argparse
import json
import platform
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from ..files import written_whole
from .checkpoints import Clip
from .datasets import DataSet
from .metrics import KS
from .paper import ORIGINS, PUBLISHED

matplotlib.use("Agg")  # files only: no display needed
from matplotlib import pyplot as plt

RECALLS = {
    f"{start}_r{k}": f"{words}, R@{k}"
    for start, words in (("image_to_text", "image → text"), ("text_to_image", "text → image"))
    for k in (1, 5, 10)
}
SHARES = {  # in %, the higher the better
    "top1": "zero-shot top-1",
    "top5": "zero-shot top-5",
    "coarse": "superclass right",
    "fine": "right within the superclass",
    **{f"consistency_{k}": f"consistency score, k = {k}" for k in KS},
    "linear_probe": "linear probe",
    "subgroup_top1": "subgroup, zero-shot top-1",
    "subgroup_top5": "subgroup, zero-shot top-5",
    **{f"subgroup_consistency_{k}": f"subgroup, consistency score, k = {k}" for k in KS},
    **RECALLS,
}
GEOMETRY = {  # the lower the better
    "alignment": ("alignment", 1),
    "image_uniformity": ("image uniformity", 1),
    "text_uniformity": ("text uniformity", 1),
    "inmodal_gap": ("in-modal gap × 100", 100),
    "crossmodal_gap": ("cross-modal gap × 100", 100),
}
GROUPS_SHOW = ("top1", "top5", "subgroup_top1", "image_to_text_r1", "text_to_image_r1")
COLOURS = ("#e4572e", "#2a9d8f", "#8e5ea2", "#e9b44c", "#1f77b4", "#1b8a4b")
PAPER_COLOURS = {"CLIP, paper": "#c3cad1", "CyCLIP, paper": "#5b6b7b"}
PANELS = {
    "top1": "zero-shot top-1, %",
    "consistency_1": "consistency score, k = 1, %",
    "image_to_text_r1": "image → text, R@1, %",
}
SHOWN_OF_A_LINE = 4  # rows of which the table names a group


def start(arguments: argparse.Namespace, command: str) -> dict[str, Any]:
    """What is known before anything is computed."""
    packages = ("torch", "torchvision", "open_clip_torch")
    device = torch.device(arguments.device)
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


def table_rows(result: dict[str, Any]) -> list[tuple[str, list[tuple[str, ...]]]]:
    """(data set, rows) of cells: metric, one for each checkpoint, the paper's CLIP and CyCLIP."""
    tables = []
    for name in result["data_sets"]:
        of_models = [found.get(name) for found in result["results"].values()]
        if not any(of_models):
            continue
        rows = []
        for metric, (words, factor) in metric_titles().items():
            cells = [cell(m and m["numbers"].get(metric), factor) for m in of_models]
            paper = paper_cells(name, metric)
            if any(cells) or any(paper):
                rows.append((words, *cells, *paper))
        for group in result["data_sets"][name]["groups"]:
            for metric in GROUPS_SHOW:
                words, factor = metric_titles()[metric]
                cells = [cell(m and m["groups"][group].get(metric), factor) for m in of_models]
                if any(cells):
                    rows.append((f"{group}: {words}", *cells, "", ""))
        tables.append((name, rows))
    return tables


def metric_titles() -> dict[str, tuple[str, float]]:
    """Metric -> its words and the factor that its numbers are shown with."""
    return {**{metric: (words, 100.0) for metric, words in SHARES.items()}, **GEOMETRY}


def cell(value: float | None, factor: float) -> str:
    """A number with as many digits as say something."""
    return "" if value is None else f"{factor * value:.2f}"


def paper_cells(name: str, metric: str) -> tuple[str, str]:
    """The paper's two numbers, each with the first letter of its origin."""
    if (published := PUBLISHED.get((name, metric))) is None:
        return "", ""
    mark = published.origin[0]
    return f"{published.clip:.2f} {mark}", f"{published.cyclip:.2f} {mark}"


def notes(result: dict[str, Any]) -> list[str]:
    """What stands under the table."""
    text = [
        "In %, but for alignment, uniformity and gaps, where lower is better.",
        "Paper: Goel et al. 2022, RN50 on CC3M; "
        + "; ".join(f"{origin[0]}: {words}" for origin, words in ORIGINS.items())
        + ".",
    ]
    for name, data in result["data_sets"].items():
        if data["mean_over"]:
            text.append(f"{name}: mean over {', '.join(data['mean_over'])}.")
    text += [f"Skipped: {name}: {why}." for name, why in result["skipped"].items()]
    return text


def as_markdown(result: dict[str, Any]) -> str:
    """`table.md`."""
    heads = ["", *result["results"], "CLIP, paper", "CyCLIP, paper"]
    out = [f"# Evaluation of {result['date']}", "", f"    {result['command']}", ""]
    for name, rows in table_rows(result):
        out += [f"## {headline(result, name)}", ""]
        out += ["| " + " | ".join(heads) + " |", "|---" + "|---:" * (len(heads) - 1) + "|"]
        out += ["| " + " | ".join(row) + " |" for row in rows] + [""]
    return "\n".join([*out, *(f"- {note}" for note in notes(result))]) + "\n"


def headline(result: dict[str, Any], name: str) -> str:
    """A data set with its sizes."""
    data = result["data_sets"][name]
    sizes = [f"{data['images']:,} images"]
    sizes += [f"{n:,} {'classes' if q == 'class' else q + 's'}" for q, n in data["classes"].items()]
    if data["templates"]:
        sizes.append(f"{data['templates']} templates")
    if data["captions"]:
        sizes.append(f"{data['captions']:,} captions")
    return f"{name} ({', '.join(sizes)})"


def show(result: dict[str, Any], console: Console) -> None:
    """The table on the terminal."""
    for name, rows in table_rows(result):
        table = Table(title=headline(result, name), title_justify="left", title_style="bold")
        table.add_column("")
        for title in [*result["results"], "CLIP, paper", "CyCLIP, paper"]:
            table.add_column(title, justify="right")
        for row in rows:
            table.add_row(*row)
        console.print(table)
    for note in notes(result):
        console.print(note, highlight=False)


def bars(result: dict[str, Any], metric: str) -> tuple[list[str], dict[str, list[float]]]:
    """The data sets that have a metric, and each column's numbers in %, NaN where it has none."""
    found = result["results"]
    names = [
        name
        for name in result["data_sets"]
        if any(metric in of.get(name, {"numbers": {}})["numbers"] for of in found.values())
    ]
    columns = {
        title: [100 * of.get(n, {"numbers": {}})["numbers"].get(metric, np.nan) for n in names]
        for title, of in found.items()
    }
    published = [PUBLISHED.get((name, metric)) for name in names]
    if any(published):
        columns["CLIP, paper"] = [p.clip if p else np.nan for p in published]
        columns["CyCLIP, paper"] = [p.cyclip if p else np.nan for p in published]
    return names, columns


def draw(result: dict[str, Any], path: Path) -> None:
    """Yours beside the paper's; 5.5 inches wide, to be read on a phone."""
    panels = {metric: bars(result, metric) for metric in PANELS}
    panels = {metric: panel for metric, panel in panels.items() if panel[0]}
    if not panels:
        return
    colours = {t: COLOURS[i % len(COLOURS)] for i, t in enumerate(result["results"])}
    colours |= PAPER_COLOURS
    heights = [
        0.9 + 0.17 * sum(np.isfinite(v).sum() for v in c.values()) + 0.2 * len(names)
        for names, c in panels.values()
    ]
    plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})
    fig, axes = plt.subplots(
        len(panels),
        1,
        figsize=(5.5, 0.5 + sum(heights)),
        dpi=200,
        layout="constrained",
        height_ratios=heights,
        squeeze=False,
    )
    handles: dict[str, Any] = {}
    for ax, (metric, (names, columns)) in zip(axes[:, 0], panels.items(), strict=True):
        y, ticks = 0.0, []
        for place in range(len(names)):
            first = y
            for title, values in columns.items():
                if np.isfinite(values[place]):
                    drawn = ax.barh(y, values[place], 0.9, color=colours[title])
                    ax.bar_label(drawn, fmt="%.1f", padding=3, fontsize=9)
                    handles.setdefault(title, drawn)
                    y += 1
            ticks.append((first + y - 1) / 2)
            y += 0.8
        ax.set_yticks(ticks, names)
        ax.set_ylim(y - 0.8, -0.7)
        ax.margins(x=0.12)  # room for the numbers
        ax.set_title(PANELS[metric], loc="left")
    fig.legend(
        handles.values(),
        handles.keys(),
        frameon=False,
        loc="outside upper center",
        ncols=2,
        handlelength=1.2,
    )
    fig.savefig(path, format="png")
    plt.close(fig)


def write(result: dict[str, Any], out: Path, console: Console) -> None:
    """`evaluation.json`, `table.md` and `picture.png`, and the table on the terminal."""
    with written_whole(out / "evaluation.json") as path:
        path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    with written_whole(out / "table.md") as path:
        path.write_text(as_markdown(result), encoding="utf-8")
    with written_whole(out / "picture.png") as path:
        draw(result, path)
    show(result, console)
    console.print(f"\nWritten to {out}", highlight=False)
