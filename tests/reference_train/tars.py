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


def make_shards(folder: Path, **parts: int) -> Path:
    """Shards of 8 pairs: a picture of noise, and a caption with its number.

    parts: how many shards of each name.
    """
    folder.mkdir()
    rng = np.random.default_rng(0)
    for part, count in parts.items():
        for number in range(count):
            pairs: dict[str, bytes] = {}
            for i in range(8):
                noise = rng.integers(256, size=(40, 36, 3), dtype=np.uint8)
                pairs[f"{number}_{i}.png"] = png(Image.fromarray(noise))
                pairs[f"{number}_{i}.txt"] = f"no {number} {i}".encode()
            write_tar(folder / f"{part}-{number:05d}.tar", pairs)
    sizes = {path.name: 8 for path in folder.glob("*.tar")}
    (folder / "sizes.json").write_text(json.dumps(sizes))
    return folder


def break_picture(shard: Path) -> None:
    """Overwrites the header of a shard's first picture."""
    content = bytearray(shard.read_bytes())
    start = content.index(b"PNG")
    content[start : start + 8] = bytes(8)
    shard.write_bytes(content)
