"""Makes the table of an evaluation, with published numbers beside ours."""

from collections.abc import Sequence
from statistics import mean
from textwrap import indent
from typing import Any, NamedTuple

from ..losses import LOSSES
from . import published
from .metrics import (
    CONSISTENCY_NEIGHBOURS,
    RECALL_AT,
    SUPERCLASS_TOP,
    TOP,
    chance_of_any,
    top,
    wilson,
)
from .paper import why_incomparable
from .published import Published
from .records import Result

Bounded = tuple[float, float, float]  # a value, its lower bound and its upper bound


class Metric(NamedTuple):
    """A row of the table. An accuracy is the share of queries with a right answer among k."""

    title: str
    # What an answer is: "class", "superclass", "text" or "image"; "": the metric is no accuracy.
    kind: str
    task: str = ""  # the key in `DataSet.classes`
    k: int = 1


class Column(NamedTuple):
    """A column of the table: runs that differ in their seed only."""

    title: str
    loss: str | None  # a key of LOSSES
    runs: list[dict[str, Any]]  # the results of each run: data set -> `measure.measure`


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
# Endings of the metrics that table.md shows for each group.
GROUP_ENDINGS = ("top1", "_r1")
# Endings of the metrics that the terminal shows.
SHORT_ENDINGS = (*GROUP_ENDINGS, "consistency_1", "linear_probe", "_gap", "_correlation")
# Published metrics that our runs may lack -> what our runs would need.
REQUIREMENTS = {
    "consistency_1": "the consistency score needs a train split",
    "linear_probe": "the linear probe needs --linear-probe and a train split",
}
HOW_TO_READ = (
    "All numbers are in %, except alignment, uniformity, gaps and correlations. Alignment, "
    "uniformity and gaps are better if lower; correlations are higher if the model is more "
    "consistent. In brackets: the 95% interval (Wilson) of one run, or the lowest and the highest "
    "of several runs, whose number is in the heading. chance: the accuracy of guessing. n: the "
    "number of queries."
)


def metrics_of(data: dict[str, Any]) -> dict[str, Metric]:
    """The metrics that a data set may have, in the order of the table."""
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


def columns(result: Result) -> list[Column]:
    """The columns of the table: CLIP, other losses, then runs whose loss is not known.

    Runs are called [SERIES-]LOSS-SEED or SERIES-SEED. Runs that differ in their seed only share a
    column.
    """
    found: dict[tuple[Any, ...], Column] = {}
    for title, results in result["results"].items():
        run = result["checkpoints"][title]
        loss, series = run["loss"], series_of(title, run)
        if loss is None:
            sort_key = (True, natural_order(series), 0)
            column = Column(series, None, [])
        else:
            sort_key = (False, natural_order(series), list(LOSSES).index(loss))
            column = Column(f"{series} {LOSSES[loss].title}".strip(), loss, [])
        found.setdefault(sort_key, column).runs.append(results)
    return [found[sort_key] for sort_key in sorted(found)]


def series_of(title: str, run: dict[str, Any]) -> str:
    """The title of a run without its loss and its seed; "" if nothing is left.

    run: what `runs.describe_run` says about it.
    """
    loss, seed = run["loss"], run["seed"]
    series = title if seed is None else title.removesuffix(f"-{seed}")
    return series if loss is None else series.removesuffix(loss).removesuffix("-")


def natural_order(series: str) -> tuple[tuple[bool, float, str], ...]:
    """A sort key that compares numbers in the series by value, so that 64 comes before 512."""
    keys = []
    for word in series.split("-"):
        is_word = not word.replace(".", "", 1).isdigit()
        keys.append((is_word, 0.0 if is_word else float(word), word))
    return tuple(keys)


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
    readable = [run[name].get("images", 0) for run in result["results"].values() if name in run]
    return max(readable) or int(data["images"])  # older evaluations have no "images" in results


def summary(
    result: Result, runs: Sequence[dict[str, Any]], name: str, metric: str, group: str = ""
) -> Bounded | None:
    """A metric of a data set, or of one of its groups: the mean over runs, and bounds.

    The bounds of several runs are the lowest and the highest run. The bounds of a single run are
    the 95% interval of an accuracy, or the value itself. None if no run has the metric.
    """
    measured = [run[name] for run in runs if name in run]
    numbers = [x["groups"].get(group, {}) if group else x["numbers"] for x in measured]
    found = [x[metric] for x in numbers if metric in x]
    if not found:
        return None
    if len(found) == 1 and metrics_of(result["data_sets"][name])[metric].kind:
        return found[0], *wilson(found[0], num_queries(result, name, metric, group))
    return mean(found), min(found), max(found)


def chance(data: dict[str, Any], metric: str) -> float | None:
    """The accuracy of guessing; None if it is not known."""
    _, kind, task, k = metrics_of(data)[metric]
    if kind == "class":
        return float(min(1.0, k / data["classes"][task or "class"]))
    if kind == "superclass":
        return data.get("superclasses", {}).get(metric)
    if kind not in ("text", "image"):
        return None
    styles = [data["groups"][style] for style in data["mean_over"]]
    images = mean(styles) if styles else data["images"]
    pairs = images * data["captions"] / data["images"]
    texts = min(pairs, data.get("texts", data["captions"]))
    right, candidates = (pairs / images, texts) if kind == "text" else (pairs / texts, images)
    return chance_of_any(right, candidates, k)


def digits(share: float) -> int:
    """How many decimals a share has, if it is shown in %."""
    return 1 if share >= 0.1 else 2


