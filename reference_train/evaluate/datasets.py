"""The data sets: what one is, and those by name, the paper's, those that ship, and others.

clip-benchmark (https://github.com/LAION-AI/CLIP_benchmark) lays a data set out as

    FOLDER/test/0.tar, 1.tar, ...   samples of an image and .cls (a class's number) or .txt
                                    (captions, one a line); how many tars is in nshards.txt
    FOLDER/train/...                the same
    FOLDER/classnames.txt           and zeroshot_classification_templates.txt, {c} is the class
    FOLDER/dataset_type.txt         "retrieval", "multilabel", or none
"""

import io
import json
import re
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from open_clip import IMAGENET_CLASSNAMES, OPENAI_IMAGENET_TEMPLATES
from PIL import Image
from timm.data.imagenet_info import ImageNetInfo
from torch import Tensor
from torchvision.datasets import CIFAR10, CIFAR100, ImageFolder

from ..command_line import first_line
from ..data import emoji
from ..data.samples import IMAGES, on_white, samples_in

SPLITS = {  # the paper's test splits: classes, images
    "cifar10": (10, 10_000),
    "cifar100": (100, 10_000),
    "imagenet1k": (1000, 50_000),
    "imagenetv2": (1000, 10_000),
    "imagenet-sketch": (1000, 50_889),
    "imagenet-a": (200, 7_500),
    "imagenet-r": (200, 30_000),
}
PAPER_TEMPLATES = [template("{}") for template in OPENAI_IMAGENET_TEMPLATES]  # the 80
PICTURE_TEMPLATES = ["{}", "a drawing of {}", "a picture of {}", "an icon of {}"]
# https://www.cs.toronto.edu/~kriz/cifar.html, a line each
CIFAR100_SUPERCLASSES = Path(__file__).with_name("cifar100_superclasses.txt")
TEMPLATES = "zeroshot_classification_templates.txt"


class Unusable(Exception):
    """A data set that is not as it should be; the message is the reason in the table."""


class Member(NamedTuple):
    """Where a file lies in a tar file."""

    shard: Path
    name: str
    offset: int
    size: int


class Images:
    """Images by number, as a `torch.utils.data.DataLoader` takes them.

    places: of each image its file, its place in a tar file, or its pixels (3, S, S) uint8.
    """

    def __init__(self, places: Tensor | Sequence[Path | Member]):
        self.places = places

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int, /) -> Image.Image | str:
        """An RGB image, or why it can't be decoded, with its file."""
        place = self.places[index]
        if isinstance(place, Tensor):
            return Image.fromarray(place.permute(1, 2, 0).contiguous().numpy())
        try:
            file: Any = place
            if isinstance(place, Member):
                with place.shard.open("rb") as tar:
                    tar.seek(place.offset)
                    file = io.BytesIO(tar.read(place.size))
            with Image.open(file) as image:
                return on_white(image)
        except Exception as error:  # Pillow says SyntaxError of a broken PNG, for example
            where = f"{place.shard}, {place.name}" if isinstance(place, Member) else place
            return f"{where}: {first_line(error)}"


class TarImages(Images):
    """The samples of WebDataset tar files, by number: their images, and their fields.

    webdataset itself streams. Here the order matters, and a sample out of 1.3 million is wanted, so
    that the places of the images are looked up once in the tar files' own headers.
    """

    def __init__(self, shards: Sequence[Path]):
        """Raises `Unusable` if a shard can't be read."""
        self.samples: list[dict[str, Any]] = []
        for shard in shards:
            try:
                with tarfile.open(shard, "r:") as tar:
                    for files in samples_in(tar):
                        image = next((files[e] for e in IMAGES if e in files), None)
                        if image is None:
                            continue
                        place = Member(shard, image.name, image.offset_data, image.size)
                        self.samples.append({"image": place})
                        for field in files.keys() & {"cls", "txt", "json"}:
                            content: Any = tar.extractfile(files[field])
                            self.samples[-1][field] = content.read().decode("utf-8").strip()
            except (OSError, tarfile.TarError) as error:
                raise Unusable(f"{shard}: {getattr(error, 'strerror', None) or error}") from error
        super().__init__([sample["image"] for sample in self.samples])

    def texts(self, extension: str) -> list[str] | None:
        """A field of all samples; None if no sample has it. Raises `Unusable` if some lack it."""
        found = [sample[extension] for sample in self.samples if extension in sample]
        if 0 < len(found) < len(self):
            raise Unusable(f"{len(self) - len(found)} of {len(self)} samples have no .{extension}")
        return found or None


@dataclass
class Classes:
    """A question of which class."""

    labels: Tensor  # (n,) int64
    names: list[str]
    templates: list[str]  # each with a {} for the name
    coarse: Tensor | None = None  # (C,), the superclass of each class


