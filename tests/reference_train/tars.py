"""Tar files: shards, and npm's packages."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any


def write_tar(path: Path, files: dict[str, bytes], mode: Any = "w") -> Path:
    with tarfile.open(path, mode) as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def write_package(path: Path, files: dict[str, Any]) -> Path:
    """JSON files, as npm packs them."""
    content = {f"package/{name}": json.dumps(data).encode() for name, data in files.items()}
    return write_tar(path, content, "w:gz")
