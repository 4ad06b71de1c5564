"""The table of an evaluation, and the numbers in it, with published ones next to them.

published.csv holds CLIP's number, CyCLIP's and a mark in a cell. Those marked c were read in the
repository of the paper's authors (github.com/goel-shashank/CyCLIP, today's or its history:
utils/fine_coarse_plot.py, utils/linear_probe_plot.py).
"""

import csv
import re
from pathlib import Path
from statistics import mean
from textwrap import indent
from typing import Any, NamedTuple

from ..losses import LOSSES
from .metrics import KS, chance_of_any, wilson

Result = dict[str, Any]  # what evaluation.json holds
Runs = list[dict[str, Any]]  # the results of a column


class Metric(NamedTuple):
    """A number of the table. kind: what one is right about."""

    words: str
    kind: str  # "class", "superclass", "text", "image"; "" is no share of right answers
    question: str = ""
    k: int = 1  # one answer of k is right


# Those that do not depend on a data set's questions.
COMMON = {
    "linear_probe": Metric("linear probe", "class"),
    **{f"image_to_text_r{k}": Metric(f"image → text, R@{k}", "text", k=k) for k in (1, 5, 10)},
    **{f"text_to_image_r{k}": Metric(f"text → image, R@{k}", "image", k=k) for k in (1, 5, 10)},
    "alignment": Metric("alignment", ""),
    "image_uniformity": Metric("image uniformity", ""),
    "text_uniformity": Metric("text uniformity", ""),
    "inmodal_gap": Metric("in-modal gap × 100", ""),
    "inmodal_correlation": Metric("in-modal correlation", ""),
    "crossmodal_gap": Metric("cross-modal gap × 100", ""),
    "crossmodal_correlation": Metric("cross-modal correlation", ""),
}
OF_GROUPS = ("top1", "_r1")  # how metrics of groups end, in table.md
SHORT = (*OF_GROUPS, "consistency_1", "linear_probe", "_gap", "_correlation")  # on the terminal
NEEDS = {  # metrics that the paper has and you may lack
    "consistency_1": "the consistency score needs a train split",
    "linear_probe": "the linear probe needs --linear-probe and a train split",
}
MARKS = {"c": "read in the authors' repository", "q": "quoted, not checked"}
NOTES = {
    "paper": "Goel et al. 2022, RN50. Those marked q, with ImageNet's, are gains of 10.2 to 23.9% "
    "(CIFAR, ImageNet) and 10.2 to 26.5% (shifts), where its abstract says 10 to 24% and 10 to 27%",
    "reproduced": "arXiv 2303.05952, by other authors. There CLIP's linear probes are at 61.05% on "
    "average and CyCLIP's at 60.14%",
}


def published(name: str) -> dict[str, dict[str, tuple[float, float, str]]]:
    """Source -> metric -> CLIP's and CyCLIP's number on a data set, and the mark.

    Without sources that have none.
    """
    found: dict[str, dict[str, tuple[float, float, str]]] = {}
    with Path(__file__).with_name("published.csv").open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if cell := row.get(name):
                clip, cyclip, mark = cell.split()
                numbers = found.setdefault(row["source"], {})
                numbers[row["metric"]] = float(clip), float(cyclip), mark
    return found


def titles(source: str) -> tuple[str, str]:
    """The columns of a source."""
    return f"CLIP, {source}", f"CyCLIP, {source}"


def metrics_of(data: dict[str, Any]) -> dict[str, Metric]:
    """The metrics that a data set may have, in the order of the table."""
    found: dict[str, Metric] = {}
    for question in data["classes"]:
        question = "" if question == "class" else question
        start, of = (f"{question}_", f"{question} ") if question else ("", "")
        found |= {
            f"{start}top1": Metric(f"{of or 'zero-shot '}top-1", "class", question),
            f"{start}top5": Metric(f"{of or 'zero-shot '}top-5", "class", question, 5),
            f"{start}coarse": Metric(f"{of}superclass", "superclass"),
            f"{start}fine": Metric(f"{of}within the superclass", "superclass"),
        }
        for k in KS:
            words = f"{of}consistency score, k = {k}"
            found[f"{start}consistency_{k}"] = Metric(words, "class", question)
    return found | COMMON


def columns(result: Result) -> dict[str, Runs]:
    """Title -> the results of its runs: those that differ in the seed alone are one column.

    Runs are called [NAME-]LOSS-SEED or NAME-SEED. CLIP is first, then the other losses.
    """
    found: dict[tuple[Any, ...], Runs] = {}
    for name, results in result["results"].items():
        stem, _, last = name.rpartition("-")
        known = result.get("checkpoints", {}).get(name, {})
        if "seed" in known:
            has_seed = last == str(known["seed"])
        else:  # an older evaluation: a digit is a seed, and so is the number after a loss
            has_seed = last.isdigit() and (len(last) == 1 or stem.endswith(tuple(LOSSES)))
        title = stem if has_seed else name
        loss = re.fullmatch(rf"(?:(.+?)-)??({'|'.join(LOSSES)})", title)
        parts = re.split(r"(\d+(?:\.\d+)?)", (loss[1] or "") if loss else title)
        numbered = tuple(float(part) if i % 2 else part for i, part in enumerate(parts))
        if loss:
            title = f"{loss[1] or ''} {LOSSES[loss[2]].title}".strip()
        place = (loss is None, numbered, list(LOSSES).index(loss[2]) if loss else 0, title)
        found.setdefault(place, []).append(results)
    return {place[-1]: found[place] for place in sorted(found)}


