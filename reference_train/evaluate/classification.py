"""Makes data sets of labelled images: adds templates, superclasses and the train split."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from . import imagenet, paper
from .datasets import Classes, DataSet, Images, Unusable, read_lines

# From https://www.cs.toronto.edu/~kriz/cifar.html. Each line has the classes of a superclass.
CIFAR100_SUPERCLASSES = Path(__file__).with_name("cifar100_superclasses.txt")
TEMPLATES = "zeroshot_classification_templates.txt"
LabelledImages = tuple[Images, Tensor | None]  # labels: (n,); None: there are none


def classification_set(
    folder: Path,
    name: str,
    test: tuple[Images, Tensor],
    names: list[str],
    read_train: Callable[[], LabelledImages] | None,
    imagenet_classes: Sequence[int] | None = None,
) -> DataSet:
    """A data set of images with one label each.

    Args:
        folder: may have a file of templates. The paper's data sets always have the paper's.
        name: of the data set.
        test: the images and their labels.
        names: of the classes.
        read_train: reads the train split. If that fails, the data set has no train split.
        imagenet_classes: ImageNet's number of each class; None: `name` decides.

    Raises `Unusable` if a data set of the paper has another number of classes than in the paper, or
    if ImageNet's classes are in another order.
    """
    templates = [line.replace("{c}", "{}") for line in read_lines(folder / TEMPLATES)]
    if name in paper.ZERO_SHOT_SETS:
        templates = paper.TEMPLATES
        expected = paper.ZERO_SHOT_SETS[name].classes
        if len(names) != expected:
            raise Unusable(f"{folder} has {len(names)} classes, not {expected}")
        if name.startswith("imagenet") and imagenet_classes is None:
            imagenet_classes = imagenet.class_numbers(name)
            imagenet.check_order(names, imagenet_classes)
    superclass = None
    if imagenet_classes is not None:
        superclass = imagenet.superclass_of(imagenet_classes)
    elif name == "cifar100":
        superclass = cifar100_superclass()
    images, labels = test
    classes = Classes(labels, names, templates or paper.TEMPLATES, superclass)
    data = DataSet(images, {"": classes})
    try:
        if read_train is not None:
            train_images, train_labels = read_train()
            if train_labels is None:
                raise Unusable("the samples of the train split have no .cls")
            data.train = train_images, {"": train_labels}
    except Exception as error:  # whatever reading the files raises
        data.train_error = " ".join(str(error).split())
    return data


def cifar100_superclass() -> Tensor:
    """The superclass of each class of CIFAR-100: (100,) int64."""
    superclass = {
        name: number
        for number, line in enumerate(read_lines(CIFAR100_SUPERCLASSES))
        for name in line.split()
    }
    # CIFAR-100's classes are in alphabetical order.
    return torch.tensor([superclass[name] for name in sorted(superclass)])
