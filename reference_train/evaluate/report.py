"""Reads, merges and writes evaluations (`evaluation.json`), and makes their table and figures.

`python -m reference_train report FOLDER ...` makes them again, or one table of several folders.
"""

import base64
import contextlib
import json
import math
import platform
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from textwrap import indent
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from rich.console import Console
from rich.markdown import Markdown

from ..command_line import Parser, UsageError
from ..files import check_writable, locked, write_text
from ..losses import LOSSES
from . import figures, paper
from .datasets import Dataset
from .metrics import CONSISTENCY_NEIGHBOURS, RECALL_AT, SUPERCLASS_TOP, TOP, distinct_texts, top

Result = dict[str, Any]  # what evaluation.json holds
PARTS = ("checkpoints", "data_sets", "failed", "absent", "results")
# Endings of the metrics that table.md shows for each group.
GROUP_ENDINGS = ("top1", "_r1")
# Endings of the metrics that the terminal shows.
SHORT_ENDINGS = (*GROUP_ENDINGS, "consistency_1", "linear_probe", "_gap", "_correlation")
# Published metrics that our runs may lack -> what our runs would need.
REQUIREMENTS = {
    "consistency_1": "the consistency score needs a train split",
    "linear_probe": "the linear probe needs --linear-probe and a train split",
}
BAR_METRICS = ("top1", "subgroup_top1", "image_to_text_r1", "consistency_1")
UNKNOWN_LOSS, PUBLISHED_COLOUR = "#8fa9c4", "#c3cad1"  # colours of bars
MAX_MODELS = 4  # whose similarities are drawn for a dataset
HOW_TO_READ = (
    "All numbers are in %, except alignment, uniformity, gaps and correlations. Alignment, "
    "uniformity and gaps are better if lower; correlations are higher if the model is more "
    "consistent. In brackets: the 95% interval (Wilson) of one run, or the lowest and the highest "
    "of several runs, whose number is in the heading. chance: the accuracy of guessing. n: the "
    "number of queries."
)


# Evaluations.


def start(out: Path, settings: dict[str, Any], command: str, device: torch.device) -> Result:
    """Returns the evaluation that a folder holds, or a new one.

    settings: the settings that the numbers depend on.

    Raises `UsageError` if the folder's evaluation has other settings, or the folder cannot be
    written.
    """
    check_writable(out)
    if (out / "evaluation.json").exists():
        result = read_evaluation(out)
        for name, wanted in settings.items():
            stored = result["settings"].get(name)
            if stored != wanted:
                what = f"--out {out}: holds an evaluation with {name} = {stored}, not {wanted}"
                raise UsageError(f"{what}: choose another --out")
        # A dict keeps the order of the commands, and each command once.
        commands = dict.fromkeys([*result["command"].splitlines(), command])
        return result | {"command": "\n".join(commands)}
    packages = ("torch", "torchvision", "open_clip_torch")
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command,
        "versions": {"python": platform.python_version(), **{p: version(p) for p in packages}},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "settings": settings,
        **{part: {} for part in PARTS},
    }


def read_evaluation(path: Path) -> Result:
    """Reads an evaluation.json. path: the file or its folder. Raises `UsageError`."""
    file = path / "evaluation.json" if path.is_dir() else path
    try:
        result: Result = json.loads(file.read_text(encoding="utf-8"))
        if not all(isinstance(result[part], dict) for part in PARTS):
            raise ValueError("no results")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{file} is no evaluation.json: {error!r}") from error
    return result


def save(result: Result, out: Path) -> None:
    """Writes `evaluation.json` to a folder."""
    out.mkdir(parents=True, exist_ok=True)
    write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", out / "evaluation.json")


