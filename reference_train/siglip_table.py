"""The record and the table of the experiment in siglip.sh.

`python -m reference_train.siglip_table RECORD [FOLDER ...]` collects the runs of the demonstration
in the folders into the CSV file RECORD, and prints its table. Without folders it only prints.
"""

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from .evaluate.report import Result, read_evaluation
from .losses import LOSSES

SETTINGS = ("steps", "batch_size", "reference_batch_size", "lr", "loss", "penalty_weight", "seed")
# Columns of the record -> a data set and a metric of it.
METRICS = {
    f"{data_set}: {metric}": (data_set, metric)
    for data_set in (
        "trained concepts, new styles",
        "new concepts, trained styles",
        "new concepts, new styles",
        "trained concepts, black and white",
    )
    for metric in ("top1", "subgroup_top1", "text_to_image_r1")
}
GAPS = ("inmodal_gap", "crossmodal_gap", "image_uniformity")  # of the first data set
LAST_STEP = ("contrastive_loss", "logit_scale", "logit_bias")
# Columns of the table -> columns of the record.
TABLE = {
    "trained concepts, new styles: name": "trained concepts, new styles: top1",
    "– subgroup": "trained concepts, new styles: subgroup_top1",
    "– name → image": "trained concepts, new styles: text_to_image_r1",
    "new concepts: name": "new concepts, trained styles: top1",
}
Row = dict[str, str]


def rows_of(result: Result) -> list[Row]:
    """A row of the record for each run in an evaluation."""
    rows = []
    for title, run in result["checkpoints"].items():
        row = {name: run[name] for name in SETTINGS}
        if not (LOSSES[run["loss"]].inmodal or LOSSES[run["loss"]].crossmodal):
            row["penalty_weight"] = 0.0
        measured = result["results"][title]
        for column, (data_set, metric) in METRICS.items():
            row[column] = round(measured[data_set]["numbers"][metric], 5)
        first = next(iter(METRICS.values()))[0]
        row |= {name: f"{measured[first]['numbers'][name]:.5g}" for name in GAPS}
        last_step = result["history"][title][-1]
        row |= {name: f"{last_step[name]:.5g}" for name in LAST_STEP if name in last_step}
        row["seconds"] = round(run["seconds"])
        rows.append({name: str(value) for name, value in row.items()})
    return rows


def collect(folders: Sequence[Path], record: Path) -> None:
    """Writes the runs in several folders of the demonstration to one record."""
    rows = [row for folder in folders for row in rows_of(read_evaluation(folder))]
    rows.sort(key=lambda row: [sort_key(row[name]) for name in SETTINGS])
    columns = [*SETTINGS, *METRICS, *GAPS, *LAST_STEP, "seconds"]
    with record.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def sort_key(value: str) -> tuple[float, str]:
    """Numbers by value, and then the losses in the order of LOSSES."""
    if value in LOSSES:
        return float(list(LOSSES).index(value)), value
    return float(value), ""


def table(rows: Sequence[Row]) -> str:
    """The table in Markdown: the mean (lowest–highest) over seeds in %, a row for each setting.

    `cell` explains the marks after the numbers. The last column counts the differences that are
    shown, among all accuracies of the record.
    """
    settings = [name for name in SETTINGS if name not in ("seed", "lr", "reference_batch_size")]
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in settings), []).append(row)
    counts = f"ahead, behind, of {len(METRICS)}"
    lines = [
        "| " + " | ".join(["steps", "batch", "loss", "λ", "seeds", *TABLE, counts]) + " |",
        "|---|---|---|---|---|" + "---:|" * (1 + len(TABLE)),
    ]
    for (steps, batch, loss, weight), runs in groups.items():
        plain = groups.get((steps, batch, "siglip", "0.0"), [])
        cells = [steps, batch, LOSSES[loss].title, fraction(float(weight)), str(len(runs))]
        others = plain if loss != "siglip" else []
        cells += [cell(runs, others, column) for column in TABLE.values()]
        marks = "".join(cell(runs, others, column)[-1] for column in METRICS)
        enough = min(len(runs), len(others)) >= 3
        cells.append(f"{marks.count('▲')}, {marks.count('▼')}" if enough else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def fraction(weight: float) -> str:
    """0.25 -> "1/4"."""
    return f"1/{1 / weight:g}" if 0 < weight < 1 else f"{weight:g}"


def cell(runs: Sequence[Row], plain: Sequence[Row], column: str) -> str:
    """The mean (lowest–highest) over seeds in %, and how it compares with weight 0.

    ▲ or ▼: the ranges of at least three seeds are apart. "k/n": it is higher with k of the n seeds.
    """
    values = {row["seed"]: float(row[column]) for row in runs}
    others = {row["seed"]: float(row[column]) for row in plain}
    low, high = min(values.values()), max(values.values())
    text = f"{100 * mean(values.values()):.1f} ({100 * low:.1f}–{100 * high:.1f})"
    both = values.keys() & others.keys()
    if not both:
        return text
    if min(len(values), len(others)) >= 3:
        if low > max(others.values()):
            return f"{text} ▲"
        if high < min(others.values()):
            return f"{text} ▼"
    return f"{text} {sum(values[seed] > others[seed] for seed in both)}/{len(both)}"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser("python -m reference_train.siglip_table", description=__doc__)
    parser.add_argument("record", type=Path)
    parser.add_argument("folders", type=Path, nargs="*")
    arguments = parser.parse_args()
    if arguments.folders:
        collect(arguments.folders, arguments.record)
    with arguments.record.open(encoding="utf-8", newline="") as file:
        print(table(list(csv.DictReader(file))))


if __name__ == "__main__":
    main()
