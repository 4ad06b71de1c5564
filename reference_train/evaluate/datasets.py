"""The datasets of `evaluate`: images with labels, captions and groups, and how they are read.

A dataset in the layout that `open_tars` reads needs no code, only `--data DIR`. A new layout needs
a function that returns a `Dataset`, and a line in `recognise` that calls it. `datasets.csv` lists
the paper's datasets only.
"""

import io
import os
import re
import tarfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from open_clip import IMAGENET_CLASSNAMES
from PIL import Image
from torch import Tensor
from torchvision.datasets import ImageFolder

from ..command_line import first_line, say
from ..data import emoji
from ..data.samples import IMAGE_EXTENSIONS, samples_in
from . import paper

DRAWING_TEMPLATES = ["{}", "a drawing of {}", "a picture of {}", "an icon of {}"]


class Unusable(Exception):
    """A dataset cannot be evaluated. The table shows the message as the reason."""


class Images:
    """Images by index, for a `torch.utils.data.DataLoader`.

    places: for each image its pixels (3, S, S) uint8, or its place in a file: the file, the name
    (in a tar file), the offset and the size.
    """

    def __init__(self, places: Tensor | Sequence[tuple[Path, str, int, int]]):
        self.places = places

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int, /) -> Image.Image:
        """An RGB image. Raises `Unusable` with the name of its file if it cannot be decoded."""
        place = self.places[index]
        if isinstance(place, Tensor):
            return Image.fromarray(place.permute(1, 2, 0).contiguous().numpy())
        path, name, offset, size = place
        try:
            with path.open("rb") as file:
                file.seek(offset)
                with Image.open(io.BytesIO(file.read(size))) as image:
                    return image.convert("RGB")
        except Exception as error:  # Pillow raises SyntaxError for a broken PNG, for example
            raise Unusable(f"{path} {name}: {first_line(error)}") from error

    def identity(self) -> object:
        """What tells these images from others without reading files, whatever their folder.

        Files with the same names, sizes and times of writing are taken for the same.
        """
        if isinstance(self.places, Tensor):
            return zlib.crc32(self.places.numpy().tobytes())
        paths = {path for path, *_ in self.places}
        written = {path: path.stat().st_mtime_ns if path.exists() else 0 for path in paths}
        return [(path.name, written[path], *place) for path, *place in self.places]


@dataclass
class Classes:
    """A classification task: which of C classes does each of n images show?"""

    labels: Tensor  # (n,) int64
    names: list[str]  # of the C classes
    templates: list[str]  # prompts, each with {} for the name of a class
    superclass: Tensor | None = None  # (C,) int64, the superclass of each class


@dataclass
class Dataset:
    """n images with labels, captions and groups. `measure` computes every metric that applies."""

    images: Images
    classes: dict[str, Classes] = field(default_factory=dict)  # by task; the main task is ""
    captions: list[list[str]] | None = None  # for each image, one or more
    # The drawing style of each image, if the same concepts are drawn in several. A metric is then
    # the mean over styles. Without captions, class names are used as captions, too.
    groups: list[str] | None = None
    train: tuple[Images, dict[str, Tensor]] | None = None  # images, and their labels by task

    def __post_init__(self) -> None:
        if not len(self.images):
            raise Unusable("no images")
        for classes in self.classes.values():
            low, high = int(classes.labels.min()), int(classes.labels.max())
            if low < 0 or high >= len(classes.names):
                raise Unusable(f"labels from {low} to {high}, but {len(classes.names)} class names")


Opener = Callable[[], Dataset]
LabelledImages = tuple[Images, Tensor]  # labels: (n,) int64


def find(roots: Sequence[Path]) -> dict[str, Opener]:
    """The datasets in `roots`, by name. Prints which files and folders are skipped.

    roots: datasets, or folders of datasets. A path is skipped if it is not a dataset or repeats an
    earlier name. Hidden files are not printed.
    """
    found: dict[str, Opener] = {}
    for root in dict.fromkeys(path.resolve() for path in roots):  # so that "." has a name
        for path in [root] if recognise(root) else sorted(root.iterdir()):
            known = recognise(path)
            if known and known[0] not in found:
                found[known[0]] = known[1]
            elif not path.name.startswith("."):
                say(f"{path}: skipped: not a dataset, or repeats an earlier name")
    return found


def recognise(folder: Path) -> tuple[str, Opener] | None:
    """The name of the dataset in a folder, and its opener; None if there is no dataset."""
    name = re.sub(r"^(wds-)?(vtab-)?", "", folder.name.lower().replace("_", "-"))
    known = (folder / "test" / "0.tar").is_file() or any(folder.glob("val-*.tar"))
    return (name, partial(open_tars, folder, name)) if known else None