def cell(found: Bounded | None, metric: Metric) -> str:
    """A cell of the table: a number and its bounds; "" if there is no number."""
    if found is None:
        return ""
    if metric.kind:
        value, low, high = (f"{100 * share:.{digits(found[0])}f}" for share in found)
        return f"{value} ({low}–{high})"
    value, low, high = (f"{x * (100 if '× 100' in metric.title else 1):.2f}" for x in found)
    return value if found[1] == found[2] else f"{value} ({low} to {high})"


def published_cell(row: Published | None, model: str) -> str:
    """A cell with a published number and its mark, and with * if the number has a note."""
    if row is None or model not in row.percent:
        return ""
    return f"{row.percent[model]:.2f} {row.mark}{'*' if row.note else ''}"


def comparable(
    name: str, data: dict[str, Any], measured: Sequence[str]
) -> tuple[list[Published], list[str]]:
    """The published numbers that are shown for a data set, and notes.

    Metrics that our runs do not have are shown only from the paper. Numbers that cannot be compared
    with ours are not shown.

    measured: the metrics that our runs have.
    """
    rows: list[Published] = []
    notes: dict[str, None] = {}  # a dict keeps their order, and each note once
    for row in published.for_table(name):
        if row.metric not in measured:
            if requirement := REQUIREMENTS.get(row.metric):
                notes[f"{name}: {requirement}."] = None
            if row.source != "paper":
                continue
        if reason := why_incomparable(name, data, row.metric):
            notes[f"{name}: published numbers are not shown: {reason}."] = None
            continue
        rows.append(row)
        if row.note:
            title = metrics_of(data)[row.metric].title
            notes[rf"\* {name}, {title}, {row.source}: {row.note}."] = None
    if not rows:  # without published numbers, nobody misses a metric in our runs
        notes = {note: None for note in notes if "not shown" in note}
    return rows, list(notes)


def markdown(result: Result, short: bool = False) -> str:
    """The text of `table.md`: failures, a table for each data set, notes.

    short: headline metrics only.
    """
    lines = [f"# Evaluation of {result['date']}", "", indent(result["command"], "    "), ""]
    lines += [f"- **Failed: {name}: {why}**" for name, why in result.get("failed", {}).items()]
    notes, sources = [HOW_TO_READ], dict[str, None]()
    for name, data in result["data_sets"].items():
        runs = [run[name] for run in result["results"].values() if name in run]
        measured = [
            metric for metric in metrics_of(data) if any(metric in run["numbers"] for run in runs)
        ]
        if not measured:
            continue
        rows, published_notes = comparable(name, data, measured)
        lines += data_set_table(result, name, measured, rows, short)
        sources |= dict.fromkeys(row.source for row in rows)
        notes += published_notes
        if data["mean_over"]:
            notes.append(f"{name}: the mean over {', '.join(data['mean_over'])}.")
        if unreadable := sorted({why for run in runs for why in run.get("unreadable", [])}):
            count = len(unreadable)
            notes.append(f"{name}: {count} unreadable, left out: {'; '.join(unreadable)}.")
    notes += [f"{source}: {published.SOURCES[source]}." for source in sources]
    if sources:
        notes.append("; ".join(f"{mark}: {words}" for mark, words in published.MARKS.items()) + ".")
    notes += [f"Not evaluated: {name}: {why}." for name, why in result.get("absent", {}).items()]
    return "\n".join([*lines, "", *(f"- {note}" for note in notes)]) + "\n"


def data_set_table(
    result: Result, name: str, measured: Sequence[str], rows: Sequence[Published], short: bool
) -> list[str]:
    """The lines of a data set's table."""
    data, our_columns = result["data_sets"][name], columns(result)
    published_columns = dict.fromkeys((row.source, model) for row in rows for model in row.percent)
    published_rows = {(row.source, row.metric): row for row in rows}
    headings = [""]
    headings += [
        f"{column.title} ({len(column.runs)})" if len(column.runs) > 1 else column.title
        for column in our_columns
    ]
    headings += [f"{model}, {source}" for source, model in published_columns]
    headings += ["chance", "n"]
    lines = ["", f"## {name}: {sizes(data)}", "", f"| {' | '.join(headings)} |"]
    lines += ["|---" + "|---:" * (len(headings) - 1) + "|"]
    metrics = metrics_of(data)
    shown = {*measured, *(row.metric for row in rows)}
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
            cells.append(cell(summary(result, column.runs, name, key, group), metric))
        for source, model in published_columns:
            row = None if group else published_rows.get((source, key))
            cells.append(published_cell(row, model))
        # The chance of retrieval depends on the group, and is known for the whole data set only.
        has_chance = not (group and metric.kind in ("text", "image"))
        guess = chance(data, key) if has_chance else None
        cells.append("" if guess is None else f"{100 * guess:.{digits(guess)}f}")
        queries = num_queries(result, name, key, group) if metric.kind else None
        cells.append("" if queries is None else f"{queries:,}")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def sizes(data: dict[str, Any]) -> str:
    """The sizes of a data set in words: images, classes, templates and texts."""
    counts = {"images": data["images"], "train images": data["train_images"]}
    for task, count in data["classes"].items():
        counts["classes" if task == "class" else f"{task}s"] = count
    counts |= {"templates": data["templates"], "texts": data.get("texts", data["captions"])}
    return ", ".join(f"{count:,} {what}" for what, count in counts.items() if count)
