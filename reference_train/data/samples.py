"""Image-caption samples of WebDataset tar files, read and decoded."""

import io
import json
import lzma
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import webdataset as wds
from PIL import Image

from ..command_line import CannotStart, first_line


class Sample(NamedTuple):
    """One image with its caption, as the tar file has it."""

    image: bytes  # an encoded image
    caption: str
    info: dict[str, Any]  # the sample's json, if it has one


def read_samples(shards: Sequence[str]) -> Iterator[Sample]:
    """The samples of tar files that hold both an image and a caption, in the files' order.

    Raises `CannotStart` for a shard that isn't there or can't be read.
    """
    try:
        for sample in wds.DataPipeline(wds.SimpleShardList(list(shards)), wds.tarfile_to_samples()):
            image = next((sample[e] for e in ("png", "jpg", "jpeg", "webp") if e in sample), None)
            if image is not None and "txt" in sample:
                info = json.loads(sample["json"]) if "json" in sample else {}
                yield Sample(image, sample["txt"].decode().strip(), info)
    except FileNotFoundError as error:
        raise CannotStart(f"no such shard: {error.filename}") from error
    except (OSError, EOFError, tarfile.TarError, lzma.LZMAError, zlib.error) as error:
        raise CannotStart(f"a shard can't be read: {first_line(error)}") from error


def decode(image: bytes, size: int) -> npt.NDArray[np.uint8]:
    """An encoded square image -> (3, size, size) uint8."""
    with Image.open(io.BytesIO(image)) as opened:
        rgb = opened.convert("RGB")
    if rgb.size != (size, size):
        rgb = rgb.resize((size, size), Image.Resampling.BICUBIC)
    pixels: npt.NDArray[np.uint8] = np.asarray(rgb).transpose(2, 0, 1)
    return pixels


def on_white(image: Image.Image) -> Image.Image:
    """RGB; what is transparent is white."""
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        white.alpha_composite(rgba)
        image = white
    return image.convert("RGB")