@dataclass
class DataSet:
    """n images with what is known of them; every metric that applies is computed."""

    images: Images
    classes: dict[str, Classes] = field(default_factory=dict)  # by question, "" the first
    captions: list[list[str]] | None = None  # of each image, one or more
    groups: list[str] | None = None  # of each image, its style: numbers for each, too
    train: tuple[Images, dict[str, Tensor]] | None = None  # images, labels of some questions
    # The groups are styles of the same things: the number is the mean over groups, and an image's
    # neighbours come from the other groups unless there is a train split. `apart` is in neither.
    # Without captions it is also asked which image a class name belongs to.
    across_groups: bool = False
    apart: frozenset[str] = frozenset()
    train_lacks: str = ""  # why there is none, if it is there but not as it should be

    def __post_init__(self) -> None:
        if not len(self.images):
            raise Unusable("no images")
        for classes in self.classes.values():
            low, high = int(classes.labels.min()), int(classes.labels.max())
            if low < 0 or high >= len(classes.names):
                raise Unusable(f"labels from {low} to {high}, but {len(classes.names)} class names")

    def only(self, rows: Tensor) -> "DataSet":
        """What is known of some images; `images` stays as it is. rows: (m,), which."""
        chosen = rows.tolist()
        classes = {q: replace(c, labels=c.labels[rows]) for q, c in self.classes.items()}
        captions = self.captions and [self.captions[row] for row in chosen]
        groups = self.groups and [self.groups[row] for row in chosen]
        return replace(self, classes=classes, captions=captions, groups=groups)


Open = Callable[[], DataSet]
Split = tuple[Images, Tensor | None]  # with the labels
Train = Callable[[], Split] | None


def find(roots: Sequence[Path]) -> tuple[dict[str, Open], list[Path]]:
    """The data sets that the roots or their folders are, the paper's first; and what is none."""
    found: dict[str, Open] = {}
    other: list[Path] = []
    for root in (path.resolve() for path in roots):  # "." has no name
        if known := recognise(root):
            found.setdefault(*known)
            continue
        for path in sorted(root.iterdir()):
            try:
                known = recognise(path) if path.is_dir() else None
            except PermissionError:  # a disk's lost+found, for example
                known = None
            if known:
                found.setdefault(*known)
            elif not path.name.startswith("."):
                other.append(path)
    return {name: found[name] for name in [*SPLITS, *found] if name in found}, other


def recognise(folder: Path) -> tuple[str, Open] | None:
    """The data set that a folder is."""
    name = re.sub(r"^(wds-)?(vtab-)?", "", folder.name.lower().replace("_", "-"))
    if (folder / "test" / "nshards.txt").is_file() or (folder / "test" / "0.tar").is_file():
        return name, partial(open_tars, folder, name)
    if next(folder.glob("val-*.tar"), None) is not None:
        return name, partial(open_icons, folder)
    for kind in (CIFAR10, CIFAR100):
        if folder.name == kind.base_folder:
            return kind.__name__.lower(), partial(open_cifar, folder.parent, kind)
    return None


def classified(
    folder: Path, name: str, test: tuple[Images, Tensor], names: list[str], train: Train
) -> DataSet:
    """Images with classes. Raises `Unusable` if one of the paper's has too few or too many.

    train: reads the train split; one that is not as it should be is one to do without.
    """
    templates = [line.replace("{c}", "{}") for line in lines(folder / TEMPLATES)]
    if name in SPLITS:
        templates = PAPER_TEMPLATES
        if len(names) != SPLITS[name][0]:
            raise Unusable(f"{folder} has {len(names)} classes, not {SPLITS[name][0]}")
    images, labels = test
    classes = Classes(labels, names, templates or PAPER_TEMPLATES)
    if name == "cifar100":  # its classes are in the order of the alphabet
        kinds = enumerate(lines(CIFAR100_SUPERCLASSES))
        ordered = sorted((n, kind) for kind, line in kinds for n in line.split())
        classes.coarse = torch.tensor([kind for _, kind in ordered])
    data = DataSet(images, {"": classes})
    try:
        if train is not None:
            known, known_labels = train()
            if known_labels is None:
                raise Unusable("the samples of the train split have no .cls")
            data.train = known, {"": known_labels}
    except Exception as error:  # whatever its files raise
        data.train_lacks = " ".join(str(error).split())
    return data


def open_cifar(root: Path, kind: type[CIFAR10]) -> DataSet:
    """torchvision's CIFAR-10 or CIFAR-100."""

    def read(train: bool) -> tuple[Images, Tensor]:
        part = kind(root, train=train)
        return Images(torch.from_numpy(part.data).permute(0, 3, 1, 2)), torch.tensor(part.targets)

    names = [name.replace("_", " ") for name in kind(root, train=False).classes]
    return classified(root, kind.__name__.lower(), read(False), names, partial(read, True))


def split_folder(folder: Path) -> Path:
    """Where a folder's test images are."""
    names = ("test", "val", "validation")
    return next((folder / name for name in names if (folder / name).is_dir()), folder)


