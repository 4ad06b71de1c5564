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
first column, and then the other columns, each with its metric (A @ RECORD/RUN: of these runs only).
Each further line is a row: its title, and the runs, as RECORD/RUN with wildcards. So for a new row
add one line, and `make tables`. With ^ before the heading, rows and columns change places.
A row has all runs of one setting and version of the code. It is compared with the last row with
`*`. Runs of two commits are compared only if the page names both. `interval` has the rule.
"""

import csv
import json
import re
import sys
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from statistics import mean
from typing import Any

from scipy import stats

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "docs/*.md", "benchmarks/README.md", "reference_train/results/**/README.md")
BLOCKS = (ROOT / ".mkdocs/tables.txt").read_text(encoding="utf-8").split("\n\n")
SPECS = dict(block.split("\n", 1) for block in BLOCKS)
TABLE = re.compile(r"(?<=<!-- table )(\S+) -->\n(?:\n(?:\|[^\n]*\n)+)?")
SEED = re.compile(r"(\d+)(?:, .*)?$")  # ends the name of a run, if no ", 20 epochs" follows
# Endings of metrics without intervals. The first is shown × 100.
NOT_ACCURACIES = ("gap", "modality_gap", "uniformity", "correlation")
Numbers = dict[str, Any]  # those of a run by metric, and its "commit" if it is known
Values = dict[str, float]  # those of several runs by seed
# A row's title, and by metric its values and those that they are compared with.
Row = tuple[str, dict[str, Values], dict[str, Values]]


def runs_of(path: Path) -> Iterator[tuple[str, Numbers]]:
    """The runs of a record, and their numbers."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".txt":  # R@10 after each epoch, in %
        for block in text.split("\n\n"):
            if found := re.search(r"R@10: .*?([\d.]+)$", block, re.MULTILINE):
                title = re.sub(r": \d+ minutes.*", "", block.strip().partition("\n")[0])
                yield title, {"icons recall": float(found[1]) / 100}
    elif path.suffix == ".csv":
        found: dict[str, Numbers] = {}
        rows = list(csv.DictReader(text.splitlines()))
        # Costs are those of one process on two CPU cores, the ones that were measured last.
        rows = [row for row in rows if not row.get("ranks")]
        device = [x for row in rows if (x := row.get("device", "")).endswith("threads: 2")][-1:]
        for row in rows:
            if "section" not in row:
                numbers = {x: float(row[x]) for x in row if ": " in x and row[x]}
                found[row["run"]] = numbers | {"commit": row.get("commit")}
            elif (row["section"], [row["device"]]) == ("cost", device) and row["ms"]:
                # Time and memory of a loss. Later rows replace earlier ones.
                name, size = f"{row['dtype']}/{row['loss']}", f"{row['N']}x{row['D']}"
                cost = {f"{size} ms": float(row["ms"]), f"{size} MB": float(row["peak MB"])}
                found[name] = found.get(name, {}) | cost
        yield from found.items()
    else:
        record = json.loads(text)
        for title, measured in record["results"].items():
            numbers = {"commit": record["checkpoints"][title].get("commit")}
            for dataset, result in measured.items():
                for group, values in {"": result["numbers"], **result["groups"]}.items():
                    name = f"{dataset}/{group}".rstrip("/")
                    numbers |= {f"{name} {metric}": value for metric, value in values.items()}
                    if "image_to_text_r10" in values:  # R@10, the mean of both directions
                        both = (values["image_to_text_r10"], values["text_to_image_r10"])
                        numbers[f"{name} both_r10"] = mean(both)
            yield title, numbers


def cell(values: Values, metric: str, baseline: Values) -> str:
    """A cell of a table: the mean, and what `compare` says about an accuracy."""
    if not values:
        return "–"
    if metric.endswith(("ms", "MB")):
        (value,), unit = values.values(), metric.rpartition(" ")[2]
        value, unit = (value / 1000, "s") if unit == "ms" and value >= 1000 else (value, unit)
        return f"{float(f'{value:.3g}'):,g} {unit}"
    factor, digits = (1, 2) if metric.endswith(NOT_ACCURACIES[1:]) else (100, 1)
    text = f"{factor * mean(values.values()):.{digits}f}"
    if not metric.endswith(NOT_ACCURACIES):
        text += compare(values, baseline)
    return text.replace("-", "−")