def queries(result: Result, name: str, metric: str, group: str = "") -> int:
    """How many answers a share is of; not of pictures that could not be read.

    Where it is a mean over styles, each thing counts once: its drawings are alike.
    """
    data = result["data_sets"][name]
    if group or data["mean_over"]:
        return max(data["groups"][style] for style in ([group] if group else data["mean_over"]))
    if metrics_of(data)[metric].kind == "image":
        return int(data["captions"])
    read = [run[name].get("images", 0) for run in result["results"].values() if name in run]
    return max(read) or int(data["images"])


def summary(
    result: Result, runs: Runs, name: str, metric: str, group: str = ""
) -> tuple[float, float, float] | None:
    """A metric of a data set, or of a group of it: the mean over the runs that have it, and bounds.

    Those are the lowest and the highest; of one share its 95% interval.
    """
    of_runs = [run[name] for run in runs if name in run]
    numbers = [n["groups"].get(group, {}) if group else n["numbers"] for n in of_runs]
    found = [n[metric] for n in numbers if metric in n]
    if not found:
        return None
    if len(found) == 1 and metrics_of(result["data_sets"][name])[metric].kind:
        return found[0], *wilson(found[0], queries(result, name, metric, group))
    return mean(found), min(found), max(found)


def chance(data: dict[str, Any], metric: str) -> float | None:
    """What guessing would give, as a share; None if it is not known."""
    kind, question, k = metrics_of(data)[metric][1:]
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
    right, of = (pairs / images, texts) if kind == "text" else (pairs / texts, images)
    return chance_of_any(right, of, k)


def digits(share: float) -> int:
    """Of a share in %, after the point."""
    return 1 if share >= 0.1 else 2


def cell(found: tuple[float, float, float] | None, of: Metric) -> str:
    """A number of one column; empty if there is none."""
    if found is None:
        return ""
    if of.kind:
        value, low, high = (f"{100 * share:.{digits(found[0])}f}" for share in found)
        return f"{value} ({low}–{high})"
    value, low, high = (f"{x * (100 if '× 100' in of.words else 1):.2f}" for x in found)
    return value if found[1] == found[2] else f"{value} ({low} to {high})"


def markdown(result: Result, short: bool = False) -> str:
    """`table.md`: failures, a table for each data set, notes. short: headline metrics alone."""
    out = [f"# Evaluation of {result['date']}", "", indent(result["command"], "    "), ""]
    out += [f"- **Failed: {name}: {why}**" for name, why in result.get("failed", {}).items()]
    shown = columns(result)
    notes = [
        "In %, but for alignment, uniformity and gaps, where lower is better, and correlations, "
        "where higher is more consistent. In brackets: the 95% interval (Wilson) of one run, or "
        "the lowest and the highest of several, whose number is in the heading. chance: guessing. "
        "n: how many were asked.",
    ]
    quoted: dict[str, None] = {}  # the sources that are shown, in their order
    for name, data in result["data_sets"].items():
        found = [run[name] for run in result["results"].values() if name in run]
        metrics = metrics_of(data)
        measured = [m for m in metrics if any(m in run["numbers"] for run in found)]
        if not measured:
            continue
        sources = published(name)
        if data.get("unlike_paper"):
            sources = {}
            notes.append(f"{name}: no column of the paper's: {data['unlike_paper']}.")
        quoted |= dict.fromkeys(sources)
        heads = ["", *(f"{t} ({len(r)})" if len(r) > 1 else t for t, r in shown.items())]
        heads += [*(title for source in sources for title in titles(source)), "chance", "n"]
        out += ["", f"## {name}: {sizes(data)}", "", f"| {' | '.join(heads)} |"]
        out += ["|---" + "|---:" * (len(heads) - 1) + "|"]
        paper = sources.get("paper", {})
        wanted = [(m, "") for m in metrics if m in measured or m in paper]
        wanted += [(m, g) for g in data["groups"] for m in measured if m.endswith(OF_GROUPS)]
        for metric, group in wanted:
            if short and (group or not metric.endswith(SHORT)):
                continue
            of = metrics[metric]
            cells = [f"{group}: " * bool(group) + of.words]
            cells += [cell(summary(result, r, name, metric, group), of) for r in shown.values()]
            for numbers in sources.values():
                p = None if group else numbers.get(metric)
                cells += [f"{number:.2f} {p[2]}" for number in p[:2]] if p else ["", ""]
            guess = None if group and of.kind in ("text", "image") else chance(data, metric)
            cells += ["" if guess is None else f"{100 * guess:.{digits(guess)}f}"]
            cells += [f"{queries(result, name, metric, group):,}" if of.kind else ""]
            out.append(f"| {' | '.join(cells)} |")
        if data["mean_over"]:
            notes.append(f"{name}: the mean over {', '.join(data['mean_over'])}.")
        notes += [f"{name}: {why}." for m, why in NEEDS.items() if m in paper and m not in measured]
        if broken := sorted({why for run in found for why in run.get("unreadable", [])}):
            notes.append(f"{name}: {len(broken)} unreadable, left out: {'; '.join(broken)}.")
    if quoted:
        notes += [f"{source}: trained on CC3M; {NOTES[source]}." for source in quoted]
        notes.append("; ".join(f"{mark}: {words}" for mark, words in MARKS.items()) + ".")
    notes += [f"Not evaluated: {name}: {why}." for name, why in result.get("absent", {}).items()]
    return "\n".join([*out, "", *(f"- {note}" for note in notes)]) + "\n"


def sizes(data: dict[str, Any]) -> str:
    """A data set in words."""
    counts = {"images": data["images"], "train images": data["train_images"]}
    counts |= {"classes" if q == "class" else f"{q}s": n for q, n in data["classes"].items()}
    counts |= {"templates": data["templates"], "texts": data.get("texts", data["captions"])}
    return ", ".join(f"{count:,} {what}" for what, count in counts.items() if count)