def class_folders(path: Path) -> tuple[Images, Tensor, list[str]]:
    """A folder of images for each class: images, labels, and the folders' names."""
    try:
        found = ImageFolder(path, allow_empty=True)
    except OSError as error:
        raise Unusable(f"{path} holds no folders of images, one for each class") from error
    images = Images([Path(file) for file, _ in found.samples])
    return images, torch.tensor(found.targets), found.classes


def open_folders(folder: Path, name: str) -> DataSet:
    """Images in a folder for each class; the folders in `folder` or in its test and train splits.

    Classes are called as in `classnames.txt`, or as their folders. If `name` begins with
    "imagenet", they are ImageNet's classes by WordNet's identifier or by number.
    """
    test, train = split_folder(folder), folder / "train"
    images, labels, folders = class_folders(test)
    names = lines(folder / "classnames.txt") or [name.replace("_", " ") for name in folders]
    if len(names) != len(folders):
        raise Unusable(f"{test} has {len(folders)} classes, classnames.txt has {len(names)}")
    if name.startswith("imagenet"):
        wnids = {wnid: i for i, wnid in enumerate(ImageNetInfo("imagenet-1k").label_names())}
        try:
            names = [IMAGENET_CLASSNAMES[wnids[f] if f in wnids else int(f)] for f in folders]
        except (ValueError, IndexError):
            raise Unusable(f"{test}: folders should be called as ImageNet's classes") from None

    def read_train() -> Split:
        train_images, train_labels, train_folders = class_folders(train)
        if train_folders != folders:
            raise Unusable(f"{train} has {len(train_folders)} classes, not those of {test}")
        return train_images, train_labels

    has_train = train.is_dir() and test != folder
    read = read_train if has_train else None
    return classified(folder, name, (images, labels), names, read)


def open_tars(folder: Path, name: str) -> DataSet:
    """A data set in clip-benchmark's layout. The paper's take the paper's templates."""
    if "multilabel" in lines(folder / "dataset_type.txt"):
        raise Unusable("images with several labels each are not evaluated")

    def read(part: str) -> tuple[TarImages, Tensor | None]:
        images = TarImages(shards(folder / part))
        labels = images.texts("cls")
        return images, None if labels is None else torch.tensor([int(label) for label in labels])

    images, labels = read("test")
    texts, data = images.texts("txt"), DataSet(images)
    if labels is not None:
        names = lines(folder / "classnames.txt")
        if not names:
            raise Unusable(f"no {folder / 'classnames.txt'}")
        if name.startswith("cifar"):
            names = [class_name.replace("_", " ") for class_name in names]
        train = partial(read, "train") if (folder / "train").is_dir() else None
        data = classified(folder, name, (images, labels), names, train)
    if texts is not None:
        data.captions = [[line for line in text.splitlines() if line] for text in texts]
        if not all(data.captions):
            raise Unusable("images without a caption")
    if labels is None and texts is None:
        raise Unusable(f"the samples of {folder / 'test'} have neither .cls nor .txt")
    return data


def shards(folder: Path) -> list[Path]:
    """0.tar, 1.tar, ..., as many as nshards.txt says."""
    if count := lines(folder / "nshards.txt"):
        return [folder / f"{number}.tar" for number in range(int(count[0]))]
    return sorted(folder.glob("*.tar"), key=lambda path: (len(path.name), path.name))


def lines(path: Path) -> list[str]:
    """The lines of a text file; none if there is no such file."""
    if not path.is_file():
        return []
    return [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]


def open_icons(folder: Path) -> DataSet:
    """Held-out icons, `val-*.tar` with png, txt and json: retrieval, zero-shot to their names."""
    images = TarImages(sorted(folder.glob("val-*.tar")))
    captions, infos = images.texts("txt"), images.texts("json")
    if captions is None or infos is None:
        raise Unusable(f"the samples of {folder}/val-*.tar lack .txt or .json")
    names = [str(json.loads(info)["name"]) for info in infos]
    distinct = {name: number for number, name in enumerate(sorted(set(names)))}
    labels = torch.tensor([distinct[name] for name in names])
    classes = Classes(labels, list(distinct), PICTURE_TEMPLATES)
    return DataSet(images, {"": classes}, [[caption] for caption in captions])


def open_emoji() -> DataSet:
    """The emoji that ship, in all styles: which name, which subgroup, and name to image and back.

    A name's superclass is its subgroup, too. Black and white is apart.
    """
    shipped = emoji.read_emoji()
    images, drawn, styles = shipped.drawings(emoji.ALL_STYLES, range(len(shipped.concepts)))
    subgroups = sorted({concept.subgroup for concept in shipped.concepts})
    coarse = torch.tensor([subgroups.index(concept.subgroup) for concept in shipped.concepts])
    names = [concept.name for concept in shipped.concepts]
    return DataSet(
        Images(images),
        {
            "": Classes(drawn, names, PICTURE_TEMPLATES, coarse),
            "subgroup": Classes(coarse[drawn], subgroups, PICTURE_TEMPLATES),
        },
        captions=[[names[concept]] for concept in drawn.tolist()],
        groups=styles,
        across_groups=True,
        apart=frozenset(emoji.STRESS_STYLES),
    )
