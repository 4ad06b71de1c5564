"""The data sets by name: the paper's, the rehearsal's, and any other in clip-benchmark's layout.

clip-benchmark (https://github.com/LAION-AI/CLIP_benchmark) lays a data set out as

    FOLDER/test/0.tar, 1.tar, ...   samples of an image and .cls (a class's number) or .txt
                                    (captions, one a line)
    FOLDER/test/nshards.txt         how many
    FOLDER/train/...                the same
    FOLDER/classnames.txt           and zeroshot_classification_templates.txt, {c} is the class
    FOLDER/dataset_type.txt         "retrieval", "multilabel", or none
"""

import json
import pickle
import re
import tarfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import torch
from open_clip import IMAGENET_CLASSNAMES, OPENAI_IMAGENET_TEMPLATES
from timm.data.imagenet_info import ImageNetInfo
from torch import Tensor
from torchvision.datasets import CIFAR10, CIFAR100, ImageFolder

from ..data import emoji
from .datasets import Classes, DataSet, FirstOf, Pixels, TarImages, Unusable

PAPER_TEMPLATES = [template("{}") for template in OPENAI_IMAGENET_TEMPLATES]  # the 80
PICTURE_TEMPLATES = ["{}", "a drawing of {}", "a picture of {}", "an icon of {}"]
PAPER = {  # name -> classes
    "cifar10": 10,
    "cifar100": 100,
    "imagenet1k": 1000,
    "imagenetv2": 1000,
    "imagenet-sketch": 1000,
    "imagenet-a": 200,
    "imagenet-r": 200,
}
# Folders by other names than clip-benchmark's (wds_NAME, wds_vtab-NAME, with - or _).
ALIASES = {
    "imagenet": "imagenet1k",
    "imagenet-1k": "imagenet1k",
    "ilsvrc2012": "imagenet1k",
    "imagenet-v2": "imagenetv2",
    "imagenetv2-matched-frequency": "imagenetv2",
    "imagenetv2-matched-frequency-format-val": "imagenetv2",
    "sketch": "imagenet-sketch",
}
# What a data set that is not as it should be makes its readers raise.
BROKEN = (
    Unusable,
    OSError,
    ValueError,
    KeyError,
    RuntimeError,
    EOFError,
    tarfile.TarError,
    pickle.UnpicklingError,
)

# CIFAR-100's superclasses (https://www.cs.toronto.edu/~kriz/cifar.html).
CIFAR100_SUPERCLASSES = """
beaver dolphin otter seal whale
aquarium_fish flatfish ray shark trout
orchid poppy rose sunflower tulip
bottle bowl can cup plate
apple mushroom orange pear sweet_pepper
clock keyboard lamp telephone television
bed chair couch table wardrobe
bee beetle butterfly caterpillar cockroach
bear leopard lion tiger wolf
bridge castle house road skyscraper
cloud forest mountain plain sea
camel cattle chimpanzee elephant kangaroo
fox porcupine possum raccoon skunk
crab lobster snail spider worm
baby boy girl man woman
crocodile dinosaur lizard snake turtle
hamster mouse rabbit shrew squirrel
maple_tree oak_tree palm_tree pine_tree willow_tree
bicycle bus motorcycle pickup_truck train
lawn_mower rocket streetcar tank tractor
"""

Open = Callable[[], DataSet]


def find(roots: Sequence[Path], superclasses: list[str] | None) -> dict[str, Open]:
    """The data sets that the roots or their folders are, the paper's first.

    superclasses: of ImageNet's 1,000 classes.
    """
    found: dict[str, Open] = {}
    for root in roots:
        for folder in (root.resolve(), *sorted(root.resolve().iterdir())):
            with suppress(PermissionError):  # a disk's lost+found, for example
                if folder.is_dir() and (known := recognise(folder, superclasses)):
                    found.setdefault(*known)
    return {name: found[name] for name in [*PAPER, *found] if name in found}


