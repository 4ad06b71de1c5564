"""The paper's data sets: their splits and templates, and which data sets compare with them."""

from typing import Any, NamedTuple

from open_clip import OPENAI_IMAGENET_TEMPLATES

TEMPLATES = [template("{}") for template in OPENAI_IMAGENET_TEMPLATES]  # the 80, for CIFAR too


class Split(NamedTuple):
    """A data set of the paper: how many classes and images it has. None: not known."""

    classes: int
    test_images: int | None
    train_images: int | None  # what the authors fitted the linear probe on


# Goel et al. 2022 classify these zero-shot.
ZERO_SHOT_SETS = {
    "cifar10": Split(10, 10_000, 50_000),
    "cifar100": Split(100, 10_000, 50_000),
    "imagenet1k": Split(1000, 50_000, None),
    "imagenetv2": Split(1000, 10_000, None),
    "imagenet-sketch": Split(1000, 50_889, None),
    "imagenet-a": Split(200, 7_500, None),
    "imagenet-r": Split(200, 30_000, None),
}
# They fit a linear probe on these. Names are as in clip-benchmark, without "wds_" and "vtab-".
PROBE_SETS = {
    "caltech101": Split(102, None, None),
    "dtd": Split(47, 1_880, 3_760),
    "fgvc-aircraft": Split(100, 3_333, 6_667),
    "flowers": Split(102, None, None),
    "food101": Split(101, 25_250, 75_750),
    "gtsrb": Split(43, 12_630, 26_640),
    "pets": Split(37, 3_669, 3_680),
    "renderedsst2": Split(2, 1_821, 6_920),
    "cars": Split(196, 8_041, 8_144),
    "stl10": Split(10, 8_000, 5_000),
    "svhn": Split(10, 26_032, 73_257),
}
SETS = {**ZERO_SHOT_SETS, **PROBE_SETS}


def why_incomparable(name: str, data: dict[str, Any], metric: str) -> str:
    """Why published numbers of a metric cannot stand beside a data set's own; "" if they can.

    data: the data set as `report.describe` describes it.
    """
    if name not in SETS:
        return ""
    split = SETS[name]
    if split.test_images not in (None, data["images"]):
        return f"{data['images']:,} images, the paper's test split has {split.test_images:,}"
    trained = data["train_images"]
    if metric == "linear_probe" and split.train_images not in (None, trained):
        return f"the probe is fitted on {trained:,} images, the authors' on {split.train_images:,}"
    return ""
