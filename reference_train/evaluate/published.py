"""Published numbers, from published.csv.

Its columns are the data set; the metric; the source, as the table's heading shows it; the training
pairs, only in rows of the source `DATA_SIZE`; a number in % for each model; the mark, a key of
`MARKS`; where the number was read; and a note.
"""

import csv
from functools import cache
from pathlib import Path
from typing import NamedTuple

from ..losses import LOSSES

MODELS = ("clip", "cyclip", "c-cyclip", "i-cyclip")
DATA_SIZE = "data size"  # the source of the paper's runs with several numbers of training pairs
MARKS = {
    "c": "read in the repository of the paper's authors (github.com/goel-shashank/CyCLIP), in the "
    "file and commit that published.csv says",
    "q": "quoted, not checked",
}
SOURCES = {
    "paper": "Goel et al. 2022, RN50 trained on CC3M. CyCLIP's relative gains in zero-shot "
    "top-1 are 10.2 to 23.9% (CIFAR, ImageNet) and 10.2 to 26.5% (shifts); the abstract says 10 to "
    "24% and 10 to 27%",
    "May 2022": "linear probes that the authors' repository has had since May 2022; they may not "
    "be the paper's",
    "April 2022": "linear probes that the authors' repository had in April 2022; all are "
    "accuracies",
    "reproduced": "arXiv 2303.05952, by other authors, trained on CC3M. The mean of its linear "
    "probes is 61.05% for CLIP and 60.14% for CyCLIP",
}


class Published(NamedTuple):
    """The numbers of a data set and metric in one source."""

    data_set: str
    metric: str
    source: str
    pairs: int | None
    percent: dict[str, float]  # title of the model -> number in %
    mark: str
    where: str
    note: str


@cache
def read() -> tuple[Published, ...]:
    """All published numbers."""
    with Path(__file__).with_name("published.csv").open(encoding="utf-8", newline="") as file:
        return tuple(
            Published(
                row["data_set"],
                row["metric"],
                row["source"],
                int(row["pairs"]) if row["pairs"] else None,
                {LOSSES[model].title: float(row[model]) for model in MODELS if row[model]},
                row["mark"],
                row["where"],
                row["note"],
            )
            for row in csv.DictReader(file)
        )


def for_table(data_set: str) -> list[Published]:
    """The published numbers of a data set, except those of the source `DATA_SIZE`."""
    return [row for row in read() if row.data_set == data_set and row.source != DATA_SIZE]


def by_pairs(data_set: str) -> dict[str, dict[int, float]]:
    """Model -> number of training pairs -> zero-shot top-1 in %."""
    found: dict[str, dict[int, float]] = {}
    for row in read():
        if (row.data_set, row.source) == (data_set, DATA_SIZE) and row.pairs is not None:
            for model, percent in row.percent.items():
                found.setdefault(model, {})[row.pairs] = percent
    return found
