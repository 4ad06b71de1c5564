"""A data set: images, and what is known about each of them."""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from torch import Tensor

from ..command_line import first_line
from ..data.samples import on_white

PICTURE_TEMPLATES = ["{}", "a drawing of {}", "a picture of {}", "an icon of {}"]


class Unusable(Exception):
    """A data set that cannot be evaluated. The table shows the message as the reason."""


class Member(NamedTuple):
    """Where a file lies in a tar file."""

    shard: Path
    name: str
    offset: int
    size: int


class Images:
    """Images by index, as a `torch.utils.data.DataLoader` takes them.

    places: for each image its file, its place in a tar file, or its pixels (3, S, S) uint8.
    """

    def __init__(self, places: Tensor | Sequence[Path | Member]):
        self.places = places

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int, /) -> Image.Image | str:
        """An RGB image; if it cannot be decoded, the name of its file and the reason."""
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
        except Exception as error:  # Pillow raises SyntaxError for a broken PNG, for example
            where = f"{place.shard}, {place.name}" if isinstance(place, Member) else place
            return f"{where}: {first_line(error)}"


@dataclass
class Classes:
    """A question: which of these classes does an image show?"""

    labels: Tensor  # (n,) int64
    names: list[str]
    templates: list[str]  # each with {} in the place of the name
    superclass: Tensor | None = None  # (C,) int64, the superclass of each class


@dataclass
class DataSet:
    """n images and what is known about them. `measure` computes every metric that applies."""

    images: Images
    classes: dict[str, Classes] = field(default_factory=dict)  # by question; "" is the first one
    captions: list[list[str]] | None = None  # of each image, one or more
    groups: list[str] | None = None  # of each image; metrics are also computed for each group
    train: tuple[Images, dict[str, Tensor]] | None = None  # images, and labels by question
    # True if the groups are drawing styles of the same things. A metric is then the mean over
    # groups. Without a train split, the neighbours of an image come from the other groups. Without
    # captions, class names are used as captions, too.
    across_groups: bool = False
    excluded_groups: frozenset[str] = frozenset()  # not in any mean, and never neighbours
    train_error: str = ""  # why the train split cannot be used, if there is one

    def __post_init__(self) -> None:
        if not len(self.images):
            raise Unusable("no images")
        for classes in self.classes.values():
            low, high = int(classes.labels.min()), int(classes.labels.max())
            if low < 0 or high >= len(classes.names):
                raise Unusable(f"labels from {low} to {high}, but {len(classes.names)} class names")

    def select(self, indices: Tensor) -> "DataSet":
        """The data set with the labels, captions and groups of some images; `images` stays.

        indices: (m,) int64, of the images.
        """
        chosen = indices.tolist()
        classes = {
            question: replace(classes, labels=classes.labels[indices])
            for question, classes in self.classes.items()
        }
        captions = self.captions and [self.captions[i] for i in chosen]
        groups = self.groups and [self.groups[i] for i in chosen]
        return replace(self, classes=classes, captions=captions, groups=groups)


Open = Callable[[], DataSet]


def lines(path: Path) -> list[str]:
    """The lines of a text file; [] if there is no such file."""
    if not path.is_file():
        return []
    return [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
