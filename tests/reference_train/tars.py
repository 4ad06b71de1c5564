"""Tar files of pictures and captions, whole and damaged."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image


def write_tar(path: Path, files: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def make_shards(folder: Path) -> Path:
    """Shards of 8 pairs: a picture of noise, and a caption with its number."""
    folder.mkdir()
    names = [*(f"train-{number:05d}.tar" for number in range(4)), "val-00000.tar"]
    rng = np.random.default_rng(0)
    for name in names:
        pairs: dict[str, bytes] = {}
        for i in range(8):
            noise = rng.integers(256, size=(40, 36, 3), dtype=np.uint8)
            pairs[f"{i}.png"] = png(Image.fromarray(noise))
            pairs[f"{i}.txt"] = f"{name} {i}".encode()
        write_tar(folder / name, pairs)
    (folder / "sizes.json").write_text(json.dumps(dict.fromkeys(names, 8)))
    return folder


def break_picture(shard: Path) -> None:
    """Overwrites the header of a shard's first picture."""
    content = bytearray(shard.read_bytes())
    start = content.index(b"PNG")
    content[start : start + 8] = bytes(8)
    shard.write_bytes(content)
