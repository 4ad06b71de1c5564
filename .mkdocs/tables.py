"""Writes the result tables of the pages from the records.

    python .mkdocs/tables.py           write them
    python .mkdocs/tables.py --check   exit with status 1 if a page is not what this would write

A table stands on its page below a comment with its name: `<!-- table icons -->`. What it shows is
in tables.txt, a block of lines for each table:

    icons
    reference_train/results/icons: runs.txt
    loss, steps | R@10 = icons recall | runs = runs
    * CLIP, 512 = runs/clip-[012]; runs/again-clip-?
    CyCLIP, 512 = runs/cyclip-?

The first line is the name. The second line has the records. The third line has the heading of the
first column, and then the other columns, each with its metric (A / B: of runs that have A, and of
runs that have B). Each further line is a row: its
title, and the runs, as RECORD/RUN with wildcards. So for a new row add one line, and `make tables`.
A row has all runs of one setting and build of the code. It is compared with the last row with `*`,
which must be of the same build. `cell` has the rule.
"""

import csv
import json
import re
import sys
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from statistics import mean

from scipy import stats

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "docs/*.md", "benchmarks/README.md", "reference_train/results/*/README.md")
BLOCKS = (ROOT / ".mkdocs/tables.txt").read_text(encoding="utf-8").split("\n\n")
SPECS = dict(block.split("\n", 1) for block in BLOCKS)
SETTINGS = ("steps", "batch_size", "loss", "penalty_weight", "seed")  # of a demonstration's run
TABLE = re.compile(r"(?<=<!-- table )(\S+) -->\n(?:\n(?:\|[^\n]*\n)+)?")
NOT_ACCURACIES = ("gap", "uniformity", "correlation")  # endings of metrics without intervals
Numbers = dict[str, float]
Values = dict[str, list[float]]  # of several runs


