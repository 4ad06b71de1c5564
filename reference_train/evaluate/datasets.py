"""What a data set is: images with classes, captions or both; in tar files, folders or memory."""

import io
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from torch import Tensor

from ..command_line import first_line
from ..data.samples import IMAGES, on_white, samples_in

FIELDS = {"cls", "txt", "json"}


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
                        for field in FIELDS & files.keys():
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
