"""The table of an evaluation: which metrics it shows, and how it reads.

`python -m reference_train report FOLDER ...` makes it again, or one table of several folders.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from textwrap import indent
from typing import Any, NamedTuple

import pandas as pd
from rich.console import Console
from rich.markdown import Markdown

from ..command_line import Parser
from ..files import write_text
from ..losses import LOSSES
from . import paper
from .metrics import CONSISTENCY_NEIGHBOURS, RECALL_AT, SUPERCLASS_TOP, TOP, top
from .records import Result, read_evaluation

# Endings of the metrics that table.md shows for each group.
GROUP_ENDINGS = ("top1", "_r1")
# Endings of the metrics that the terminal shows.
SHORT_ENDINGS = (
    *(*GROUP_ENDINGS, "consistency_1", "linear_probe", "_gap", "_correlation"),
    *("mixed_r10", "mixed_r10_without_means"),
)
HOW_TO_READ = (
    "All numbers are in %, except alignment, uniformity, gaps and correlations. Alignment, "
    "uniformity and gaps are better if lower; correlations are higher if the model is more "
    "consistent. In brackets: the 95% interval (Wilson) of one run, or the lowest and the highest "
    "of several runs, whose number is in the heading. chance: the accuracy of guessing. n: the "
    "number of queries."
)


class Metric(NamedTuple):
    """A row of the table. An accuracy is the share of queries with a right answer among k."""

    title: str
    # What an answer is: "class", "superclass", "text" or "image"; "": the metric is no accuracy.
    kind: str = ""
    task: str = ""  # the key in `Dataset.classes`
    k: int = 1


# What `interchange` measures; the titles are made of the names. Endings say what is subtracted.
INTERCHANGE = (
    *("mixed_r10", "mixed_r10_tenth_of_texts", "mixed_r10_tenth_of_images"),
    *("mixed_text_share", "mixed_text_share_tenth_of_texts", "mixed_text_share_tenth_of_images"),
    *("head_image_image", "head_image_text", "head_text_image", "head_text_text"),
    *("v_measure_images", "v_measure_texts", "v_measure_mixed", "shared_neighbours"),
)
ENDINGS = ("", "_without_means", "_without_gallery_means")
# The metrics that do not belong to a task.
COMMON = {
    "linear_probe": Metric("linear probe", "class"),
    **{f"image_to_text_r{k}": Metric(f"image → text, R@{k}", "text", k=k) for k in RECALL_AT},
    **{f"text_to_image_r{k}": Metric(f"text → image, R@{k}", "image", k=k) for k in RECALL_AT},
    "alignment": Metric("alignment"),
    "image_uniformity": Metric("image uniformity"),
    "text_uniformity": Metric("text uniformity"),
    "inmodal_gap": Metric("in-modal gap × 100"),
    "inmodal_correlation": Metric("in-modal correlation"),
    "crossmodal_gap": Metric("cross-modal gap × 100"),
    "crossmodal_correlation": Metric("cross-modal correlation"),
    "modality_gap": Metric("modality gap"),
    **{
        name + ending: Metric(f"{name}{ending} × 100".replace("_", " "))
        for name in INTERCHANGE
        for ending in ENDINGS
    },
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


def columns(result: Result) -> dict[str, list[str]]:
    """The columns of the table, in the order in which runs were first measured: heading -> runs.

    A column has the runs that differ in their seed only. Runs are called [SERIES-]LOSS-SEED or
    SERIES-SEED.
    """
    found: dict[str, list[str]] = {}
    for run in result["results"]:
        loss, seed = (result["checkpoints"][run][key] for key in ("loss", "seed"))
        title = run if seed is None else run.removesuffix(f"-{seed}")
        if loss in LOSSES:
            series = title.removesuffix(loss).removesuffix("-")
            title = f"{series} {LOSSES[loss].title}".strip()
        found.setdefault(title, []).append(run)
    return {x if len(runs) == 1 else f"{x} ({len(runs)})": runs for x, runs in found.items()}


def summarise(result: Result) -> pd.DataFrame:
    """The numbers of an evaluation: mean, lowest, highest and count of the runs of a column.

    The index is the dataset, the group ("" for all images), the metric and the column. The
    bounds of an accuracy of a single run are its 95% interval.
    """
    cells = ["dataset", "group", "metric", "column"]
    metrics = {name: metrics_of(data) for name, data in result["data_sets"].items()}
    values = pd.DataFrame(
        [
            (name, group, metric, column, value)
            for column, runs in columns(result).items()
            for run in runs
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

    If the accuracy is a mean over styles, each concept counts once, because its drawings are alike.
    """
    data = result["data_sets"][name]
    if group or data["mean_over"]:
        return max(data["groups"][style] for style in ([group] if group else data["mean_over"]))
    if metrics_of(data)[metric].kind == "image":
        return int(data["captions"])
    return int(data["images"])


def wilson(share: float, count: float) -> tuple[float, float]:
    """The 95% interval (Wilson 1927) of a share of `count` trials."""
    z2 = 1.96**2
    centre = share + z2 / (2 * count)
    half = math.sqrt(z2 * (share * (1 - share) / count + z2 / (4 * count**2)))
    return (centre - half) / (1 + z2 / count), (centre + half) / (1 + z2 / count)