def recognise(folder: Path, superclasses: list[str] | None) -> tuple[str, Open] | None:
    """The data set that a folder is."""
    name = re.sub(r"^(wds-)?(vtab-)?", "", folder.name.lower().replace("_", "-"))
    name = ALIASES.get(name, name)
    if (folder / "test" / "nshards.txt").is_file() or (folder / "test" / "0.tar").is_file():
        return name, partial(open_tars, folder, name, superclasses)
    if next(folder.glob("val-*.tar"), None) is not None:
        return name, partial(open_icons, folder)
    for kind in (CIFAR10, CIFAR100):
        if folder.name == kind.base_folder:
            return kind.__name__.lower(), partial(open_cifar, folder.parent, kind)
    if name.startswith("imagenet") and name in PAPER:
        test = next((folder / d for d in ("val", "validation") if (folder / d).is_dir()), folder)
        if name != "imagenet1k" or test != folder:
            return name, partial(open_imagenet, test, folder / "train", name, superclasses)
    return None


# ------------------------------------------------------------------------------------------------
# The paper's


def open_cifar(root: Path, kind: type[CIFAR10]) -> DataSet:
    """torchvision's CIFAR-10 or CIFAR-100, with the paper's templates."""
    test, train = (kind(root, train=part, download=False) for part in (False, True))
    names = [name.replace("_", " ") for name in test.classes]
    coarse = cifar100_coarse() if kind is CIFAR100 else None
    classes = Classes(torch.tensor(test.targets), names, PAPER_TEMPLATES, coarse)
    return DataSet(
        FirstOf(test), {"": classes}, train=(FirstOf(train), torch.tensor(train.targets))
    )


def cifar100_coarse() -> Tensor:
    """(100,), the superclass of each class; the classes are in the order of the alphabet."""
    superclass = {
        name: number
        for number, line in enumerate(CIFAR100_SUPERCLASSES.split("\n")[1:-1])
        for name in line.split()
    }
    return torch.tensor([superclass[name] for name in sorted(superclass)])


def open_imagenet(test: Path, train: Path, name: str, superclasses: list[str] | None) -> DataSet:
    """A folder of images for each class, called by WordNet's identifier or the class's number."""
    images, labels, numbers = image_folder(test)
    if len(numbers) != PAPER[name]:
        raise Unusable(f"{test} has {len(numbers)} classes, not {PAPER[name]}")
    names = [IMAGENET_CLASSNAMES[number] for number in numbers]
    coarse = imagenet_coarse(names, superclasses)
    data = DataSet(images, {"": Classes(labels, names, PAPER_TEMPLATES, coarse)})
    if name == "imagenet1k" and train.is_dir():
        with train_split(data):
            train_images, train_labels, train_numbers = image_folder(train)
            if train_numbers != numbers:
                raise Unusable(f"{train} has {len(train_numbers)} classes, not {len(numbers)}")
            data.train = train_images, train_labels
    return data


@contextmanager
def train_split(data: DataSet) -> Iterator[None]:
    """A train split that is not as it should be is one to do without: the test split is whole."""
    try:
        yield
    except BROKEN as error:
        data.train_lacks = " ".join(str(error).split())


def image_folder(path: Path) -> tuple[FirstOf, Tensor, list[int]]:
    """Images, labels, and which of ImageNet's classes the labels are, in its order."""
    pairs = ImageFolder(path)
    wnids = {wnid: number for number, wnid in enumerate(ImageNetInfo("imagenet-1k").label_names())}
    try:
        of_folder = [wnids[c] if c in wnids else int(c) for c in pairs.classes]
    except ValueError:
        raise Unusable(f"{path} has folders that are no classes of ImageNet") from None
    numbers = sorted(of_folder)
    place = torch.tensor([numbers.index(number) for number in of_folder])
    return FirstOf(pairs), place[torch.tensor(pairs.targets)], numbers