def merge(records: Sequence[tuple[str, Result]], only: Sequence[str] | None) -> Result:
    """Merges several evaluations into one.

    records: names and evaluations. If two evaluations have runs of the same title with other
    weights or other numbers, the name is added to the title. only: the names of the datasets to
    keep; None: all.

    Raises `UsageError` if evaluations have different datasets under one name.
    """
    evaluations = [result for _, result in records]
    merged = {**evaluations[-1], **{part: {} for part in (*PARTS, "history")}}
    merged["command"] = "\n".join(result["command"] for result in evaluations)
    for key in ("versions", "device", "settings"):
        merged[key] = value_or_values(result[key] for result in evaluations)
    for record, result in records:
        for name, data in result["data_sets"].items():
            if only is not None and name not in only:
                continue
            earlier = merged["data_sets"].setdefault(name, data)
            if (earlier["images"], earlier["classes"]) != (data["images"], data["classes"]):
                why = f"{name} is another dataset there: leave it out with --only"
                raise UsageError(f"{record}: {why}")
        for run, results in result["results"].items():
            checkpoint, earlier = result["checkpoints"][run], merged["results"].get(run, {})
            same_weights = have_same_weights(merged["checkpoints"].get(run, checkpoint), checkpoint)
            common = earlier.keys() & results.keys()
            same_numbers = all(earlier[x]["numbers"] == results[x]["numbers"] for x in common)
            title = run if same_weights and same_numbers else f"{record}-{run}"
            merged["results"].setdefault(title, {}).update(results)
            merged["checkpoints"][title] = checkpoint
            if run in result.get("history", {}):
                merged["history"][title] = result["history"][run]
        for part in ("failed", "absent"):
            merged[part] |= result[part]
    return merged


def value_or_values(values: Iterable[Any]) -> Any:
    """The value, if all are equal, else a list of the different ones."""
    different: list[Any] = []
    for value in values:
        if value not in different:
            different.append(value)
    return different[0] if len(different) == 1 else different


def have_same_weights(first: dict[str, Any], second: dict[str, Any]) -> bool:
    """Whether two entries of "checkpoints" are of the same weights.

    A file is known by the time it was written, so it may have been moved.
    """
    key = "written" if "written" in first or "written" in second else "path"
    return all(first.get(name) == second.get(name) for name in ("model", key))


def describe(data: Dataset) -> dict[str, Any]:
    """The entry of a dataset in evaluation.json: its sizes, groups and superclasses."""
    groups = dict(Counter(data.groups or []))
    captions = data.captions or []
    if data.groups and not captions:  # class names are used as captions
        captions = [[str(label)] for label in data.classes[""].labels.tolist()]
    return {
        "images": len(data.images),
        "train_images": len(data.train[0]) if data.train else 0,
        "classes": {task or "class": len(c.names) for task, c in data.classes.items()},
        "templates": max((len(c.templates) for c in data.classes.values()), default=0),
        "captions": sum(map(len, captions)),
        "texts": len(distinct_texts(captions)[0]),
        "groups": groups,
        "mean_over": [group for group in groups if group not in data.excluded_groups],
    }


# Metrics, runs and their numbers.


class Metric(NamedTuple):
    """A row of the table. An accuracy is the share of queries with a right answer among k."""

    title: str
    # What an answer is: "class", "superclass", "text" or "image"; "": the metric is no accuracy.
    kind: str
    task: str = ""  # the key in `Dataset.classes`
    k: int = 1


# The metrics that do not belong to a task.
COMMON = {
    "linear_probe": Metric("linear probe", "class"),
    **{f"image_to_text_r{k}": Metric(f"image → text, R@{k}", "text", k=k) for k in RECALL_AT},
    **{f"text_to_image_r{k}": Metric(f"text → image, R@{k}", "image", k=k) for k in RECALL_AT},
    "alignment": Metric("alignment", ""),
    "image_uniformity": Metric("image uniformity", ""),
    "text_uniformity": Metric("text uniformity", ""),
    "inmodal_gap": Metric("in-modal gap × 100", ""),
    "inmodal_correlation": Metric("in-modal correlation", ""),
    "crossmodal_gap": Metric("cross-modal gap × 100", ""),
    "crossmodal_correlation": Metric("cross-modal correlation", ""),
}