def chance(result: Result, name: str, metric: str, group: str = "") -> float | None:
    """The accuracy of guessing; None if it is not known.

    In retrieval one of n candidates is right. If several images have the same caption, guessing is
    a little better than that.
    """
    data = result["data_sets"][name]
    _, kind, task, k = metrics_of(data)[metric]
    if kind == "class":
        return float(min(1.0, k / data["classes"][task or "class"]))
    if kind in ("text", "image"):
        return min(1.0, k / num_queries(result, name, "image_to_text_r1", group))
    return None


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
        if row.metric not in measured and row.source != "paper":
            continue
        if reason := paper.why_incomparable(name, data, row.metric):
            notes[f"{name}: published numbers are not shown: {reason}."] = None
            continue
        rows.append(row)
        if row.note:
            title = metrics_of(data)[row.metric].title
            notes[rf"\* {name}, {title}, {row.source}: {row.note}."] = None
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
        measured = {metric for x, group, metric, _ in summary.index if (x, group) == (name, "")}
        if not measured:
            continue
        published, published_notes = comparable(name, data, list(measured))
        sizes = {"images": data["images"], "train images": data["train_images"]}
        sizes |= {"classes" if x == "class" else f"{x}s": n for x, n in data["classes"].items()}
        sizes |= {"captions": data["captions"]}
        heading = ", ".join(f"{count:,} {what}" for what, count in sizes.items() if count)
        table = dataset_table(result, summary, name, published, short)
        lines += ["", f"## {name}: {heading}", ""]
        titles = [title.replace("|", r"\|") for title in table]  # a file may be called a|b.pt
        lines.append(f"|  | {' | '.join(titles)} |")
        lines.append("|---" + "|---:" * len(table.columns) + "|")
        lines += [f"| {' | '.join(row)} |" for row in table.itertuples()]
        sources |= dict.fromkeys(row.source for row in published)
        notes += published_notes
        if data["mean_over"]:
            notes.append(f"{name}: the mean over {', '.join(data['mean_over'])}.")
    notes += [f"{source}: {paper.SOURCES[source]}." for source in sources]
    if sources:
        notes.append("; ".join(f"{mark}: {words}" for mark, words in paper.MARKS.items()) + ".")
    return "\n".join([*lines, "", *(f"- {note}" for note in notes)]) + "\n"


def dataset_table(
    result: Result,
    summary: pd.DataFrame,
    name: str,
    published: Sequence[paper.Published],
    short: bool,
) -> pd.DataFrame:
    """The cells of a dataset's table. The index has the titles of the metrics."""
    data, rows = result["data_sets"][name], {}
    headings = list(columns(result))
    for group in [""] if short else ["", *data["groups"]]:
        for key, metric in metrics_of(data).items():
            if not key.endswith(SHORT_ENDINGS if short else GROUP_ENDINGS if group else ""):
                continue
            row = {
                heading: cell(summary.loc[name, group, key, heading], metric)
                for heading in headings
                if (name, group, key, heading) in summary.index
            }
            for found in published:
                if found.metric == key and not group:
                    row |= found.cells
            if not row:
                continue
            if guess := chance(result, name, key, group):
                row["chance"] = f"{100 * guess:.{digits(guess)}f}"
            if metric.kind:
                row["n"] = f"{num_queries(result, name, key, group):,}"
            rows[f"{group}: {metric.title}" if group else metric.title] = row
    sources = [title for found in published for title in found.cells]
    titles = dict.fromkeys([*headings, *sources, "chance", "n"])
    return pd.DataFrame(rows, list(titles)).T.fillna("")


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


# The command.


def table_of_runs(result: Result) -> pd.DataFrame:
    """A row for each run: its settings, and its numbers, as shares.

    Numbers are called "DATASET: METRIC" or "DATASET, GROUP: METRIC". The recall is the mean of R@10
    in both directions.
    """
    rows = []
    for run, measured in result["results"].items():
        row = {"run": run, **result["checkpoints"][run]}
        for name, found in measured.items():
            for group, numbers in {"": found["numbers"], **found["groups"]}.items():
                prefix = f"{name}, {group}" if group else name
                row |= {f"{prefix}: {metric}": value for metric, value in numbers.items()}
                if "image_to_text_r10" in numbers:
                    both = numbers["image_to_text_r10"] + numbers["text_to_image_r10"]
                    row[f"{prefix}: recall"] = both / 2
        rows.append(row)
    return pd.DataFrame(rows)


def write(result: Result, out: Path) -> None:
    """Writes table.md, and prints a shorter table."""
    write_text(markdown(result), out / "table.md")
    Console().print(Markdown(markdown(result, short=True)))
    print(f"\nWritten: {out / 'table.md'}")


def main(argv: Sequence[str]) -> None:
    """`python -m reference_train report`."""
    description = "Makes table.md in folders of evaluate again. Runs NAME-SEED share a column."
    parser = Parser("python -m reference_train report", description=description)
    add = parser.add_argument
    text = "a folder of evaluate, or an evaluation.json"
    add("folders", nargs="+", type=Path, metavar="FOLDER", help=text)
    text = "also write a row for each run of all folders: its settings and all its numbers"
    add("--csv", type=Path, metavar="FILE", help=text)
    arguments = parser.parse_args(argv)
    results = [read_evaluation(folder) for folder in arguments.folders]
    for folder, result in zip(arguments.folders, results, strict=True):
        write(result, folder if folder.is_dir() else folder.parent)
    if arguments.csv:
        rows = pd.concat(map(table_of_runs, results))
        write_text(rows.to_csv(index=False, float_format="%.6g"), arguments.csv)
