"""What the paper used and published: its datasets, templates, superclasses and numbers.

`datasets.csv` has the datasets: first those of the zero-shot table, then those of linear probes
only. A number of images is 0 if it is not known.
`published.csv` has the numbers. Its columns are the dataset; the metric; the source, as the table's
heading shows it; a number in % for each model; the mark, a key of `MARKS`; and where the number was
read.
"""

from pathlib import Path
from typing import Any

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
    "be the paper's. Those of Caltech101, FGVC-Aircraft, Flowers and Pets are probably means over "
    "classes, not accuracies. The splits of Caltech101 and Flowers are not known",
    "April 2022": "linear probes that the authors' repository had in April 2022; all are "
    "accuracies. The splits of Caltech101 and Flowers are not known",
    "reproduced": "arXiv 2303.05952, by other authors, trained on CC3M. The mean of its linear "
    "probes is 61.05% for CLIP and 60.14% for CyCLIP",
}


def published(name: str, data: dict[str, Any]) -> dict[str, dict[str, str]]:
    """The published numbers of a dataset: metric -> heading -> number in %, with its mark.

    Without those of other numbers of test images, or linear probes of other numbers of train
    images.

    data: what `records.describe` says about the dataset.
    """
    table = pd.read_csv(FOLDER / "published.csv", dtype=str, keep_default_na=False)
    sizes = SETS.get(name, {"test_images": None})
    found: dict[str, dict[str, str]] = {}
    if sizes["test_images"] not in (0, data["images"]):
        return found
    for _, row in table[table["data_set"] == name].iterrows():
        is_probe = row["metric"] == "linear_probe"
        if is_probe and sizes["train_images"] not in (0, data["train_images"]):
            continue
        found.setdefault(row["metric"], {}).update(
            (f"{LOSSES[model].title}, {row['source']}", f"{row[model]} {row['mark']}")
            for model in MODELS
            if row[model]
        )
    return found