def metrics_of(data: dict[str, Any]) -> dict[str, Metric]:
    """The metrics that a dataset may have, in the order of the table."""
    found: dict[str, Metric] = {}
    for name in data["classes"]:
        task = "" if name == "class" else name
        prefix, label = (f"{task}_", f"{task} ") if task else ("", "")
        for k in TOP:
            title = f"{label or 'zero-shot '}top-{k}"
            found[f"{prefix}top{k}"] = Metric(title, "class", task, k)
        for metric, words in (("coarse", "superclass"), ("fine", "within the superclass")):
            for k in SUPERCLASS_TOP:
                title = f"{label}{words}" if k == 1 else f"{label}{words}, top-{k}"
                found[prefix + top(metric, k)] = Metric(title, "superclass")
        for k in CONSISTENCY_NEIGHBOURS:
            title = f"{label}consistency score, k = {k}"
            found[f"{prefix}consistency_{k}"] = Metric(title, "class", task)
    return found | COMMON


class Column(NamedTuple):
    """A column of the table: runs that differ in their seed only."""

    title: str
    loss: str | None  # a key of LOSSES
    runs: list[str]  # titles


def columns(result: Result) -> list[Column]:
    """The columns of the table: CLIP, other losses, then runs whose loss is not known.

    Runs are called [SERIES-]LOSS-SEED or SERIES-SEED.
    """
    found: dict[tuple[bool, str, int], Column] = {}
    for title in result["results"]:
        loss, seed = (result["checkpoints"][title][key] for key in ("loss", "seed"))
        series = title if seed is None else title.removesuffix(f"-{seed}")
        if loss is not None:
            series = series.removesuffix(loss).removesuffix("-")
        heading = series if loss is None else f"{series} {LOSSES[loss].title}".strip()
        # Numbers are compared by value, so that 64 comes before 512.
        order = re.sub(r"\d+(\.\d+)?", lambda number: f"{float(number[0]):015.4f}", series)
        sort_key = (loss is None, order, list(LOSSES).index(loss) if loss else 0)
        found.setdefault(sort_key, Column(heading, loss, [])).runs.append(title)
    return [found[sort_key] for sort_key in sorted(found)]


def summarise(result: Result) -> pd.DataFrame:
    """The numbers of an evaluation: mean, lowest, highest and count of the runs of a column.

    The index is the dataset, the group ("" for all images), the metric and the column's title. The
    bounds of an accuracy of a single run are its 95% interval.
    """
    cells = ["dataset", "group", "metric", "column"]
    metrics = {name: metrics_of(data) for name, data in result["data_sets"].items()}
    values = pd.DataFrame(
        [
            (name, group, metric, column.title, value)
            for column in columns(result)
            for run in column.runs
            for name, measured in result["results"][run].items()
            if name in metrics
            for group, numbers in {"": measured["numbers"], **measured["groups"]}.items()
            for metric, value in numbers.items()
            if metric in metrics[name]
        ],
        columns=[*cells, "value"],
    )
    summary = values.groupby(cells, sort=False)["value"].agg(["mean", "min", "max", "count"])
    for cell, value in summary[summary["count"] == 1]["mean"].items():
        name, group, metric, _ = cell
        if metrics[name][metric].kind:
            count = num_queries(result, name, metric, group)
            summary.loc[cell, ["min", "max"]] = wilson(value, count)
    return summary


def num_queries(result: Result, name: str, metric: str, group: str = "") -> int:
    """The number of queries of an accuracy.

    Images that cannot be read do not count, except in groups and among the captions of retrieval.
    If the accuracy is a mean over styles, each concept counts once, because its drawings are alike.
    """
    data = result["data_sets"][name]
    if group or data["mean_over"]:
        return max(data["groups"][style] for style in ([group] if group else data["mean_over"]))
    if metrics_of(data)[metric].kind == "image":
        return int(data["captions"])
    return max(run[name]["images"] for run in result["results"].values() if name in run)


