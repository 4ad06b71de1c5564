"""What a data set is: images with classes, captions or both; in tar files, folders or memory."""

import io
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from ..data.samples import on_white

IMAGES = ("png", "jpg", "jpeg", "webp")
FIELDS = ("cls", "txt", "json")


class Unusable(Exception):
    """A data set that is not as it should be; the message is the reason in the table."""


class Unreadable(Exception):
    """A picture that can't be decoded; the message names its file."""


class Images(Protocol):
    """Images by number, as a `torch.utils.data.DataLoader` takes them."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Any: ...  # an RGB image of PIL; raises `Unreadable`


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
    across_groups: bool = False
    apart: frozenset[str] = frozenset()
    names_find_images: bool = False  # also ask which image a class name belongs to
    train_lacks: str = ""  # why there is none, if it is there but not as it should be

    def __post_init__(self) -> None:
        if not len(self.images):
            raise Unusable("no images")
        for classes in self.classes.values():
            if int(classes.labels.max()) >= len(classes.names) or int(classes.labels.min()) < 0:
                raise Unusable(
                    f"labels from {int(classes.labels.min())} to {int(classes.labels.max())}, "
                    f"but {len(classes.names)} class names"
                )

    def only(self, rows: Tensor) -> "DataSet":
        """What is known of some images; `images` stays as it is. rows: (m,), which."""
        chosen = rows.tolist()
        classes = {q: replace(c, labels=c.labels[rows]) for q, c in self.classes.items()}
        captions = self.captions and [self.captions[row] for row in chosen]
        groups = self.groups and [self.groups[row] for row in chosen]
        return replace(self, classes=classes, captions=captions, groups=groups)


def decode(file: Any, where: str) -> Image.Image:
    """An RGB image from a path or a file. Raises `Unreadable`, with `where` it is."""
    try:
        with Image.open(file) as image:
            return on_white(image)
    except UnidentifiedImageError as error:
        raise Unreadable(f"{where}: not an image") from error
    except Exception as error:  # Pillow says SyntaxError of a broken PNG, for example
        raise Unreadable(f"{where}: {error}") from error


class TarImages:
    """The samples of WebDataset tar files, by number: (N,) images of PIL, and their fields.

    webdataset itself streams, one worker a shard. Here the shards are few, the table wants them in
    order, and the consistency score a sample out of 1.3 million: so the places of the images are
    looked up once in the tar files' own headers.
    """

    def __init__(self, shards: Sequence[Path]):
        """Raises `Unusable` if a shard can't be read."""
        self.places: list[tuple[Path, str, int, int]] = []  # shard, member, offset, size
        self.fields: list[dict[str, bytes]] = []  # "cls", "txt", "json"
        for shard in shards:
            try:
                with tarfile.open(shard, "r:") as tar:
                    self._index(shard, tar)
            except (OSError, tarfile.TarError) as error:
                raise Unusable(f"{shard}: {getattr(error, 'strerror', None) or error}") from error

    def _index(self, shard: Path, tar: tarfile.TarFile) -> None:
        """Adds the samples of one file: members with the same name up to its first dot."""
        places: dict[str, tuple[Path, str, int, int]] = {}
        fields: dict[str, dict[str, bytes]] = {}
        for member in tar:
            folder, _, base = member.name.rpartition("/")
            stem, _, extension = base.partition(".")
            key = f"{folder}/{stem}"
            if extension in IMAGES:
                places[key] = (shard, member.name, member.offset_data, member.size)
            elif extension in FIELDS:
                content = tar.extractfile(member)
                assert content is not None
                fields.setdefault(key, {})[extension] = content.read()
        self.places += places.values()
        self.fields += [fields.get(key, {}) for key in places]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int, /) -> Image.Image:
        path, member, offset, size = self.places[index]
        with path.open("rb") as file:
            file.seek(offset)
            return decode(io.BytesIO(file.read(size)), f"{path}, {member}")

    def texts(self, extension: str) -> list[str] | None:
        """A field of all samples; None if no sample has it. Raises `Unusable` if some lack it."""
        found = [sample[extension] for sample in self.fields if extension in sample]
        if not found:
            return None
        if len(found) < len(self):
            raise Unusable(f"{len(self) - len(found)} of {len(self)} samples have no .{extension}")
        return [text.decode("utf-8").strip() for text in found]

    def labels(self) -> Tensor | None:
        """(N,), the classes of all samples; None if they have none."""
        found = self.texts("cls")
        return None if found is None else torch.tensor([int(label) for label in found])


class Files:
    """Images in files of their own."""

    def __init__(self, paths: Sequence[Path]):
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int, /) -> Image.Image:
        return decode(self.paths[index], str(self.paths[index]))


class Pixels:
    """Images in memory, (n, 3, S, S) uint8."""

    def __init__(self, pixels: Tensor):
        self.pixels = pixels

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int, /) -> Image.Image:
        return Image.fromarray(self.pixels[index].permute(1, 2, 0).contiguous().numpy())


def sample_rows(rows: int, most: int) -> Tensor:
    """At most `most` of `rows` numbers in order, the same in every run: (min(rows, most),)."""
    if rows <= most:
        return torch.arange(rows)
    drawn = torch.randperm(rows, generator=torch.Generator().manual_seed(0))
    return drawn[:most].sort().values
