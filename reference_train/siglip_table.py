"""The record of the experiment in siglip.sh.

`python -m reference_train.siglip_table RECORD FOLDER ...` collects the runs of the demonstration in
the folders into the CSV file RECORD. `.mkdocs/tables.py` makes the tables of pages from it.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from .evaluate.records import read_evaluation
from .losses import LOSSES

SETTINGS = ["steps", "batch_size", "reference_batch_size", "lr", "loss", "penalty_weight", "seed"]
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


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser("python -m reference_train.siglip_table", description=__doc__)
    parser.add_argument("record", type=Path)
    parser.add_argument("folders", type=Path, nargs="+")
    arguments = parser.parse_args()
    collect(arguments.folders).to_csv(arguments.record, index=False, float_format="%.6g")


if __name__ == "__main__":
    main()
