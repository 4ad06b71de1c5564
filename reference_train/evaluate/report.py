"""The table of an evaluation: which numbers it shows, and how it reads.

`python -m reference_train report FOLDER ...` makes it again, in each folder.
"""

import math
import re
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from statistics import mean
from textwrap import indent
from typing import Any, NamedTuple

from rich.console import Console
from rich.markdown import Markdown

from ..command_line import Parser
from ..files import write_text
from ..losses import LOSSES
from . import paper
from .records import Result, read_evaluation

# Endings of the numbers that the terminal shows.
SHORT_ENDINGS = (
    *("top1", "_r1", "consistency_1", "linear_probe", "_gap", "_correlation"),
    *("mixed_r10", "mixed_r10_without_means"),
)
# Endings of the numbers that are not shown in %.
PLAIN_ENDINGS = ("alignment", "uniformity", "_correlation", "modality_gap")
HOW_TO_READ = (
    "Rows have the names of evaluation.json; docs/evaluation.md explains them. All numbers are in "
    "%, except alignment, uniformity, correlations and the modality gap. Alignment, uniformity and "
    "gaps are better if lower; correlations are higher if the model is more consistent. In "
    "brackets: the 95% interval (Wilson) of one run, or the lowest and the highest of several "
    "runs, whose number is in the heading. chance: the accuracy of guessing. n: the number of "
    "queries."
)


class Metric(NamedTuple):
    """What a number is. An accuracy is the share of queries with a right answer among k."""

    # What an answer is: "class", "superclass", "text" or "image"; "": the number is no accuracy.
    kind: str = ""
    task: str = "class"  # the key in the dataset's "classes"
    k: int = 1


def metric(name: str) -> Metric:
    """What a number is, by its name."""
    if re.fullmatch(r"(\w+_)?(coarse|fine)(_top\d+)?", name):
        return Metric("superclass")
    if found := re.fullmatch(r"(?:(\w+)_)?(?:top(\d+)|consistency_\d+)", name):
        return Metric("class", found[1] or "class", int(found[2] or 1))
    if found := re.fullmatch(r"\w+_to_(text|image)_r(\d+)", name):
        return Metric(found[1], k=int(found[2]))
    return Metric("class" if name == "linear_probe" else "")


def columns(result: Result) -> dict[str, list[str]]:
    """The columns of the table, in the order in which runs were first measured: heading -> runs.

    A column has the runs NAME-SEED that differ in their seed only.
    """
    found: dict[str, list[str]] = {}
    for run in result["results"]:
        title = run.removesuffix(f"-{result['checkpoints'][run]['seed']}")
        found.setdefault(LOSSES[title].title if title in LOSSES else title, []).append(run)
    return {x if len(runs) == 1 else f"{x} ({len(runs)})": runs for x, runs in found.items()}


def num_queries(data: dict[str, Any], kind: str) -> int:
    """The number of queries of an accuracy.

    If the accuracy is a mean over styles, each concept counts once, because its drawings are alike.
    """
    if data["mean_over"]:
        return max(data["groups"][style] for style in data["mean_over"])
    return int(data["captions" if kind == "image" else "images"])


def wilson(share: float, count: float) -> tuple[float, float]:
    """The 95% interval (Wilson 1927) of a share of `count` trials."""
    z2 = 1.96**2
    centre = share + z2 / (2 * count)
    half = math.sqrt(z2 * (share * (1 - share) / count + z2 / (4 * count**2)))
    return (centre - half) / (1 + z2 / count), (centre + half) / (1 + z2 / count)


def chance(data: dict[str, Any], name: str) -> float | None:
    """The accuracy of guessing; None if it is not known.

    In retrieval one of n candidates is right. If several images have the same caption, guessing is
    a little better than that.
    """
    kind, task, k = metric(name)
    if kind == "class":
        return min(1.0, k / data["classes"][task])
    if kind in ("text", "image"):
        return min(1.0, k / num_queries(data, "text"))
    return None


# The table.


