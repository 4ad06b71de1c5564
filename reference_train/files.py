"""Files and folders that are there whole or not at all, and files from elsewhere."""

import contextlib
import hashlib
import os
import tempfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from rich.progress import wrap_file

from .errors import CannotStart, Stopped


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Yields where to write; what is written there becomes `path` at the end, unless one raises."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yields an empty folder that becomes `path` (--out) at the end, unless something raises.

    Raises `CannotStart` if `path` is there already, or can't be written.
    """
    if path.exists():
        raise CannotStart(f"--out {path}: is there already")
    try:
        parent = path.absolute().parent
        parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=parent, prefix=f".{path.name}.") as temporary:
            folder = Path(temporary) / path.name
            folder.mkdir()
            yield folder
            folder.replace(path)
    except OSError as error:
        raise CannotStart(f"--out {path}: can't be written: {error.strerror}") from error


def download(url: str, sha256: str, path: Path) -> Path:
    """Downloads a file of known SHA-256 to `path`.

    Raises `Stopped` if it doesn't come, or is another.
    """
    try:
        with urllib.request.urlopen(url, timeout=60) as answer:
            size = int(answer.headers["Content-Length"] or 0)
            with wrap_file(answer, size, description="downloading") as content:
                path.write_bytes(content.read())
    except OSError as error:
        raise Stopped(f"{url}: {error}; --package takes one that is on disk") from error
    if hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
        raise Stopped(f"{url}: not the file it was (SHA-256); --package takes another")
    return path
