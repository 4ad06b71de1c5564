"""Published numbers of models trained on CC3M, in %, for the columns next to yours.

"paper" is Goel et al. 2022; "reproduced" is arXiv 2303.05952, by other authors. Each number has a
mark: c, it was read in the paper's authors' repository (github.com/goel-shashank/CyCLIP, today's or
its history: utils/fine_coarse_plot.py, utils/linear_probe_plot.py); q, it is quoted, and was not
checked against its own table.
"""

from typing import NamedTuple

MARKS = {"c": "read in the authors' repository", "q": "quoted, not checked"}
NOTES = {
    "paper": "Goel et al. 2022, RN50. Those marked q, with ImageNet's, are gains of 10.2 to 23.9% "
    "(CIFAR, ImageNet) and 10.2 to 26.5% (shifts), where its abstract says 10 to 24% and 10 to 27%",
    "reproduced": "arXiv 2303.05952, by other authors. There CLIP's linear probes are at 61.05% on "
    "average and CyCLIP's at 60.14%",
}


class Published(NamedTuple):
    """One number of both models."""

    clip: float
    cyclip: float
    mark: str


SPLITS = {  # the paper's test splits: classes, images
    "cifar10": (10, 10_000),
    "cifar100": (100, 10_000),
    "imagenet1k": (1000, 50_000),
    "imagenetv2": (1000, 10_000),
    "imagenet-sketch": (1000, 50_889),
    "imagenet-a": (200, 7_500),
    "imagenet-r": (200, 30_000),
}
# CLIP's/CyCLIP's. Of the paper's top1, all but ImageNet's are quoted.
TABLES = {
    "paper": """
cifar10 cifar100 imagenet1k imagenetv2 imagenet-sketch imagenet-a imagenet-r
top1           46.54/51.45 18.69/23.15 20.03/22.08 16.91/19.22 10.37/12.26 4.23/5.35   24.32/26.79
consistency_1  44.60/48.81 16.21/20.43 16.34/19.20 -           -           -           -
consistency_3  46.04/50.89 17.28/21.96 17.42/20.31 -           -           -           -
consistency_5  47.06/52.30 18.42/23.18 18.58/21.95 -           -           -           -
consistency_10 48.45/53.71 19.36/24.31 19.78/23.94 -           -           -           -
fine           -           43.55/47.11 34.18/35.46 31.10/33.01 25.11/26.42 40.09/41.25 54.49/55.36
coarse         -           34.82/40.37 52.11/56.79 47.24/52.15 37.03/41.57 14.59/16.48 40.51/44.43
linear_probe   78.27/77.34 72.37/72.77 35.47/36.69 -           -           -           -
""",
    "reproduced": """
cifar10 cifar100 imagenet1k imagenetv2 imagenet-sketch imagenet-a imagenet-r
top1           44.95/43.22 15.05/15.09 16.72/17.77 14.11/15.25 8.61/8.30   2.81/3.27   19.07/19.85
""",
}


def published(name: str) -> dict[str, dict[str, Published]]:
    """Source -> metric -> its numbers on a data set; without sources that have none."""
    found: dict[str, dict[str, Published]] = {}
    for source, table in TABLES.items():
        names, *rows = map(str.split, table.strip().splitlines())
        for metric, *cells in rows:
            cell = dict(zip(names, cells, strict=True)).get(name, "-")
            if cell != "-":
                clip, cyclip = map(float, cell.split("/"))
                checked = source == "paper" and (metric != "top1" or name == "imagenet1k")
                number = Published(clip, cyclip, "c" if checked else "q")
                found.setdefault(source, {})[metric] = number
    return found


def titles(source: str) -> tuple[str, str]:
    """The columns of a source."""
    return f"CLIP, {source}", f"CyCLIP, {source}"
