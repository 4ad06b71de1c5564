"""CIFAR-10 and CIFAR-100 as torchvision downloads them."""

from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torchvision.datasets import CIFAR10

from .classification import classification_set
from .datasets import DataSet, Images


def open_cifar(root: Path, kind: type[CIFAR10]) -> DataSet:
    """torchvision's CIFAR-10 or CIFAR-100. root: the folder that holds its folder."""

    def read(train: bool) -> tuple[Images, Tensor]:
        split = kind(root, train=train)
        return Images(torch.from_numpy(split.data).permute(0, 3, 1, 2)), torch.tensor(split.targets)

    names = [name.replace("_", " ") for name in kind(root, train=False).classes]
    return classification_set(
        root, kind.__name__.lower(), read(train=False), names, partial(read, train=True)
    )