def wilson(share: float, count: float) -> tuple[float, float]:
    """The 95% interval (Wilson 1927) of a share of `count` trials."""
    z2 = 1.96**2
    centre = share + z2 / (2 * count)
    half = math.sqrt(z2 * (share * (1 - share) / count + z2 / (4 * count**2)))
    return (centre - half) / (1 + z2 / count), (centre + half) / (1 + z2 / count)


def chance(data: dict[str, Any], metric: str) -> float | None:
    """The accuracy of guessing; None if it is not known."""
    _, kind, task, k = metrics_of(data)[metric]
    if kind == "class":
        return float(min(1.0, k / data["classes"][task or "class"]))
    if kind not in ("text", "image"):
        return None
    styles = [data["groups"][style] for style in data["mean_over"]]
    images = sum(styles) / len(styles) if styles else data["images"]
    pairs = images * data["captions"] / data["images"]
    texts = min(pairs, data["texts"])
    right, candidates = (pairs / images, texts) if kind == "text" else (pairs / texts, images)
    return chance_of_any(right, candidates, k)


def chance_of_any(right: float, candidates: float, k: int) -> float:
    """The probability that k random candidates include at least one of the `right` ones."""
    all_wrong = 1.0
    for i in range(k):
        all_wrong *= max(0.0, candidates - right - i) / max(1.0, candidates - i)
    return 1 - all_wrong


def comparable(
    name: str, data: dict[str, Any], measured: Sequence[str]
) -> tuple[list[paper.Published], list[str]]:
    """The published numbers that are shown for a dataset, and notes.

    Metrics that our runs do not have are shown only from the paper. Numbers that cannot be compared
    with ours are not shown.

    measured: the metrics that our runs have.
    """
    rows: list[paper.Published] = []
    notes: dict[str, None] = {}  # a dict keeps their order, and each note once
    for row in paper.published(name):
        if row.metric not in measured:
            if requirement := REQUIREMENTS.get(row.metric):
                notes[f"{name}: {requirement}."] = None
            if row.source != "paper":
                continue
        if reason := paper.why_incomparable(name, data, row.metric):
            notes[f"{name}: published numbers are not shown: {reason}."] = None
            continue
        rows.append(row)
        if row.note:
            title = metrics_of(data)[row.metric].title
            notes[rf"\* {name}, {title}, {row.source}: {row.note}."] = None
    if not rows:  # without published numbers, nobody misses a metric in our runs
        notes = {note: None for note in notes if "not shown" in note}
    return rows, list(notes)


# The table.


def markdown(result: Result, short: bool = False) -> str:
    """The text of `table.md`: failures, a table for each dataset, notes.

    short: headline metrics only.
    """
    summary = summarise(result)
    lines = [f"# Evaluation of {result['date']}", "", indent(result["command"], "    "), ""]
    lines += [f"- **Failed: {name}: {why}**" for name, why in result["failed"].items()]
    notes, sources = [HOW_TO_READ], dict[str, None]()
    for name, data in result["data_sets"].items():
        found = {metric for x, group, metric, _ in summary.index if (x, group) == (name, "")}
        if not found:
            continue
        measured = [metric for metric in metrics_of(data) if metric in found]
        rows, published_notes = comparable(name, data, measured)
        lines += dataset_table(result, summary, name, measured, rows, short)
        sources |= dict.fromkeys(row.source for row in rows)
        notes += published_notes
        if data["mean_over"]:
            notes.append(f"{name}: the mean over {', '.join(data['mean_over'])}.")
        runs = [run[name] for run in result["results"].values() if name in run]
        if unreadable := sorted({why for run in runs for why in run["unreadable"]}):
            count = len(unreadable)
            notes.append(f"{name}: {count} unreadable, left out: {'; '.join(unreadable)}.")
    notes += [f"{source}: {paper.SOURCES[source]}." for source in sources]
    if sources:
        notes.append("; ".join(f"{mark}: {words}" for mark, words in paper.MARKS.items()) + ".")
    notes += [f"Not evaluated: {name}: {why}." for name, why in result["absent"].items()]
    return "\n".join([*lines, "", *(f"- {note}" for note in notes)]) + "\n"