def open_emoji() -> Dataset:
    """The emoji of the repository in all styles but one, with two tasks: their names and subgroups.

    The superclass of a name is its subgroup. The names are also the captions. Black-and-white
    drawings are left out.
    """
    shipped = emoji.read_emoji()
    in_colour = emoji.TRAIN_STYLES + emoji.SHIFT_STYLES
    images, concept, styles = shipped.drawings(in_colour, range(len(shipped.concepts)))
    subgroups, subgroup = number_words([concept.subgroup for concept in shipped.concepts])
    names = [concept.name for concept in shipped.concepts]
    return Dataset(
        Images(images),
        {
            "": Classes(concept, names, DRAWING_TEMPLATES, subgroup),
            "subgroup": Classes(subgroup[concept], subgroups, DRAWING_TEMPLATES),
        },
        captions=[[names[i]] for i in concept.tolist()],
        groups=styles,
    )


def open_folders(folder: Path, name: str) -> Dataset:
    """Image files, in a folder for each class.

    The test images are in `test`, `val`, `validation` or `folder` itself, and the training images
    in `train`. Class names come from `classnames.txt`; without it, from the names of the folders.
    If `name` begins with "imagenet", the names of folders must be WordNet identifiers or class
    numbers.
    """
    candidates = [folder / split for split in ("test", "val", "validation")]
    test = next((path for path in candidates if path.is_dir()), folder)
    images, folders = class_folders(test)
    names = read_lines(folder / "classnames.txt") or [name.replace("_", " ") for name in folders]
    if len(names) != len(folders):
        raise Unusable(f"{test} has {len(folders)} classes, classnames.txt has {len(names)}")
    numbers = None
    if name.startswith("imagenet"):
        numbers = imagenet_folders(test, folders)
        names = [IMAGENET_CLASSNAMES[number] for number in numbers]
    train_images, train = None, folder / "train"
    if train.is_dir() and test != folder:
        train_images, train_folders = class_folders(train)
        if train_folders != folders:
            raise Unusable(f"{train} has {len(train_folders)} classes, not those of {test}")
    return classification(folder, name, images, names, train_images, numbers)


def class_folders(path: Path) -> tuple[LabelledImages, list[str]]:
    """The images of a folder for each class with their labels, and the names of the folders."""
    found = ImageFolder(path, allow_empty=True)
    images = Images([(Path(file), "", 0, os.path.getsize(file)) for file, _ in found.samples])
    return (images, torch.tensor(found.targets)), found.classes


class TarImages(Images):
    """The images of WebDataset tar files, by index, and the other fields of their samples.

    The webdataset package can only stream samples. To read any image by its index, this class looks
    up the places of all images in the headers of the tar files, once.
    """

    def __init__(self, shards: Sequence[Path]):
        """Raises `Unusable` if a shard cannot be read."""
        self.samples: list[dict[str, Any]] = []
        for shard in shards:
            try:
                with tarfile.open(shard, "r:") as tar:
                    for files in samples_in(tar):
                        image = next((files[e] for e in IMAGE_EXTENSIONS if e in files), None)
                        if image is None:
                            continue
                        place = (shard, image.name, image.offset_data, image.size)
                        self.samples.append({"image": place})
                        for extension in files.keys() & {"cls", "txt"}:
                            content: Any = tar.extractfile(files[extension])
                            self.samples[-1][extension] = content.read().decode("utf-8").strip()
            except (OSError, tarfile.TarError) as error:
                raise Unusable(f"{shard}: {first_line(error)}") from error
        super().__init__([sample["image"] for sample in self.samples])

    def texts(self, extension: str) -> list[str] | None:
        """A field of all samples; None if no sample has it. Raises `Unusable` if only some do."""
        found = [sample[extension] for sample in self.samples if extension in sample]
        if 0 < len(found) < len(self):
            raise Unusable(f"{len(self) - len(found)} of {len(self)} samples have no .{extension}")
        return found or None


def open_tars(folder: Path, name: str) -> Dataset:
    """A dataset in the layout of https://github.com/LAION-AI/CLIP_benchmark:

    test/0.tar, 1.tar, ...   samples of an image and .cls (the number of a class) or .txt
                             (captions, one on each line); or val-*.tar
    test/nshards.txt         the number of tar files; it may be missing
    train/...                the same as test; it may be missing
    classnames.txt           the name of each class
    zeroshot_classification_templates.txt
                             prompts, with {c} for the class; it may be missing

    Images with several labels each (.npy) are not evaluated.
    """
    images = TarImages(shards(folder / "test") or sorted(folder.glob("val-*.tar")))
    labels, texts, data = read_classes(images), images.texts("txt"), Dataset(images)
    if labels is None and texts is None:
        raise Unusable(f"the samples of {folder} have neither .cls nor .txt")
    if labels is not None:
        names = read_lines(folder / "classnames.txt")
        if not names:
            raise Unusable(f"no {folder / 'classnames.txt'}")
        if name.startswith("cifar"):
            names = [class_name.replace("_", " ") for class_name in names]
        train = None
        if (folder / "train").is_dir():
            train_images = TarImages(shards(folder / "train"))
            if (train_labels := read_classes(train_images)) is None:
                raise Unusable("the samples of the train split have no .cls")
            train = train_images, train_labels
        data = classification(folder, name, (images, labels), names, train)
    if texts is not None:
        data.captions = [[line for line in text.splitlines() if line] for text in texts]
        if not all(data.captions):
            raise Unusable("images without a caption")
    return data


