"""What the paper used and published: its datasets, templates, superclasses and numbers.

`datasets.csv` has the datasets: first those of the zero-shot table, then those of linear probes
only. A number of images is 0 if it is not known.
`published.csv` has the numbers. Its columns are the dataset; the metric; the source, as the table's
heading shows it; a number in % for each model; the mark, a key of `MARKS`; where the number was
read; and a note. Nothing reads `published_data_size.csv`, of runs on other numbers of pairs.
"""

from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from open_clip import OPENAI_IMAGENET_TEMPLATES

from ..losses import LOSSES

FOLDER = Path(__file__).parent
# OpenAI's 80 prompts for ImageNet. The paper uses them for CIFAR, too.
TEMPLATES = [template("{}") for template in OPENAI_IMAGENET_TEMPLATES]


# Name -> how many classes, test images and train images a dataset of the paper has. Names are
# clip-benchmark's, without "wds_" and "vtab-".
SETS = pd.read_csv(FOLDER / "datasets.csv", index_col="name").to_dict("index")
# The classes of a dataset in their order, with the superclass of each.
IMAGENET, CIFAR100 = (
    pd.read_csv(FOLDER / f"{name}_classes.csv", comment="#", index_col="class")
    for name in ("imagenet", "cifar100")
)
MODELS = ("clip", "cyclip", "c-cyclip", "i-cyclip")
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

    name: of the dataset. data: what `records.describe` says about it.
    """
    sizes = SETS.get(name, {"test_images": 0, "train_images": 0})
    if sizes["test_images"] not in (0, data["images"]):
        return f"{data['images']:,} images, the paper's test split has {sizes['test_images']:,}"
    fitted, theirs = data["train_images"], sizes["train_images"]
    if metric == "linear_probe" and theirs not in (0, fitted):
        return f"the probe is fitted on {fitted:,} images, the authors' on {theirs:,}"
    return ""


class Published(NamedTuple):
    """The numbers of a dataset and metric in one source."""

    metric: str
    source: str
    note: str
    cells: dict[str, str]  # heading -> number in %, with its mark


def published(dataset: str) -> list[Published]:
    """The published numbers of a dataset."""
    table = pd.read_csv(FOLDER / "published.csv", dtype=str, keep_default_na=False)
    found = []
    for _, row in table[table["data_set"] == dataset].iterrows():
        mark = row["mark"] + "*" * bool(row["note"])
        cells = {
            f"{LOSSES[model].title}, {row['source']}": f"{row[model]} {mark}"
            for model in MODELS
            if row[model]
        }
        found.append(Published(row["metric"], row["source"], row["note"], cells))
    return found