def dataset_table(
    result: Result,
    summary: pd.DataFrame,
    name: str,
    measured: Sequence[str],
    published: Sequence[paper.Published],
    short: bool,
) -> list[str]:
    """The lines of a dataset's table."""
    data, our_columns = result["data_sets"][name], columns(result)
    published_columns = dict.fromkeys((row.source, x) for row in published for x in row.percent)
    published_rows = {(row.source, row.metric): row for row in published}
    metrics = metrics_of(data)
    headings = [
        "",
        *(f"{x.title} ({len(x.runs)})" if len(x.runs) > 1 else x.title for x in our_columns),
        *(f"{model}, {source}" for source, model in published_columns),
        "chance",
        "n",
    ]
    lines = ["", f"## {name}: {sizes(data)}", "", f"| {' | '.join(headings)} |"]
    lines += ["|---" + "|---:" * (len(headings) - 1) + "|"]
    shown = {*measured, *(row.metric for row in published)}
    wanted = [(key, "") for key in metrics if key in shown]
    wanted += [
        (key, group) for group in data["groups"] for key in measured if key.endswith(GROUP_ENDINGS)
    ]
    for key, group in wanted:
        if short and (group or not key.endswith(SHORT_ENDINGS)):
            continue
        metric = metrics[key]
        cells = [f"{group}: {metric.title}" if group else metric.title]
        for column in our_columns:
            where = (name, group, key, column.title)
            cells.append(cell(summary.loc[where], metric) if where in summary.index else "")
        for source, model in published_columns:
            row = None if group else published_rows.get((source, key))
            if row is None or model not in row.percent:
                cells.append("")
            else:
                cells.append(f"{row.percent[model]:.2f} {row.mark}{'*' if row.note else ''}")
        # The chance of retrieval depends on the group, and is known for the whole dataset only.
        has_chance = not (group and metric.kind in ("text", "image"))
        guess = chance(data, key) if has_chance else None
        cells.append("" if guess is None else f"{100 * guess:.{digits(guess)}f}")
        cells.append(f"{num_queries(result, name, key, group):,}" if metric.kind else "")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def digits(share: float) -> int:
    """How many decimals a share has, if it is shown in %."""
    return 1 if share >= 0.1 else 2


def cell(bounded: pd.Series, metric: Metric) -> str:
    """A cell of the table: the mean, and its bounds in brackets."""
    scale, decimals = (100, digits(bounded["mean"])) if metric.kind else (1, 2)
    if "× 100" in metric.title:
        scale = 100
    value, low, high = (f"{scale * bounded[key]:.{decimals}f}" for key in ("mean", "min", "max"))
    if metric.kind:
        return f"{value} ({low}–{high})"
    return value if bounded["min"] == bounded["max"] else f"{value} ({low} to {high})"


def sizes(data: dict[str, Any]) -> str:
    """The sizes of a dataset in words: images, classes, templates and texts."""
    counts = {"images": data["images"], "train images": data["train_images"]}
    for task, count in data["classes"].items():
        counts["classes" if task == "class" else f"{task}s"] = count
    counts |= {"templates": data["templates"], "texts": data["texts"]}
    return ", ".join(f"{count:,} {what}" for what, count in counts.items() if count)


# The figures.