def markdown(result: Result, short: bool = False) -> str:
    """The text of `table.md`: failures, a table for each dataset, notes.

    short: headline numbers only.
    """
    lines = [f"# Evaluation of {result['date']}", "", indent(result["command"], "    "), ""]
    lines += [f"- **Failed: {name}: {why}**" for name, why in result["failed"].items()]
    notes = [HOW_TO_READ]
    for name, data in result["data_sets"].items():
        titles, *rows = dataset_table(result, name, short)
        if not rows:
            continue
        sizes = {"images": data["images"], "train images": data["train_images"]}
        sizes |= {"classes" if x == "class" else f"{x}s": n for x, n in data["classes"].items()}
        sizes |= {"captions": data["captions"]}
        heading = ", ".join(f"{count:,} {what}" for what, count in sizes.items() if count)
        lines += ["", f"## {name}: {heading}", ""]
        escaped = [title.replace("|", r"\|") for title in titles]  # a file may be called a|b.pt
        lines.append(f"| {' | '.join(escaped)} |")
        lines.append("|---" + "|---:" * (len(titles) - 1) + "|")
        lines += [f"| {' | '.join(row)} |" for row in rows]
        if data["mean_over"]:
            notes.append(f"{name}: the mean over {', '.join(data['mean_over'])}.")
    text = "\n".join(lines)
    if sources := [source for source in paper.SOURCES if f", {source} |" in text]:
        notes += [f"{source}: {paper.SOURCES[source]}." for source in sources]
        notes.append("; ".join(f"{mark}: {words}" for mark, words in paper.MARKS.items()) + ".")
    return "\n".join([text, "", *(f"- {note}" for note in notes)]) + "\n"


def dataset_table(result: Result, name: str, short: bool) -> list[list[str]]:
    """The rows of a dataset's table, the headings first."""
    data, rows = result["data_sets"][name], dict[str, dict[str, str]]()
    for heading, runs in columns(result).items():
        measured = [
            result["results"][run][name]["numbers"]
            for run in runs
            if name in result["results"][run]
        ]
        for key in dict.fromkeys(chain.from_iterable(measured)):
            # R@1 says more than consistency_metrics' accuracies, which are among 10,000 pairs only.
            if key.endswith(SHORT_ENDINGS if short else "") and not key.endswith("_accuracy"):
                values = [numbers[key] for numbers in measured if key in numbers]
                rows.setdefault(key, {})[heading] = cell(key, values, data)
    published = paper.published(name, data)
    for key, row in rows.items():
        row |= published.get(key, {})
        if guess := chance(data, key):
            row["chance"] = f"{100 * guess:.{digits(guess)}f}"
        if kind := metric(key).kind:
            row["n"] = f"{num_queries(data, kind):,}"
    sources = chain.from_iterable(published[key] for key in rows if key in published)
    titles = dict.fromkeys([*columns(result), *sources, "chance", "n"])
    cells = [[key, *(row.get(title, "") for title in titles)] for key, row in rows.items()]
    return [["", *titles], *cells]


def digits(share: float) -> int:
    """How many decimals a share has, if it is shown in %."""
    return 1 if share >= 0.1 else 2


def cell(name: str, values: Sequence[float], data: dict[str, Any]) -> str:
    """A cell of the table: the mean of a number of several runs, and its bounds in brackets."""
    centre, bounds = mean(values), (min(values), max(values))
    if len(values) == 1 and (kind := metric(name).kind):
        bounds = wilson(centre, num_queries(data, kind))
    plain = name.endswith(PLAIN_ENDINGS)
    scale, decimals = (1, 2) if plain else (100, digits(centre))
    value, low, high = (f"{scale * x:.{decimals}f}" for x in (centre, *bounds))
    return value if low == high else f"{value} ({low} to {high})"


# The command.


def write(result: Result, record: Path) -> None:
    """Writes the table of a record, and prints a shorter one.

    The table of a folder is table.md, and that of evaluation-long.json is table-long.md beside it.
    """
    file = record / "evaluation.json" if record.is_dir() else record
    table = file.with_name(f"{file.stem.replace('evaluation', 'table')}.md")
    write_text(markdown(result), table)
    Console().print(Markdown(markdown(result, short=True)))
    print(f"\nWritten: {table}")


def main(argv: Sequence[str]) -> None:
    """`python -m reference_train report`."""
    description = "Makes table.md in folders of evaluate again. Runs NAME-SEED share a column."
    parser = Parser("python -m reference_train report", description=description)
    add = parser.add_argument
    text = "a folder of evaluate, or an evaluation.json"
    add("folders", nargs="+", type=Path, metavar="FOLDER", help=text)
    arguments = parser.parse_args(argv)
    results = [read_evaluation(folder) for folder in arguments.folders]
    for folder, result in zip(arguments.folders, results, strict=True):
        write(result, folder)
