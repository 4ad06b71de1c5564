"""What the paper used and published: its datasets, templates, superclasses and numbers.

`published.csv` has the numbers. Its columns are the dataset; the metric; the source, as the table's
heading shows it; the training pairs, only in rows of the source `DATA_SIZE`; a number in % for each
model; the mark, a key of `MARKS`; where the number was read; and a note.
"""

import csv
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from open_clip import OPENAI_IMAGENET_TEMPLATES
from torch import Tensor

from ..losses import LOSSES

FOLDER = Path(__file__).parent
# OpenAI's 80 prompts for ImageNet. The paper uses them for CIFAR, too.
TEMPLATES = [template("{}") for template in OPENAI_IMAGENET_TEMPLATES]


class Sizes(NamedTuple):
    """How many classes and images a dataset of the paper has. None: not known."""

    classes: int
    test_images: int | None
    train_images: int | None  # on which the authors fitted the linear probe


# Datasets for zero-shot classification in Goel et al. 2022.
ZERO_SHOT_SETS = {
    "cifar10": Sizes(10, 10_000, 50_000),
    "cifar100": Sizes(100, 10_000, 50_000),
    "imagenet1k": Sizes(1000, 50_000, None),
    "imagenetv2": Sizes(1000, 10_000, None),
    "imagenet-sketch": Sizes(1000, 50_889, None),
    "imagenet-a": Sizes(200, 7_500, None),
    "imagenet-r": Sizes(200, 30_000, None),
}
# Datasets for linear probes. Names are clip-benchmark's, without "wds_" and "vtab-".
PROBE_SETS = {
    "caltech101": Sizes(102, None, None),
    "dtd": Sizes(47, 1_880, 3_760),
    "fgvc-aircraft": Sizes(100, 3_333, 6_667),
    "flowers": Sizes(102, None, None),
    "food101": Sizes(101, 25_250, 75_750),
    "gtsrb": Sizes(43, 12_630, 26_640),
    "pets": Sizes(37, 3_669, 3_680),
    "renderedsst2": Sizes(2, 1_821, 6_920),
    "cars": Sizes(196, 8_041, 8_144),
    "stl10": Sizes(10, 8_000, 5_000),
    "svhn": Sizes(10, 26_032, 73_257),
}
SETS = {**ZERO_SHOT_SETS, **PROBE_SETS}
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


def why_incomparable(name: str, data: dict[str, Any], metric: str) -> str:
    """Why our numbers of a metric cannot be compared with published ones; "" if they can.

    name: of the dataset. data: what `report.describe` says about it.
    """
    if name not in SETS:
        return ""
    sizes = SETS[name]
    if sizes.test_images not in (None, data["images"]):
        return f"{data['images']:,} images, the paper's test split has {sizes.test_images:,}"
    trained = data["train_images"]
    if metric == "linear_probe" and sizes.train_images not in (None, trained):
        return f"the probe is fitted on {trained:,} images, the authors' on {sizes.train_images:,}"
    return ""


class Published(NamedTuple):
    """The numbers of a dataset and metric in one source."""

    metric: str
    source: str
    percent: dict[str, float]  # title of the model -> number in %
    mark: str
    note: str


@cache
def published(dataset: str) -> list[Published]:
    """The published numbers of a dataset, except those of the source `DATA_SIZE`."""
    with (FOLDER / "published.csv").open(encoding="utf-8", newline="") as file:
        return [
            Published(
                row["metric"],
                row["source"],
                {LOSSES[model].title: float(row[model]) for model in MODELS if row[model]},
                row["mark"],
                row["note"],
            )
            for row in csv.DictReader(file)
            if row["data_set"] == dataset and row["source"] != DATA_SIZE
        ]


def imagenet_superclasses() -> Tensor:
    """The superclass, 0 to 66, of each class of ImageNet: (1000,) int64.

    Each line of the file is "NAME: NUMBERS", and # begins a comment.
    """
    superclass = torch.full((1000,), -1)
    lines = (FOLDER / "imagenet_superclasses.txt").read_text(encoding="utf-8").splitlines()
    groups = [numbers for line in lines if (numbers := line.partition("#")[0].partition(":")[2])]
    for group, numbers in enumerate(groups):
        for part in numbers.split():
            first, _, last = part.partition("-")
            superclass[int(first) : int(last or first) + 1] = group
    return superclass


def cifar100_superclasses() -> Tensor:
    """The superclass of each class of CIFAR-100, (100,) int64. The classes are in alphabetical
    order.

    Each line of the file has the classes of a superclass, from
    https://www.cs.toronto.edu/~kriz/cifar.html.
    """
    lines = (FOLDER / "cifar100_superclasses.txt").read_text(encoding="utf-8").splitlines()
    superclass = {name: number for number, line in enumerate(lines) for name in line.split()}
    return torch.tensor([superclass[name] for name in sorted(superclass)])
