"""Published numbers of models trained on CC3M, in %, for the columns next to yours: published.csv.

A cell is CLIP's number, CyCLIP's and a mark. Those marked c were read in the repository of the
paper's authors (github.com/goel-shashank/CyCLIP, today's or its history:
utils/fine_coarse_plot.py, utils/linear_probe_plot.py).
"""

import csv
from pathlib import Path

MARKS = {"c": "read in the authors' repository", "q": "quoted, not checked"}
NOTES = {
    "paper": "Goel et al. 2022, RN50. Those marked q, with ImageNet's, are gains of 10.2 to 23.9% "
    "(CIFAR, ImageNet) and 10.2 to 26.5% (shifts), where its abstract says 10 to 24% and 10 to 27%",
    "reproduced": "arXiv 2303.05952, by other authors. There CLIP's linear probes are at 61.05% on "
    "average and CyCLIP's at 60.14%",
}


SPLITS = {  # the paper's test splits: classes, images
    "cifar10": (10, 10_000),
    "cifar100": (100, 10_000),
    "imagenet1k": (1000, 50_000),
    "imagenetv2": (1000, 10_000),
    "imagenet-sketch": (1000, 50_889),
    "imagenet-a": (200, 7_500),
    "imagenet-r": (200, 30_000),
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
