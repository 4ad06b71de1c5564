"""The record and the table of the experiment in siglip.sh.

`python -m reference_train.siglip_table RECORD [FOLDER ...]` collects the runs of the demonstration
in the folders into the CSV file RECORD, and prints its table. Without folders it only prints.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from .evaluate.records import read_evaluation
from .losses import LOSSES

SETTINGS = ["steps", "batch_size", "reference_batch_size", "lr", "loss", "penalty_weight", "seed"]
ONE_ROW = ["steps", "batch_size", "loss", "penalty_weight"]  # runs that are one row of the table
DATA_SETS = (
    "trained concepts, new styles",
    "new concepts, trained styles",
    "new concepts, new styles",
    "trained concepts, black and white",
)
METRICS = ("top1", "subgroup_top1", "text_to_image_r1")
ACCURACIES = [f"{data_set}: {metric}" for data_set in DATA_SETS for metric in METRICS]
GAPS = ("inmodal_gap", "crossmodal_gap", "image_uniformity")  # of the first data set
LAST_STEP = ("contrastive_loss", "logit_scale", "logit_bias")
# Columns of the table -> columns of the record.
TABLE = {
    "trained concepts, new styles: name": "trained concepts, new styles: top1",
    "– subgroup": "trained concepts, new styles: subgroup_top1",
    "– name → image": "trained concepts, new styles: text_to_image_r1",
    "new concepts: name": "new concepts, trained styles: top1",
}


def collect(folders: Sequence[Path]) -> pd.DataFrame:
    """The record: a row for each run in several folders of the demonstration."""
    rows = []
    for result in map(read_evaluation, folders):
        for title, run in result["checkpoints"].items():
            numbers = {name: x["numbers"] for name, x in result["results"][title].items()}
            row = {name: run[name] for name in SETTINGS}
            row["penalty_weight"] *= LOSSES[run["loss"]].crossmodal  # 0 without penalties
            row |= {f"{x}: {name}": numbers[x][name] for x in DATA_SETS for name in METRICS}
            row |= {name: numbers[DATA_SETS[0]][name] for name in GAPS}
            row |= {name: result["history"][title][-1][name] for name in LAST_STEP}
            rows.append({**row, "seconds": round(run["seconds"])})
    order = list(LOSSES).index
    return pd.DataFrame(rows).sort_values(
        SETTINGS, key=lambda column: column.map(order) if column.name == "loss" else column
    )


def table(record: pd.DataFrame) -> str:
    """The table in Markdown: the mean (lowest–highest) over seeds in %, a row for each setting.

    `cell` explains the marks after the numbers. The last column counts the differences that are
    shown, among all accuracies of the record.
    """
    rows = {name: runs.set_index("seed") for name, runs in record.groupby(ONE_ROW, sort=False)}
    heading = ["steps", "batch", "loss", "λ", "seeds", *TABLE, "ahead, behind, of 12"]
    lines = [f"| {' | '.join(heading)} |", "|---" * 5 + "|---:" * (len(TABLE) + 1) + "|"]
    for (steps, batch, loss, weight), runs in rows.items():
        plain = rows.get((steps, batch, "siglip", 0.0)) if loss != "siglip" else None
        fraction = f"1/{1 / weight:g}" if 0 < weight < 1 else f"{weight:g}"
        cells = [f"{steps}", f"{batch}", LOSSES[loss].title, fraction, f"{len(runs)}"]
        cells += [cell(runs, plain, column) for column in TABLE.values()]
        marks = "".join(cell(runs, plain, column)[-1] for column in ACCURACIES)
        enough = plain is not None and len(runs) >= 3
        cells.append(f"{marks.count('▲')}, {marks.count('▼')}" if enough else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def cell(runs: pd.DataFrame, plain: pd.DataFrame | None, column: str) -> str:
    """The mean (lowest–highest) over seeds in %, and how it compares with weight 0, `plain`.

    ▲ or ▼: the ranges of at least three seeds are apart. "k/n": it is higher with k of the n seeds.
    """
    values = 100 * runs[column]
    text = f"{values.mean():.1f} ({values.min():.1f}–{values.max():.1f})"
    if plain is None:
        return text
    others = 100 * plain[column]
    if min(len(values), len(others)) >= 3:
        if values.min() > others.max():
            return f"{text} ▲"
        if values.max() < others.min():
            return f"{text} ▼"
    differences = (values - others).dropna()  # of seeds that both have
    return f"{text} {(differences > 0).sum()}/{len(differences)}"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser("python -m reference_train.siglip_table", description=__doc__)
    parser.add_argument("record", type=Path)
    parser.add_argument("folders", type=Path, nargs="*")
    arguments = parser.parse_args()
    if arguments.folders:
        collect(arguments.folders).to_csv(arguments.record, index=False, float_format="%.6g")
    print(table(pd.read_csv(arguments.record)))


if __name__ == "__main__":
    main()