def runs_of(path: Path) -> Iterator[tuple[str, Numbers]]:
    """The runs of a record, and their numbers."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".txt":  # R@10 after each epoch, in %
        for block in text.split("\n\n"):
            if found := re.search(r"R@10: .*?([\d.]+)$", block, re.MULTILINE):
                title = re.sub(r": \d+ minutes.*", "", block.strip().partition("\n")[0])
                yield title, {"icons recall": float(found[1]) / 100}
    elif path.suffix == ".csv":
        rows = list(csv.DictReader(text.splitlines()))
        if "commit" in rows[0]:  # times and memory of losses
            yield from costs_of(rows)
            return
        for row in rows:
            title = " ".join(row[x] for x in SETTINGS) if "steps" in row else row["run"]
            numbers = {name: float(row[name]) for name in row if ": " in name and row[name]}
            yield title, numbers
    else:
        for title, measured in json.loads(text)["results"].items():
            numbers = {}
            for dataset, result in measured.items():
                for group, values in {"": result["numbers"], **result["groups"]}.items():
                    name = f"{dataset}/{group}".rstrip("/")
                    numbers |= {f"{name} {metric}": value for metric, value in values.items()}
                    if "image_to_text_r10" in values:  # R@10, the mean of both directions
                        both = (values["image_to_text_r10"], values["text_to_image_r10"])
                        numbers[f"{name} both_r10"] = mean(both)
            yield title, numbers


def costs_of(rows: list[dict[str, str]]) -> Iterator[tuple[str, Numbers]]:
    """The numbers of each loss on each device. Later rows of a size replace earlier rows."""
    found: dict[str, Numbers] = {}
    for row in rows:
        if row["section"] == "cost" and row["ms"] and not row["ranks"]:
            numbers = found.setdefault(f"{row['device']}, {row['dtype']}/{row['loss']}", {})
            for column, unit in (("ms", "ms"), ("peak MB", "MB")):
                numbers[f"{row['N']}x{row['D']} {unit}"] = float(row[column])
    yield from found.items()


def cell(values: list[float], metric: str, baseline: list[float]) -> str:
    """A cell of a table: the mean, and what `compare` says about an accuracy."""
    if not values:
        return "–"
    if metric.endswith(("ms", "MB")):
        (value,), unit = values, metric.rpartition(" ")[2]
        value, unit = (value / 1000, "s") if unit == "ms" and value >= 1000 else (value, unit)
        return f"{float(f'{value:.3g}'):,g} {unit}"
    factor, digits = (1, 2) if metric.endswith(NOT_ACCURACIES[1:]) else (100, 1)
    text = f"{factor * mean(values):.{digits}f}"
    if not metric.endswith(NOT_ACCURACIES):
        text += compare(values, baseline)
    return text.replace("-", "−")


def interval(values: list[float], baseline: list[float]) -> tuple[float, float] | None:
    """The 95% interval (Welch) of the difference of two means; None for fewer than three runs."""
    if min(len(values), len(baseline)) < 3 or values == baseline:
        return None
    found = stats.ttest_ind(values, baseline, equal_var=False).confidence_interval()
    return float(found.low), float(found.high)


def compare(values: list[float], baseline: list[float]) -> str:
    """The difference of two means with its interval, in points, and its mark.

    ▲ or ▼: the interval excludes 0. Without a mark no difference is shown.
    """
    if not (bounds := interval(values, baseline)):
        return ""
    low, high = (100 * bound for bound in bounds)
    difference = 100 * (mean(values) - mean(baseline))
    return f", {difference:+.1f} ({low:.1f} to {high:.1f})" + " ▲" * (low > 0) + " ▼" * (high < 0)


def compared_rows(spec: str) -> Iterator[tuple[str, Values, Values]]:
    """The title of each row of a table, and its numbers and its baseline's by metric."""
    records, heading, *lines = spec.splitlines()
    folder, _, names = records.partition(": ")
    runs = [
        (f"{name.partition('.')[0]}/{title}", numbers)
        for name in names.split()
        for title, numbers in runs_of(ROOT / folder / name)
    ]
    metrics = [column.rsplit(" = ", 1)[1] for column in heading.split(" | ")[1:]]
    baseline: Values = {}
    for line in lines:
        title, _, patterns = line.removeprefix("* ").rpartition(" = ")
        shown = [
            numbers
            for run, numbers in runs
            if any(fnmatchcase(run, pattern) for pattern in patterns.split("; "))
        ]
        if not shown:
            raise SystemExit(f"no run {patterns}")
        values = {
            metric: [run[name] for run in shown for name in metric.split(" / ") if name in run]
            for metric in metrics
        }
        baseline = values if line.startswith("* ") else baseline
        yield title, values, baseline


def table(spec: str) -> str:
    """The table that a block of tables.txt describes, without its name."""
    first, *columns = spec.splitlines()[1].split(" | ")
    titles = [column.rsplit(" = ", 1)[0] for column in columns]
    rows = ["| " + " | ".join([first, *titles]) + " |", "|---|" + "---:|" * len(titles)]
    for title, values, baseline in compared_rows(spec):
        cells = [
            str(max(map(len, values.values())))
            if name == "runs"
            else cell(values[name], name, baseline.get(name, []))
            for name in values
        ]
        rows.append("| " + " | ".join([title, *cells]) + " |")
    return "\n".join(rows)


def stale(write: bool) -> list[str]:
    """The pages whose tables are not those of the records. write: whether to mend them."""
    found = []
    for path in sorted(path for page in PAGES for path in ROOT.glob(page)):
        text = path.read_text(encoding="utf-8")
        new = TABLE.sub(lambda match: f"{match[1]} -->\n\n{table(SPECS[match[1]])}\n", text)
        if new != text:
            found.append(path.relative_to(ROOT).as_posix())
            if write:
                path.write_text(new, encoding="utf-8")
    return found


if __name__ == "__main__":
    check = "--check" in sys.argv[1:]
    changed = stale(write=not check)
    for page in changed:
        print(f"{page} is stale: run `make tables`" if check else page)
    sys.exit(bool(check and changed))
