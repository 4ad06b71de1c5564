"""The table of an evaluation, and the numbers in it, with published ones beside them."""

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

Bounded = tuple[float, float, float]  # a value, and the lowest and the highest


class Metric(NamedTuple):
    """A number of the table.

    kind: what an answer is. A query is right if one of its k best answers is.
    """

    title: str
    kind: str  # "class", "superclass", "text", "image"; "" if the number is no share of answers
    question: str = ""
    k: int = 1


class Column(NamedTuple):
    """Runs that differ in their seed only."""

    title: str
    loss: str | None  # a key of LOSSES
    runs: list[dict[str, Any]]  # the results of each


# The metrics that do not depend on a data set's questions.
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
GROUP_ENDINGS = ("top1", "_r1")  # the metrics of groups that are in table.md
# The metrics that are on the terminal.
SHORT_ENDINGS = (*GROUP_ENDINGS, "consistency_1", "linear_probe", "_gap", "_correlation")
REQUIREMENTS = {  # of metrics that are published and may be missing here
    "consistency_1": "the consistency score needs a train split",
    "linear_probe": "the linear probe needs --linear-probe and a train split",
}
READING = (
    "In %, but for alignment, uniformity and gaps, where lower is better, and correlations, "
    "where higher is more consistent. In brackets: the 95% interval (Wilson) of one run, or "
    "the lowest and the highest of several, whose number is in the heading. chance: guessing. "
    "n: how many were asked."
)


def metrics_of(data: dict[str, Any]) -> dict[str, Metric]:
    """The metrics that a data set may have, in the order of the table."""
    found: dict[str, Metric] = {}
    for name in data["classes"]:
        question = "" if name == "class" else name
        prefix, label = (f"{question}_", f"{question} ") if question else ("", "")
        for k in TOP:
            title = f"{label or 'zero-shot '}top-{k}"
            found[f"{prefix}top{k}"] = Metric(title, "class", question, k)
        for metric, title_of_metric in (
            ("coarse", "superclass"),
            ("fine", "within the superclass"),
        ):
            for k in SUPERCLASS_TOP:
                title = label + title_of_metric + ("" if k == 1 else f", top-{k}")
                found[prefix + top(metric, k)] = Metric(title, "superclass")
        for k in CONSISTENCY_NEIGHBOURS:
            title = f"{label}consistency score, k = {k}"
            found[f"{prefix}consistency_{k}"] = Metric(title, "class", question)
    return found | COMMON


def columns(result: Result) -> list[Column]:
    """The columns of the table: CLIP, other losses, then runs whose loss is not known.

    Runs that differ in their seed only share a column. A run is called [SERIES-]LOSS-SEED or
    SERIES-SEED.
    """
    found: dict[tuple[Any, ...], Column] = {}
    for title, results in result["results"].items():
        run = result["checkpoints"][title]
        loss, series = run["loss"], series_of(title, run)
        if loss is None:
            sort_key = (True, natural(series), 0)
            column = Column(series, None, [])
        else:
            sort_key = (False, natural(series), list(LOSSES).index(loss))
            column = Column(f"{series} {LOSSES[loss].title}".strip(), loss, [])
        found.setdefault(sort_key, column).runs.append(results)
    return [found[sort_key] for sort_key in sorted(found)]


def series_of(title: str, run: dict[str, Any]) -> str:
    """What the title of a run says besides its loss and its seed; "" if it says nothing else.

    run: as `runs.describe_run` describes it.
    """
    loss, seed = run["loss"], run["seed"]
    series = title if seed is None else title.removesuffix(f"-{seed}")
    return series if loss is None else series.removesuffix(loss).removesuffix("-")


def natural(series: str) -> tuple[tuple[bool, float, str], ...]:
    """A key that sorts words that are numbers as numbers: 64 before 512."""
    keys = []
    for word in series.split("-"):
        is_word = not word.replace(".", "", 1).isdigit()
        keys.append((is_word, 0.0 if is_word else float(word), word))
    return tuple(keys)


def num_queries(result: Result, name: str, metric: str, group: str = "") -> int:
    """The number of queries that a share is measured on, without pictures that cannot be read.

    If the share is a mean over styles, a thing counts once, because its drawings are alike.
    """
    data = result["data_sets"][name]
    if group or data["mean_over"]:
        return max(data["groups"][style] for style in ([group] if group else data["mean_over"]))
    if metrics_of(data)[metric].kind == "image":
        return int(data["captions"])
    readable = [run[name].get("images", 0) for run in result["results"].values() if name in run]
    return max(readable) or int(data["images"])


def summary(
    result: Result, runs: Sequence[dict[str, Any]], name: str, metric: str, group: str = ""
) -> Bounded | None:
    """A metric of a data set, or of one of its groups: the mean over runs, and bounds.

    The bounds of several runs are the lowest and the highest one. The bounds of a single run are
    the 95% interval of its share. None if no run has the metric.
    """
    measured = [run[name] for run in runs if name in run]
    numbers = [m["groups"].get(group, {}) if group else m["numbers"] for m in measured]
    found = [n[metric] for n in numbers if metric in n]
    if not found:
        return None
    if len(found) == 1 and metrics_of(result["data_sets"][name])[metric].kind:
        return found[0], *wilson(found[0], num_queries(result, name, metric, group))
    return mean(found), min(found), max(found)


