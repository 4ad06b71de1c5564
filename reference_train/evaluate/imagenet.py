"""ImageNet's classes: their numbers, and the 67 superclasses of the paper.

Class numbers are 0 to 999 in the order of the WordNet identifiers, as OpenCLIP and timm have them.
"""

import pkgutil
from collections.abc import Sequence
from pathlib import Path

import torch
from open_clip import IMAGENET_CLASSNAMES
from timm.data.imagenet_info import ImageNetInfo
from torch import Tensor

from .datasets import Unusable, read_lines

# "NAME: NUMBERS" on each line; # begins a comment.
SUPERCLASSES = Path(__file__).with_name("imagenet_superclasses.txt")
SUBSETS = {"imagenet-a": "imagenet_a_indices.txt", "imagenet-r": "imagenet_r_indices.txt"}  # timm's


def class_numbers(data_set: str) -> list[int]:
    """The class number of each label of a data set: ImageNet's, ImageNet-A's or ImageNet-R's."""
    if data_set not in SUBSETS:
        return list(range(1000))
    content = pkgutil.get_data("timm.data", f"_info/{SUBSETS[data_set]}")
    assert content is not None
    return [int(number) for number in content.split()]


def check_order(names: Sequence[str], numbers: Sequence[int]) -> None:
    """Raises `Unusable` if the classes are not in ImageNet's order.

    Otherwise they would get the superclasses of other classes. Names that are not ImageNet's, such
    as translations, are not checked.

    names: the name of each label. numbers: the class number that each label should have.
    """
    known = set(IMAGENET_CLASSNAMES)
    for label, (name, number) in enumerate(zip(names, numbers, strict=True)):
        if name in known and name != IMAGENET_CLASSNAMES[number]:
            raise Unusable(
                f"class {label} is called {name!r}, but in ImageNet's order it is "
                f"{IMAGENET_CLASSNAMES[number]!r}: labels and class names should be in the order "
                "of the WordNet identifiers"
            )


def folder_numbers(folders: Sequence[str]) -> list[int]:
    """The class numbers of folders whose names are WordNet identifiers or class numbers.

    Raises ValueError for any other name. Its message is the name.
    """
    identifiers = ImageNetInfo("imagenet-1k").label_names()
    number_of = {identifier: number for number, identifier in enumerate(identifiers)}
    numbers = []
    for folder in folders:
        number = number_of.get(folder, int(folder) if folder.isdecimal() else -1)
        if not 0 <= number < len(identifiers):
            raise ValueError(folder)
        numbers.append(number)
    return numbers


def superclasses() -> dict[str, list[int]]:
    """The 67 superclasses: name -> class numbers."""
    groups: dict[str, list[int]] = {}
    for line in read_lines(SUPERCLASSES):
        name, _, numbers = line.partition("#")[0].partition(":")
        if not numbers:
            continue
        ranges = [part.split("-") for part in numbers.split()]
        groups[name] = [n for part in ranges for n in range(int(part[0]), int(part[-1]) + 1)]
    return groups


def superclass_of(numbers: Sequence[int]) -> Tensor:
    """The superclasses of classes, as numbers: (C,) int64. numbers: the class numbers."""
    superclass = {
        number: group for group, members in enumerate(superclasses().values()) for number in members
    }
    return torch.tensor([superclass[number] for number in numbers])
