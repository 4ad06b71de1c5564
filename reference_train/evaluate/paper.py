"""The paper's data sets, their sizes and templates, and whether a data set is comparable."""

from typing import Any, NamedTuple

from open_clip import OPENAI_IMAGENET_TEMPLATES

# OpenAI's 80 prompts for ImageNet. The paper uses them for CIFAR, too.
TEMPLATES = [template("{}") for template in OPENAI_IMAGENET_TEMPLATES]


class Sizes(NamedTuple):
    """How many classes and images a data set of the paper has. None: not known."""

    classes: int
    test_images: int | None
    train_images: int | None  # on which the authors fitted the linear probe


# Data sets for zero-shot classification in Goel et al. 2022.
ZERO_SHOT_SETS = {
    "cifar10": Sizes(10, 10_000, 50_000),
    "cifar100": Sizes(100, 10_000, 50_000),
    "imagenet1k": Sizes(1000, 50_000, None),
    "imagenetv2": Sizes(1000, 10_000, None),
    "imagenet-sketch": Sizes(1000, 50_889, None),
    "imagenet-a": Sizes(200, 7_500, None),
    "imagenet-r": Sizes(200, 30_000, None),
}
# Data sets for linear probes. Names are clip-benchmark's, without "wds_" and "vtab-".
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


def why_incomparable(name: str, data: dict[str, Any], metric: str) -> str:
    """Why our numbers of a metric cannot be compared with published ones; "" if they can.

    name: of the data set. data: what `report.describe` says about it.
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
