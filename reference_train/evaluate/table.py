"""The table of an evaluation, and the numbers in it."""

import re
from statistics import mean
from textwrap import indent
from typing import Any, NamedTuple

from ..losses import LOSSES
from .metrics import KS, chance_of_any, wilson
from .paper import ORIGINS, PUBLISHED

Result = dict[str, Any]  # what evaluation.json holds
Runs = list[dict[str, Any]]  # the results of a column


class Metric(NamedTuple):
    """A number of the table. kind: what one is right about."""

    words: str
    kind: str  # "class", "superclass", "text", "image"; "gap" and "" are no shares
    question: str = ""
    k: int = 1  # one answer of k is right


METRICS: dict[str, Metric] = {}  # in the order of the table
for _question, _words in {"": "zero-shot", "subgroup": "subgroup", "group": "group"}.items():
    _start, _of = (f"{_question}_", f"{_question} ") if _question else ("", "")
    METRICS |= {
        f"{_start}top1": Metric(f"{_words} top-1", "class", _question),
        f"{_start}top5": Metric(f"{_words} top-5", "class", _question, 5),
        f"{_start}coarse": Metric(f"{_of}superclass", "superclass"),
        f"{_start}fine": Metric(f"{_of}within the superclass", "superclass"),
    }
    for _k in KS:
        _score = Metric(f"{_of}consistency score, k = {_k}", "class", _question)
        METRICS[f"{_start}consistency_{_k}"] = _score
METRICS |= {
    "linear_probe": Metric("linear probe", "class"),
    **{f"image_to_text_r{k}": Metric(f"image → text, R@{k}", "text", k=k) for k in (1, 5, 10)},
    **{f"text_to_image_r{k}": Metric(f"text → image, R@{k}", "image", k=k) for k in (1, 5, 10)},
    "alignment": Metric("alignment", ""),
    "image_uniformity": Metric("image uniformity", ""),
    "text_uniformity": Metric("text uniformity", ""),
    "inmodal_gap": Metric("in-modal gap × 100", "gap"),
    "crossmodal_gap": Metric("cross-modal gap × 100", "gap"),
}
SHARES = [metric for metric, of in METRICS.items() if of.kind not in ("", "gap")]
OF_GROUPS = ("top1", "subgroup_top1", "image_to_text_r1", "text_to_image_r1")  # in table.md
SHORT = (*OF_GROUPS, "consistency_1", "linear_probe", "inmodal_gap", "crossmodal_gap")
PAPER_TITLES = ("CLIP, paper", "CyCLIP, paper")
NEEDS = {  # metrics that the paper has and you may lack
    "coarse": "superclasses need --superclasses",
    "consistency_1": "the consistency score needs a train split",
    "linear_probe": "the linear probe needs --linear-probe and a train split",
}
# As icons.sh, pretrain and the demonstration call their runs: [NAME-]LOSS-SEED.
RUN = re.compile(rf"(.+?-)??({'|'.join(LOSSES)})-\d+")


def columns(result: Result) -> dict[str, Runs]:
    """Title -> the results of its runs: those that differ in the seed alone are one column."""
    found: dict[str, Runs] = {}
    for name, results in result["results"].items():
        match = RUN.fullmatch(name)
        title = f"{(match[1] or '')[:-1]} {LOSSES[match[2]].title}".strip() if match else name
        found.setdefault(title, []).append(results)
    return found


def queries(result: Result, name: str, metric: str, group: str = "") -> int:
    """How many answers a share is of; not of pictures that could not be read.

    Where it is a mean over styles, each thing counts once: its drawings are alike.
    """
    data = result["data_sets"][name]
    if group or data["mean_over"]:
        return max(data["groups"][style] for style in ([group] if group else data["mean_over"]))
    if METRICS[metric].kind == "image":
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
    if len(found) == 1 and metric in SHARES:
        return found[0], *wilson(found[0], queries(result, name, metric, group))
    return mean(found), min(found), max(found)


def chance(data: dict[str, Any], metric: str) -> float | None:
    """What answering by lot would give, as a share; None if it is not known."""
    kind, question, k = METRICS[metric][1:]
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