def interval(values: Values, baseline: Values) -> tuple[float, float, float] | None:
    """The difference of two means and its 95% interval, in points.

    Runs of one seed share pairs, order and crops. So with three common seeds or more, it is the
    mean of the differences of each seed, and the interval is that of a paired t-test. Without
    common seeds it is Welch's, with three runs of each or more. Else None.
    """
    common = sorted(values.keys() & baseline.keys())
    if values == baseline or min(len(values), len(baseline)) < 3 or 0 < len(common) < 3:
        return None
    x, y = ([runs[seed] for seed in common or runs] for runs in (values, baseline))
    test = stats.ttest_rel(x, y) if common else stats.ttest_ind(x, y, equal_var=False)
    found = test.confidence_interval()
    return 100 * (mean(x) - mean(y)), 100 * float(found.low), 100 * float(found.high)


def compare(values: Values, baseline: Values) -> str:
    """The difference of two means with its interval, in points, and its mark.

    ▲ or ▼: the interval excludes 0. Without a mark no difference is shown.
    """
    if not (found := interval(values, baseline)):
        return ""
    difference, low, high = found
    return f", {difference:+.1f} ({low:.1f} to {high:.1f})" + " ▲" * (low > 0) + " ▼" * (high < 0)


def compared_rows(spec: str, page: str = "") -> Iterator[Row]:
    """The rows of a table. page: its whole text, which names the commits if there are two."""
    records, heading, *lines = spec.splitlines()
    folder, _, names = records.partition(": ")
    runs = [
        (f"{name.partition('.')[0]}/{title}", numbers)
        for name in names.split()
        for title, numbers in runs_of(ROOT / folder / name)
    ]
    metrics = [column.rsplit(" = ", 1)[1] for column in heading.split(" | ")[1:]]
    baseline: tuple[dict[str, Values], set[str]] = {}, set()
    for line in lines:
        title, _, patterns = line.removeprefix("* ").rpartition(" = ")
        shown = [
            (run, numbers)
            for run, numbers in runs
            if any(fnmatchcase(run, pattern) for pattern in patterns.split("; "))
        ]
        if not shown:
            raise SystemExit(f"no run {patterns}")
        values: dict[str, Values] = {metric: {} for metric in metrics}
        commits = {numbers.get("commit") or "no commit" for _, numbers in shown}
        for run, numbers in shown:
            seed = "".join(SEED.findall(run))
            for metric, found in values.items():
                name, _, only = metric.partition(" @ ")
                if name not in numbers or not fnmatchcase(run, only or "*"):
                    continue
                if found.setdefault(seed, numbers[name]) != numbers[name]:
                    raise SystemExit(f"{title}: two runs have the seed {seed}")
        if line.startswith("* "):
            baseline = values, commits
        compared = commits | baseline[1]
        if len(compared) > 1 and any(commit[:7] not in page for commit in compared):
            raise SystemExit(f"{title}: the page does not say that it compares {sorted(compared)}")
        yield title, values, baseline[0]


def table(spec: str, page: str = "") -> str:
    """The table that a block of tables.txt describes, without its name. page: its whole text."""
    first, *columns = spec.splitlines()[1].split(" | ")
    titles = [column.rsplit(" = ", 1)[0] for column in columns]
    rows = [[first.removeprefix("^ "), *titles]]
    for title, values, baseline in compared_rows(spec, page):
        cells = [
            str(max(map(len, values.values())))
            if name == "runs"
            else cell(values[name], name, baseline.get(name, {}))
            for name in values
        ]
        rows.append([title, *cells])
    if first.startswith("^"):
        rows = [list(row) for row in zip(*rows, strict=True)]
    heading, *lines = ("| " + " | ".join(row) + " |" for row in rows)
    return "\n".join([heading, "|---|" + "---:|" * (len(rows[0]) - 1), *lines])


def with_tables(page: str) -> str:
    """The text of a page with the tables of the records."""
    return TABLE.sub(lambda match: f"{match[1]} -->\n\n{table(SPECS[match[1]], page)}\n", page)


def stale(write: bool) -> list[str]:
    """The pages whose tables are not those of the records. write: whether to mend them."""
    found = []
    for path in sorted(path for page in PAGES for path in ROOT.glob(page)):
        text = path.read_text(encoding="utf-8")
        if (new := with_tables(text)) != text:
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