def imagenet_coarse(names: list[str], superclasses: list[str] | None) -> Tensor | None:
    """The superclass of each class, by name if they are some of ImageNet's; None if not known."""
    if superclasses is None:
        return None
    kinds = sorted(set(superclasses))
    if len(names) == len(superclasses):
        return torch.tensor([kinds.index(kind) for kind in superclasses])
    by_name = dict(zip(IMAGENET_CLASSNAMES, superclasses, strict=True))
    if any(name not in by_name for name in names):
        return None
    return torch.tensor([kinds.index(by_name[name]) for name in names])


# ------------------------------------------------------------------------------------------------
# clip-benchmark's layout, the stamps' too


def open_tars(folder: Path, name: str, superclasses: list[str] | None) -> DataSet:
    """A data set in clip-benchmark's layout.

    The paper's data sets take the paper's templates, others their own. Samples may have captions
    beside classes, and a json with "photo", whether it is a photograph.
    """
    if (kind := lines(folder / "dataset_type.txt")) and kind[0] == "multilabel":
        raise Unusable("images with several labels each are not evaluated")
    images = TarImages(shards(folder / "test"))
    data = DataSet(images)
    if (labels := images.texts("cls")) is not None:
        names = lines(folder / "classnames.txt")
        if not names:
            raise Unusable(f"no {folder / 'classnames.txt'}")
        if name in PAPER and len(names) != PAPER[name]:
            raise Unusable(f"{folder} has {len(names)} class names, not {PAPER[name]}")
        templates, coarse = PAPER_TEMPLATES, None
        if name == "cifar100":
            coarse = cifar100_coarse()
        elif name in PAPER and name != "cifar10":
            coarse = imagenet_coarse(names, superclasses)
        if name.startswith("cifar"):
            names = [class_name.replace("_", " ") for class_name in names]
        if name not in PAPER:
            own = lines(folder / "zeroshot_classification_templates.txt")
            templates = [template.replace("{c}", "{}") for template in own] or PAPER_TEMPLATES
        classes = Classes(torch.tensor([int(x) for x in labels]), names, templates, coarse)
        data = DataSet(images, {"": classes})
        if (folder / "train").is_dir():
            with train_split(data):
                data.train = open_train(folder / "train")
    if (texts := images.texts("txt")) is not None:
        data.captions = [[line for line in text.splitlines() if line] for text in texts]
        if not all(data.captions):
            raise Unusable("images without a caption")
    if labels is None and texts is None:
        raise Unusable(f"the samples of {folder / 'test'} have neither .cls nor .txt")
    infos = [json.loads(info) for info in images.texts("json") or []]
    if infos and all("photo" in info for info in infos):
        data.groups = ["photographs" if info["photo"] else "drawings" for info in infos]
    return data


def open_train(folder: Path) -> tuple[TarImages, Tensor]:
    """The train split: images and labels."""
    images = TarImages(shards(folder))
    labels = images.texts("cls")
    if labels is None:
        raise Unusable(f"the samples of {folder} have no .cls")
    return images, torch.tensor([int(x) for x in labels])


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


# ------------------------------------------------------------------------------------------------
# The rehearsal's


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
    concepts = shipped.concepts
    drawn = torch.cat([shipped.concept[style] for style in emoji.ALL_STYLES])
    subgroups = sorted({concept.subgroup for concept in concepts})
    coarse = torch.tensor([subgroups.index(concept.subgroup) for concept in concepts])
    names = [concept.name for concept in concepts]
    return DataSet(
        Pixels(torch.cat([shipped.images[style] for style in emoji.ALL_STYLES])),
        {
            "": Classes(drawn, names, PICTURE_TEMPLATES, coarse),
            "subgroup": Classes(coarse[drawn], subgroups, PICTURE_TEMPLATES),
        },
        captions=[[names[concept]] for concept in drawn.tolist()],
        groups=[style for style in emoji.ALL_STYLES for _ in shipped.concept[style]],
        across_groups=True,
        apart=frozenset(emoji.STRESS_STYLES),
    )