def cell(found: tuple[float, float, float] | None, metric: str) -> str:
    """A number of one column; empty if there is none."""
    if found is None:
        return ""
    if metric in SHARES:
        value, low, high = (f"{100 * share:.{digits(found[0])}f}" for share in found)
        return f"{value} ({low}–{high})"
    value, low, high = (f"{x * (100 if METRICS[metric].kind else 1):.2f}" for x in found)
    return value if found[1] == found[2] else f"{value} ({low} to {high})"


def markdown(result: Result, short: bool = False) -> str:
    """`table.md`: failures, a table for each data set, notes. short: headline metrics alone."""
    out = [f"# Evaluation of {result['date']}", "", indent(result["command"], "    "), ""]
    out += [f"- **Failed: {name}: {why}**" for name, why in result.get("failed", {}).items()]
    shown = columns(result)
    notes = [
        "In %, but for alignment, uniformity and gaps, where lower is better. In brackets: the 95% "
        "interval (Wilson) of one run, or the lowest and the highest of several, whose number is "
        "in the heading. chance: answering by lot. n: how many were asked.",
    ]
    marks = False
    for name, data in result["data_sets"].items():
        found = [run[name] for run in result["results"].values() if name in run]
        measured = [m for m in METRICS if any(m in run["numbers"] for run in found)]
        if not measured:
            continue
        paper = {m: PUBLISHED[name, m] for m in METRICS if (name, m) in PUBLISHED}
        if data.get("unlike_paper"):
            paper = {}
            notes.append(f"{name}: no column of the paper's: {data['unlike_paper']}.")
        marks = marks or bool(paper)
        heads = ["", *(f"{t} ({len(r)})" if len(r) > 1 else t for t, r in shown.items())]
        heads += [*(PAPER_TITLES if paper else ()), "chance", "n"]
        out += ["", f"## {name}: {sizes(data)}", "", f"| {' | '.join(heads)} |"]
        out += ["|---" + "|---:" * (len(heads) - 1) + "|"]
        wanted = [(m, "") for m in METRICS if m in measured or m in paper]
        wanted += [(m, group) for group in data["groups"] for m in OF_GROUPS if m in measured]
        for metric, group in wanted:
            if short and (group or metric not in SHORT):
                continue
            cells = [f"{group}: " * bool(group) + METRICS[metric].words]
            cells += [cell(summary(result, r, name, metric, group), metric) for r in shown.values()]
            if paper:
                p = None if group else paper.get(metric)
                cells += [f"{number:.2f} {p.origin[0]}" for number in p[:2]] if p else ["", ""]
            lot = chance(data, metric)
            known = lot is not None and not (group and METRICS[metric].kind in ("text", "image"))
            cells += [f"{100 * lot:.{digits(lot)}f}" if known and lot is not None else ""]
            cells += [f"{queries(result, name, metric, group):,}" if metric in SHARES else ""]
            out.append(f"| {' | '.join(cells)} |")
        if data["mean_over"]:
            notes.append(f"{name}: the mean over {', '.join(data['mean_over'])}.")
        notes += [f"{name}: {why}." for m, why in NEEDS.items() if m in paper and m not in measured]
        if broken := sorted({why for run in found for why in run.get("unreadable", [])}):
            notes.append(f"{name}: {len(broken)} unreadable, left out: {'; '.join(broken)}.")
    if marks:
        origins = "; ".join(f"{origin[0]}: {words}" for origin, words in ORIGINS.items())
        notes.append(f"Paper: Goel et al. 2022, RN50 on CC3M. {origins}.")
    notes += [f"Not evaluated: {name}: {why}." for name, why in result.get("absent", {}).items()]
    return "\n".join([*out, "", *(f"- {note}" for note in notes)]) + "\n"


def sizes(data: dict[str, Any]) -> str:
    """A data set in words."""
    counts = {"images": data["images"], "train images": data["train_images"]}
    counts |= {"classes" if q == "class" else f"{q}s": n for q, n in data["classes"].items()}
    counts |= {"templates": data["templates"], "texts": data.get("texts", data["captions"])}
    return ", ".join(f"{count:,} {what}" for what, count in counts.items() if count)
