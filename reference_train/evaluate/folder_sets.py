"""Data sets of image files: a folder for each class, or the CyCLIP authors' labels.csv."""

import ast
import csv
from functools import partial
from pathlib import Path

import torch
from open_clip import IMAGENET_CLASSNAMES
from torch import Tensor
from torchvision.datasets import ImageFolder

from . import imagenet
from .classification import Split, classified
from .datasets import DataSet, Images, Unusable, lines

LABELS = "labels.csv"


def open_folders(folder: Path, name: str) -> DataSet:
    """Images in a folder for each class, directly in `folder` or in its `test` and `train`.

    Class names come from `classnames.txt`, or from the names of the folders. If `name` begins with
    "imagenet", a folder's name is a WordNet identifier or a class number.
    """
    test, train = test_folder(folder), folder / "train"
    if (test / LABELS).is_file():
        return open_labels(folder, name, test)
    images, labels, folders = class_folders(test)
    names = lines(folder / "classnames.txt") or [name.replace("_", " ") for name in folders]
    if len(names) != len(folders):
        raise Unusable(f"{test} has {len(folders)} classes, classnames.txt has {len(names)}")
    numbers = None
    if name.startswith("imagenet"):
        try:
            numbers = imagenet.folder_numbers(folders)
        except ValueError:
            raise Unusable(f"{test}: folders should be called as ImageNet's classes") from None
        names = [IMAGENET_CLASSNAMES[number] for number in numbers]

    def read_train() -> Split:
        train_images, train_labels, train_folders = class_folders(train)
        if train_folders != folders:
            raise Unusable(f"{train} has {len(train_folders)} classes, not those of {test}")
        return train_images, train_labels

    has_train = train.is_dir() and test != folder
    read = read_train if has_train else None
    return classified(folder, name, (images, labels), names, read, numbers)


def test_folder(folder: Path) -> Path:
    """The folder of a data set's test images: one in it, or the folder itself."""
    candidates = [folder / name for name in ("test", "val", "validation")]
    return next((path for path in candidates if path.is_dir()), folder)


def class_folders(path: Path) -> tuple[Images, Tensor, list[str]]:
    """The images, their labels, and the folders' names, of a folder for each class."""
    try:
        found = ImageFolder(path, allow_empty=True)
    except OSError as error:
        raise Unusable(f"{path} holds no folders of images, one for each class") from error
    images = Images([Path(file) for file, _ in found.samples])
    return images, torch.tensor(found.targets), found.classes


def open_labels(folder: Path, name: str, test: Path) -> DataSet:
    """A folder of the CyCLIP authors' code: labels.csv has an image and a label on each line.

    Class names come from `classnames.txt`, or from the authors' classes.py beside labels.csv.
    """
    names = lines(folder / "classnames.txt") or authors_class_names(test / "classes.py")
    if not names:
        raise Unusable(f"no class names: neither {folder}/classnames.txt nor {test}/classes.py")
    train = folder / "train"
    read_train = partial(read_labels, train) if train.is_dir() and test != folder else None
    return classified(folder, name, read_labels(test), names, read_train)


def read_labels(folder: Path) -> tuple[Images, Tensor]:
    """The images and labels of a labels.csv."""
    with (folder / LABELS).open(encoding="utf-8", newline="") as file:
        entries = list(csv.DictReader(file))
    images = Images([folder / entry["image"] for entry in entries])
    return images, torch.tensor([int(entry["label"]) for entry in entries])


def authors_class_names(path: Path) -> list[str]:
    """The "classes" of a classes.py; [] without such a file or entry.

    The file holds a dict that contains functions. It is parsed, and never run.
    """
    if not path.is_file():
        return []
    content = ast.parse(path.read_text(encoding="utf-8").strip(), mode="eval").body
    entries = (
        zip(content.keys, content.values, strict=True) if isinstance(content, ast.Dict) else ()
    )
    for key, value in entries:
        if isinstance(key, ast.Constant) and key.value == "classes":
            return [str(name) for name in ast.literal_eval(value)]
    return []
