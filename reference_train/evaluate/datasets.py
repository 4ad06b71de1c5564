"""A data set of `evaluate`: images with their labels, captions and groups."""

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
    """A data set cannot be evaluated. The table shows the message as the reason."""


class Member(NamedTuple):
    """A file in a tar file, and its place there."""

    shard: Path
    name: str
    offset: int
    size: int


class Images:
    """Images by index, for a `torch.utils.data.DataLoader`.

    places: for each image its file, its member of a tar file, or its pixels (3, S, S) uint8.
    """

    def __init__(self, places: Tensor | Sequence[Path | Member]):
        self.places = places

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int, /) -> Image.Image | str:
        """An RGB image or, if it cannot be decoded, the name of its file and the reason."""
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
    """A classification task: which of C classes does each of n images show?"""

    labels: Tensor  # (n,) int64
    names: list[str]  # of the C classes
    templates: list[str]  # prompts, each with {} for the name of a class
    superclass: Tensor | None = None  # (C,) int64, the superclass of each class


@dataclass
class DataSet:
    """n images with labels, captions and groups. `measure` computes every metric that applies."""

    images: Images
    classes: dict[str, Classes] = field(default_factory=dict)  # by task; the main task is ""
    captions: list[list[str]] | None = None  # for each image, one or more
    groups: list[str] | None = None  # the group of each image; each group also has its own metrics
    train: tuple[Images, dict[str, Tensor]] | None = None  # images, and their labels by task
    # True if the groups are drawing styles of the same concepts. A metric is then the mean over
    # groups. Without a train split, the neighbours of an image come from the other groups. Without
    # captions, class names are used as captions, too.
    across_groups: bool = False
    # Groups that have metrics, but are not in means and not among neighbours.
    excluded_groups: frozenset[str] = frozenset()
    train_error: str = ""  # why the data set's train split cannot be used

    def __post_init__(self) -> None:
        if not len(self.images):
            raise Unusable("no images")
        for classes in self.classes.values():
            low, high = int(classes.labels.min()), int(classes.labels.max())
            if low < 0 or high >= len(classes.names):
                raise Unusable(f"labels from {low} to {high}, but {len(classes.names)} class names")

    def select(self, indices: Tensor) -> "DataSet":
        """The data set with the labels, captions and groups of these images only.

        indices: (m,) int64, of the images. `images` itself is not changed.
        """
        chosen = indices.tolist()
        classes = {
            task: replace(classes, labels=classes.labels[indices])
            for task, classes in self.classes.items()
        }
        captions = self.captions and [self.captions[i] for i in chosen]
        groups = self.groups and [self.groups[i] for i in chosen]
        return replace(self, classes=classes, captions=captions, groups=groups)


Opener = Callable[[], DataSet]


def read_lines(path: Path) -> list[str]:
    """The lines of a text file; [] if there is no such file."""
    if not path.is_file():
        return []
    return [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
