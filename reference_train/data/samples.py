"""Reads and decodes the image-caption samples of WebDataset tar files."""

import hashlib
import io
import json
import lzma
import os
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import webdataset as wds
from PIL import Image
from webdataset.tariterators import base_plus_ext

from ..command_line import UsageError, first_line

IMAGE_EXTENSIONS = ("png", "jpg", "jpeg", "webp")
READ_ERRORS = (OSError, EOFError, ValueError, tarfile.TarError, lzma.LZMAError, zlib.error)


class Sample(NamedTuple):
    """One image with its caption, as the tar file has it."""

    key: str  # the name that its files share, without the extension
    image: bytes  # an encoded image
    caption: str
    info: dict[str, Any]  # the sample's json, if it has one


def read_samples(shards: Sequence[str]) -> Iterator[Sample]:
    """The samples of tar files that have both an image and a caption, in the order of the files.

    Raises `UsageError` for a shard that does not exist or can't be read.
    """
    for shard in shards:
        pipeline = wds.DataPipeline(wds.SimpleShardList([shard]), wds.tarfile_to_samples())
        try:
            for sample in pipeline:
                image = next((sample[e] for e in IMAGE_EXTENSIONS if e in sample), None)
                if image is not None and "txt" in sample:
                    info = json.loads(sample["json"]) if "json" in sample else {}
                    caption = sample["txt"].decode().strip()
                    yield Sample(sample["__key__"], image, caption, info)
        except READ_ERRORS as error:
            raise UsageError(f"{shard}: can't be read: {first_line(error)}") from error


def samples_in(tar: tarfile.TarFile) -> Iterator[dict[str, tarfile.TarInfo]]:
    """Yields a dict for each sample of an open tar file: extension -> header of the file."""
    for _, members in groupby(tar, key=lambda member: base_plus_ext(member.name)[0]):
        yield {(base_plus_ext(member.name)[1] or "").lower(): member for member in members}


def fingerprint(shards: Sequence[str]) -> str:
    """A string that identifies shards by their names and sizes, whatever their folder."""
    files = [
        f"{Path(shard).name} {Path(shard).stat().st_size}" if os.path.isfile(shard) else shard
        for shard in shards
    ]
    return f"{len(shards)} shards, {hashlib.sha256(repr(files).encode()).hexdigest()[:12]}"


def decode(image: bytes, size: int) -> npt.NDArray[np.uint8]:
    """An encoded square image -> (3, size, size) uint8."""
    with Image.open(io.BytesIO(image)) as opened:
        rgb = opened.convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(rgb).transpose(2, 0, 1)
