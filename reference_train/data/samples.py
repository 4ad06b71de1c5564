"""Image-caption samples of WebDataset tar files, read and decoded."""

import io
import json
import lzma
import random
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import webdataset as wds
from PIL import Image

from ..errors import CannotStart


class Sample(NamedTuple):
    """One image with its caption, as the tar file has it."""

    image: bytes  # an encoded image
    caption: str
    info: dict[str, Any]  # the sample's json, if it has one


def read_samples(
    shards: Sequence[str], shuffle: random.Random | None = None, buffer: int = 2000
) -> Iterator[Sample]:
    """The samples of WebDataset tar files that hold both an image and a caption.

    shuffle: the random numbers of a shuffle buffer; none keeps the order of the files.
    """
    stages = [wds.SimpleShardList(list(shards)), wds.tarfile_to_samples()]
    if shuffle is not None:
        stages.append(wds.shuffle(buffer, initial=buffer, rng=shuffle))
    try:
        for sample in wds.DataPipeline(*stages):
            image = next((sample[e] for e in ("png", "jpg", "jpeg", "webp") if e in sample), None)
            if image is not None and "txt" in sample:
                info = json.loads(sample["json"]) if "json" in sample else {}
                yield Sample(image, sample["txt"].decode().strip(), info)
    except FileNotFoundError as error:
        raise CannotStart(f"no such shard: {error.filename}") from error
    except (OSError, EOFError, tarfile.TarError, lzma.LZMAError, zlib.error) as error:
        raise CannotStart(f"a shard can't be read: {str(error).splitlines()[0]}") from error


def decode(image: bytes, size: int) -> np.ndarray:
    """An encoded image -> (3, size, size) uint8: on white, shorter side scaled, centre cropped."""
    with Image.open(io.BytesIO(image)) as opened:
        opened.draft("RGB", (size, size))  # lets the JPEG decoder skip what would be scaled away
        if opened.mode in ("RGBA", "LA", "P"):
            rgba = opened.convert("RGBA")
            opened = Image.new("RGBA", rgba.size, "white")
            opened.alpha_composite(rgba)
        rgb = opened.convert("RGB")
    if rgb.size != (size, size):
        scale = size / min(rgb.size)
        width, height = (max(size, round(side * scale)) for side in rgb.size)
        left, top = (width - size) // 2, (height - size) // 2
        rgb = rgb.resize((width, height), Image.Resampling.BICUBIC)
        rgb = rgb.crop((left, top, left + size, top + size))
    return np.asarray(rgb).transpose(2, 0, 1)
