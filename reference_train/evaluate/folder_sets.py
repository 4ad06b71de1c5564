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
from .classification import LabelledImages, classification_set
from .datasets import DataSet, Images, Unusable, read_lines

LABELS = "labels.csv"


def open_folders(folder: Path, name: str) -> DataSet:
    """A data set with a folder of images for each class, in `folder` or in its `test` and `train`.

    Class names come from `classnames.txt`, or else from the names of the folders. If `name` begins
    with "imagenet", the names of the folders must be WordNet identifiers or class numbers.
    """
    test, train = test_folder(folder), folder / "train"
    if (test / LABELS).is_file():
        return open_labels(folder, name, test)
    images, labels, folders = class_folders(test)
    names = read_lines(folder / "classnames.txt") or [name.replace("_", " ") for name in folders]
    if len(names) != len(folders):
        raise Unusable(f"{test} has {len(folders)} classes, classnames.txt has {len(names)}")
    numbers = None
    if name.startswith("imagenet"):
        try:
            numbers = imagenet.folder_numbers(folders)
        except ValueError as error:
            raise Unusable(
                f"{test / str(error)}: the folder's name should be a WordNet identifier "
                "(n01440764) or number (0 to 999)"
            ) from None
        names = [IMAGENET_CLASSNAMES[number] for number in numbers]

    def read_train() -> LabelledImages:
        train_images, train_labels, train_folders = class_folders(train)
        if train_folders != folders:
            raise Unusable(f"{train} has {len(train_folders)} classes, not those of {test}")
        return train_images, train_labels

    has_train = train.is_dir() and test != folder
    read = read_train if has_train else None
    return classification_set(folder, name, (images, labels), names, read, numbers)


def test_folder(folder: Path) -> Path:
    """The folder of the test images: `test`, `val` or `validation`, or else `folder` itself."""
    candidates = [folder / name for name in ("test", "val", "validation")]
    return next((path for path in candidates if path.is_dir()), folder)


def class_folders(path: Path) -> tuple[Images, Tensor, list[str]]:
    """The images of a folder for each class, their labels, and the names of the folders."""
    try:
        found = ImageFolder(path, allow_empty=True)
    except OSError as error:
        raise Unusable(f"{path} holds no folders of images, one for each class") from error
    if not found.samples:
        raise Unusable(f"{path}: no images")
    images = Images([Path(file) for file, _ in found.samples])
    return images, torch.tensor(found.targets), found.classes


def open_labels(folder: Path, name: str, test: Path) -> DataSet:
    """A folder of the CyCLIP authors' code. Each line of labels.csv has an image and its label.

    Class names come from `classnames.txt`, or else from the authors' classes.py beside labels.csv.
    """
    names, classes_py = read_lines(folder / "classnames.txt"), test / "classes.py"
    if not names and not classes_py.is_file():
        raise Unusable(f"no class names: neither {folder}/classnames.txt nor {classes_py}")
    if not names:
        try:
            names = authors_class_names(classes_py)
        except (ValueError, SyntaxError) as error:
            raise Unusable(
                f'{classes_py}: its "classes" should be a list of strings; write '
                f"{folder}/classnames.txt instead"
            ) from error
    train = folder / "train"
    read_train = partial(read_labels, train) if train.is_dir() and test != folder else None
    return classification_set(folder, name, read_labels(test), names, read_train)


def read_labels(folder: Path) -> tuple[Images, Tensor]:
    """The images and labels of a labels.csv. Raises `Unusable` if the file is not valid."""
    path = folder / LABELS
    places, labels = list[Path](), list[int]()
    with path.open(encoding="utf-8-sig", newline="") as file:  # Excel begins a file with a BOM
        reader = csv.DictReader(file)
        if not {"image", "label"} <= {*(reader.fieldnames or ())}:
            raise Unusable(f"{path}: its columns should be image,label")
        for entry in reader:
            try:
                labels.append(int(entry["label"]))
            except (TypeError, ValueError):  # TypeError: the line has no second column
                raise Unusable(
                    f"{path}, line {reader.line_num}: the label should be a class number, not "
                    f"{entry['label']!r}"
                ) from None
            places.append(folder / entry["image"])
    if not places:
        raise Unusable(f"{path}: no images")
    return Images(places), torch.tensor(labels)


def authors_class_names(path: Path) -> list[str]:
    """The entry "classes" of the dict in a classes.py.

    The dict also holds functions, so the file is parsed but never run. Raises ValueError or
    SyntaxError if it holds no dict, or if "classes" is not a list of strings.
    """
    content = ast.parse(path.read_text(encoding="utf-8-sig").strip(), mode="eval").body
    entries = (
        zip(content.keys, content.values, strict=True) if isinstance(content, ast.Dict) else ()
    )
    for key, value in entries:
        if isinstance(key, ast.Constant) and key.value == "classes":
            names = ast.literal_eval(value)
            if isinstance(names, list) and all(isinstance(name, str) for name in names):
                return names
    raise ValueError('no list of strings called "classes"')
