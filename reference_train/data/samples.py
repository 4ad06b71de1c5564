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
DECOMPRESSION_ERRORS = (lzma.LZMAError, zlib.error)


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
        except FileNotFoundError as error:
            raise UsageError(f"no such shard: {shard}") from error
        except (OSError, EOFError, ValueError, tarfile.TarError, *DECOMPRESSION_ERRORS) as error:
            raise UsageError(f"{shard}: can't be read: {first_line(error)}") from error


def samples_in(tar: tarfile.TarFile) -> Iterator[dict[str, tarfile.TarInfo]]:
    """Yields a dict for each sample of an open tar file: extension -> header of the file."""
    for _, members in groupby(tar, key=lambda member: base_plus_ext(member.name)[0]):
        yield {(base_plus_ext(member.name)[1] or "").lower(): member for member in members}


def count_pairs(shard: str, limit: int) -> int:
    """The number of samples with an image and a caption in a tar file, counted up to `limit`.

    Only headers are read.
    """
    pairs = 0
    try:
        with tarfile.open(shard) as tar:
            for sample in samples_in(tar):
                if "txt" in sample and not sample.keys().isdisjoint(IMAGE_EXTENSIONS):
                    pairs += 1
                if pairs == limit:
                    break
    except (OSError, EOFError, tarfile.TarError, *DECOMPRESSION_ERRORS):
        pass  # samples after the damage can't be read
    return pairs


def ends_early(shard: str) -> bool:
    """Whether a local tar file lacks the 1,024 zero bytes with which it should end.

    False for compressed and remote files, which are not checked.
    """
    if not shard.endswith(".tar") or not os.path.isfile(shard):
        return False
    with open(shard, "rb") as file:
        file.seek(max(0, os.path.getsize(shard) - 1024))
        return file.read() != bytes(1024)


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


def on_white(image: Image.Image) -> Image.Image:
    """The image in RGB. Transparent parts are white."""
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return image.convert("RGB")
