"""Data sets in WebDataset tar files: clip-benchmark's layout, and the held-out icons.

clip-benchmark (https://github.com/LAION-AI/CLIP_benchmark) lays a data set out as

    FOLDER/test/0.tar, 1.tar, ...   samples of an image and .cls (the number of a class) or .txt
                                    (captions, one on each line)
    FOLDER/test/nshards.txt         the number of tar files; it may be missing
    FOLDER/train/...                the same as test; it may be missing
    FOLDER/classnames.txt           the name of each class
    FOLDER/zeroshot_classification_templates.txt
                                    prompts, with {c} for the class; it may be missing
    FOLDER/dataset_type.txt         "retrieval", "multilabel", or missing
"""

import json
import tarfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data.samples import IMAGE_EXTENSIONS, samples_in
from .classification import classification_set
from .datasets import PICTURE_TEMPLATES, Classes, DataSet, Images, Member, Unusable, read_lines


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
                        place = Member(shard, image.name, image.offset_data, image.size)
                        self.samples.append({"image": place})
                        for field in files.keys() & {"cls", "txt", "json"}:
                            content: Any = tar.extractfile(files[field])
                            self.samples[-1][field] = content.read().decode("utf-8").strip()
            except (OSError, tarfile.TarError) as error:
                raise Unusable(f"{shard}: {getattr(error, 'strerror', None) or error}") from error
        super().__init__([sample["image"] for sample in self.samples])

    def texts(self, extension: str) -> list[str] | None:
        """A field of all samples; None if no sample has it. Raises `Unusable` if only some do."""
        found = [sample[extension] for sample in self.samples if extension in sample]
        if 0 < len(found) < len(self):
            raise Unusable(f"{len(self) - len(found)} of {len(self)} samples have no .{extension}")
        return found or None


def open_tars(folder: Path, name: str) -> DataSet:
    """A data set in clip-benchmark's layout."""
    if "multilabel" in read_lines(folder / "dataset_type.txt"):
        raise Unusable("images with several labels each are not evaluated")

    def read(split: str) -> tuple[TarImages, Tensor | None]:
        images = TarImages(shards(folder / split))
        labels = images.texts("cls")
        return images, None if labels is None else torch.tensor([int(label) for label in labels])

    images, labels = read("test")
    texts, data = images.texts("txt"), DataSet(images)
    if labels is not None:
        names = read_lines(folder / "classnames.txt")
        if not names:
            raise Unusable(f"no {folder / 'classnames.txt'}")
        if name.startswith("cifar"):
            names = [class_name.replace("_", " ") for class_name in names]
        read_train = partial(read, "train") if (folder / "train").is_dir() else None
        data = classification_set(folder, name, (images, labels), names, read_train)
    if texts is not None:
        data.captions = [[line for line in text.splitlines() if line] for text in texts]
        if not all(data.captions):
            raise Unusable("images without a caption")
    if labels is None and texts is None:
        raise Unusable(f"the samples of {folder / 'test'} have neither .cls nor .txt")
    return data


def shards(folder: Path) -> list[Path]:
    """0.tar, 1.tar, ..., as many as nshards.txt says. Without nshards.txt: all tar files."""
    if count := read_lines(folder / "nshards.txt"):
        return [folder / f"{number}.tar" for number in range(int(count[0]))]
    return sorted(folder.glob("*.tar"), key=lambda path: (len(path.name), path.name))


def open_icons(folder: Path) -> DataSet:
    """Held-out icons, `val-*.tar` with png, txt and json. The classes are their names."""
    images = TarImages(sorted(folder.glob("val-*.tar")))
    captions, infos = images.texts("txt"), images.texts("json")
    if captions is None or infos is None:
        raise Unusable(f"the samples of {folder}/val-*.tar lack .txt or .json")
    names = [str(json.loads(info)["name"]) for info in infos]
    numbers = {name: number for number, name in enumerate(sorted(set(names)))}
    labels = torch.tensor([numbers[name] for name in names])
    classes = Classes(labels, list(numbers), PICTURE_TEMPLATES)
    return DataSet(images, {"": classes}, [[caption] for caption in captions])