def bar_panels(result: Result) -> list[figures.Panel]:
    """A panel for each metric of `BAR_METRICS` and each dataset that has it.

    Below the bars of our runs are those of published numbers.
    """
    summary, panels = summarise(result), []
    for metric in BAR_METRICS:
        for name, data in result["data_sets"].items():
            bars = []
            for column in columns(result):
                if (name, "", metric, column.title) not in summary.index:
                    continue
                mean, low, high, _ = summary.loc[(name, "", metric, column.title)]
                colour = LOSSES[column.loss].colour if column.loss else UNKNOWN_LOSS
                percent = (100 * mean, 100 * low, 100 * high)
                label = f"{100 * mean:.{digits(mean)}f}"
                bars.append(
                    figures.Bar(column.title, percent, colour, label, len(column.runs) == 1)
                )
            if not bars:
                continue
            for row in comparable(name, data, [metric])[0]:
                for model, number in row.percent.items() if row.metric == metric else ():
                    title, label = f"{model}, {row.source}", f"{number:.1f} {row.mark}"
                    bars.append(figures.Bar(title, (number,) * 3, PUBLISHED_COLOUR, label, False))
            guess = chance(data, metric)
            title = f"{name}, {data['images']:,} images: {metrics_of(data)[metric].title}, %"
            if guess is not None:
                title += f" (chance {100 * guess:.2g})"
            panels.append(figures.Panel(title, bars, None if guess is None else 100 * guess))
    return panels


def similarities(result: Result) -> list[figures.Similarities]:
    """The similarities of the first run with similarities in each column, for each dataset."""
    shown = []
    for name, data in result["data_sets"].items():
        order = f"sorted by {list(data['classes'])[-1]}" if data["classes"] else "unsorted"
        models = []
        for column in columns(result):
            runs = [result["results"][run].get(name, {}) for run in column.runs]
            if stored := next((run["similarities"] for run in runs if "similarities" in run), None):
                flat = np.frombuffer(base64.b64decode(stored["matrices"]), np.int8)
                n = math.isqrt(len(flat) // 3)
                image_image, text_text, image_text = flat.reshape(3, n, n) / 127
                matrices = [image_image, text_text, image_text - image_text.T]
                title, axis = f"{column.title}: {name}", f"{n} pairs, {order}"
                models.append(figures.Similarities(title, axis, matrices))
        shown += models[:MAX_MODELS]
    return shown


# The command.


def write(result: Result, out: Path) -> None:
    """Writes evaluation.json, table.md and the figures, and prints a shorter table."""
    save(result, out)
    write_text(markdown(result), out / "table.md")
    figures.draw_bars(bar_panels(result), out / "picture.png")
    names = ["picture.png"]
    if models := similarities(result):
        figures.draw_similarities(models, out / "similarities.png")
        names.append("similarities.png")
    Console().print(Markdown(markdown(result, short=True)))
    print(f"\nWritten to {out}: table.md has all metrics, {', '.join(names)}")


def main(argv: Sequence[str]) -> None:
    """`python -m reference_train report`."""
    description = (
        "Makes table.md and the figures again. Runs called NAME-SEED share the column NAME."
    )
    parser = Parser("python -m reference_train report", description=description)
    add = parser.add_argument
    add(
        "evaluations",
        nargs="+",
        type=Path,
        metavar="FOLDER",
        help="a folder of evaluate, or an evaluation.json",
    )
    add("--only", nargs="+", metavar="NAME", help="datasets to show; default: all")
    add("--out", type=Path, metavar="DIR", help="default: the folder")
    arguments = parser.parse_args(argv)
    out = arguments.out or arguments.evaluations[0]
    if not arguments.out and (len(arguments.evaluations) > 1 or out.is_file()):
        raise UsageError("report: --out is needed for several evaluations, or for a file")
    if arguments.only and out.resolve() in {path.resolve() for path in arguments.evaluations}:
        raise UsageError(f"--only would remove the other datasets from {out}: pass another --out")
    # `evaluate` may be adding results to the folder.
    with locked(out) if out.is_dir() else contextlib.nullcontext():
        records = [(str(path).removesuffix(".json"), path) for path in arguments.evaluations]
        result = merge([(name, read_evaluation(path)) for name, path in records], arguments.only)
        if not result["data_sets"]:
            raise UsageError(f"--only: no dataset {' or '.join(arguments.only)}")
        write(result, out)