def read_classes(images: TarImages) -> Tensor | None:
    """The label of each image, (n,); None if there are none."""
    labels = images.texts("cls")
    return None if labels is None else torch.tensor([int(label) for label in labels])


def shards(folder: Path) -> list[Path]:
    """0.tar, 1.tar, ..., as many as nshards.txt says. Without nshards.txt: all tar files."""
    if count := read_lines(folder / "nshards.txt"):
        return [folder / f"{number}.tar" for number in range(int(count[0]))]
    return sorted(folder.glob("*.tar"), key=lambda path: (len(path.name), path.name))


def classification(
    folder: Path,
    name: str,
    test: LabelledImages,
    names: list[str],
    train: LabelledImages | None,
    imagenet_numbers: Sequence[int] | None = None,
) -> Dataset:
    """A dataset of images with one label each, with its templates and superclasses.

    folder: may have a file of templates. The paper's datasets always have the paper's.
    names: of the classes.
    imagenet_numbers: ImageNet's number of each class; None: `name` decides.

    Raises `Unusable` if a dataset of the paper has another number of classes than in the paper, or
    if ImageNet's classes are in another order.
    """
    lines = read_lines(folder / "zeroshot_classification_templates.txt")
    templates = [line.replace("{c}", "{}") for line in lines] or paper.TEMPLATES
    superclasses = None
    if paper.SETS.get(name, {}).get("zero_shot"):
        templates, expected = paper.TEMPLATES, paper.SETS[name]["classes"]
        if len(names) != expected:
            raise Unusable(f"{folder} has {len(names)} classes, not {expected}")
        if name.startswith("imagenet") and imagenet_numbers is None:
            imagenet_numbers = imagenet_classes(name, names)
    if imagenet_numbers is not None:
        superclasses = paper.IMAGENET["superclass"].iloc[imagenet_numbers]
    elif name == "cifar100":
        superclasses = paper.CIFAR100["superclass"]
    superclass = None if superclasses is None else number_words(superclasses)[1]
    classes = Classes(test[1], names, templates, superclass)
    train_split = None if train is None else (train[0], {"": train[1]})
    return Dataset(test[0], {"": classes}, train=train_split)


def imagenet_classes(name: str, names: Sequence[str]) -> list[int]:
    """The class numbers, 0 to 999, of ImageNet's, ImageNet-A's or ImageNet-R's labels.

    They are in the order of the WordNet identifiers, as OpenCLIP and timm have them. Raises
    `Unusable` if the class names are in another order, because the labels would get superclasses
    of other classes. Names that are not ImageNet's, such as translations, are not checked.
    """
    # The other datasets have all classes.
    has_class = paper.IMAGENET.get(name, default=[True] * 1000)
    numbers = np.flatnonzero(has_class).tolist()
    for label, (found, number) in enumerate(zip(names, numbers, strict=True)):
        wanted = IMAGENET_CLASSNAMES[number]
        if found != wanted and found in IMAGENET_CLASSNAMES:
            raise Unusable(
                f"class {label} is called {found!r}, but in ImageNet's order it is {wanted!r}: "
                "labels and class names should be in the order of the WordNet identifiers"
            )
    return numbers


def imagenet_folders(path: Path, folders: Sequence[str]) -> list[int]:
    """The class numbers of folders whose names are WordNet identifiers or class numbers."""
    number_of = {key: i for i, key in enumerate(paper.IMAGENET.index)}
    number_of |= {str(i): i for i in range(len(number_of))}
    if unknown := [folder for folder in folders if folder not in number_of]:
        raise Unusable(
            f"{path / unknown[0]}: the folder's name should be a WordNet identifier (n01440764) or "
            "number (0 to 999)"
        )
    return [number_of[folder] for folder in folders]


def number_words(words: Sequence[str]) -> tuple[list[str], Tensor]:
    """The distinct words in alphabetical order, and the number of each word among them."""
    distinct, numbers = np.unique(words, return_inverse=True)
    return distinct.tolist(), torch.from_numpy(numbers)


def read_lines(path: Path) -> list[str]:
    """The lines of a text file; [] if there is no such file. Blank lines may end it.

    Raises `Unusable` for other blank lines: no name or prompt would be empty on purpose.
    """
    if not path.is_file():
        return []
    lines = [line.strip() for line in path.read_text(encoding="utf-8").rstrip().splitlines()]
    if "" in lines:
        raise Unusable(f"{path}: line {lines.index('') + 1} is blank")
    return lines