def chance(data: dict[str, Any], metric: str) -> float | None:
    """The share of right answers by guessing; None if it is not known."""
    _, kind, question, k = metrics_of(data)[metric]
    if kind == "class":
        return float(min(1.0, k / data["classes"][question or "class"]))
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
    """The number of digits after the point with which a share is shown in %."""
    return 1 if share >= 0.1 else 2


def cell(found: Bounded | None, metric: Metric) -> str:
    """The text of a number and its bounds; "" if there is none."""
    if found is None:
        return ""
    if metric.kind:
        value, low, high = (f"{100 * share:.{digits(found[0])}f}" for share in found)
        return f"{value} ({low}–{high})"
    value, low, high = (f"{x * (100 if '× 100' in metric.title else 1):.2f}" for x in found)
    return value if found[1] == found[2] else f"{value} ({low} to {high})"


def published_cell(row: Published | None, model: str) -> str:
    """The text of a published number with its mark, and with * if a note explains it."""
    if row is None or model not in row.percent:
        return ""
    return f"{row.percent[model]:.2f} {row.mark}{'*' if row.note else ''}"


def comparable(
    name: str, data: dict[str, Any], measured: Sequence[str]
) -> tuple[list[Published], list[str]]:
    """The published numbers that can stand beside a data set's own, and notes on them.

    measured: the metrics that our runs have. Other metrics are shown if the paper has them.
    """
    rows: list[Published] = []
    notes: dict[str, None] = {}  # in order, each once
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
    if not rows:  # nobody then asks what our runs lack
        notes = {note: None for note in notes if "not shown" in note}
    return rows, list(notes)


def markdown(result: Result, short: bool = False) -> str:
    """The text of `table.md`: failures, a table for each data set, notes.

    short: headline metrics only.
    """
    out = [f"# Evaluation of {result['date']}", "", indent(result["command"], "    "), ""]
    out += [f"- **Failed: {name}: {why}**" for name, why in result.get("failed", {}).items()]
    notes, shown = [READING], dict[str, None]()
    for name, data in result["data_sets"].items():
        found = [run[name] for run in result["results"].values() if name in run]
        measured = [m for m in metrics_of(data) if any(m in run["numbers"] for run in found)]
        if not measured:
            continue
        rows, remarks = comparable(name, data, measured)
        out += data_set_table(result, name, measured, rows, short)
        shown |= dict.fromkeys(row.source for row in rows)
        notes += remarks
        if data["mean_over"]:
            notes.append(f"{name}: the mean over {', '.join(data['mean_over'])}.")
        if broken := sorted({why for run in found for why in run.get("unreadable", [])}):
            notes.append(f"{name}: {len(broken)} unreadable, left out: {'; '.join(broken)}.")
    notes += [f"{source}: {published.SOURCES[source]}." for source in shown]
    if shown:
        notes.append("; ".join(f"{mark}: {words}" for mark, words in published.MARKS.items()) + ".")
    notes += [f"Not evaluated: {name}: {why}." for name, why in result.get("absent", {}).items()]
    return "\n".join([*out, "", *(f"- {note}" for note in notes)]) + "\n"


def data_set_table(
    result: Result, name: str, measured: Sequence[str], rows: Sequence[Published], short: bool
) -> list[str]:
    """The lines of a data set's table."""
    data, our_columns = result["data_sets"][name], columns(result)
    published_columns = dict.fromkeys((row.source, model) for row in rows for model in row.percent)
    row_of = {(row.source, row.metric): row for row in rows}
    headings = [""]
    headings += [f"{c.title} ({len(c.runs)})" if len(c.runs) > 1 else c.title for c in our_columns]
    headings += [f"{model}, {source}" for source, model in published_columns]
    headings += ["chance", "n"]
    out = ["", f"## {name}: {sizes(data)}", "", f"| {' | '.join(headings)} |"]
    out += ["|---" + "|---:" * (len(headings) - 1) + "|"]
    metrics = metrics_of(data)
    wanted = [(m, "") for m in metrics if m in measured or any(m == row.metric for row in rows)]
    wanted += [(m, g) for g in data["groups"] for m in measured if m.endswith(GROUP_ENDINGS)]
    for name_of_metric, group in wanted:
        if short and (group or not name_of_metric.endswith(SHORT_ENDINGS)):
            continue
        metric = metrics[name_of_metric]
        cells = [f"{group}: {metric.title}" if group else metric.title]
        for column in our_columns:
            cells.append(cell(summary(result, column.runs, name, name_of_metric, group), metric))
        for source, model in published_columns:
            row = None if group else row_of.get((source, name_of_metric))
            cells.append(published_cell(row, model))
        known = not (group and metric.kind in ("text", "image"))
        guess = chance(data, name_of_metric) if known else None
        cells.append("" if guess is None else f"{100 * guess:.{digits(guess)}f}")
        queries = num_queries(result, name, name_of_metric, group) if metric.kind else None
        cells.append("" if queries is None else f"{queries:,}")
        out.append(f"| {' | '.join(cells)} |")
    return out


def sizes(data: dict[str, Any]) -> str:
    """The sizes of a data set: images, classes, templates and texts."""
    counts = {"images": data["images"], "train images": data["train_images"]}
    counts |= {"classes" if q == "class" else f"{q}s": n for q, n in data["classes"].items()}
    counts |= {"templates": data["templates"], "texts": data.get("texts", data["captions"])}
    return ", ".join(f"{count:,} {what}" for what, count in counts.items() if count)
