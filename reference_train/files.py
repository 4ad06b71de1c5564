"""Writes files and folders whole or not at all."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from .command_line import RunFailed, UsageError


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yields a temporary path to write to. If nothing raises, the file is then renamed to `path`.

    Raises `RunFailed` if the file can't be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise RunFailed(f"{path} can't be written: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_text(content: str, path: Path) -> None:
    """Writes a text file whole or not at all."""
    with atomic_write(path) as temporary:
        temporary.write_text(content, encoding="utf-8")


def make_folder(path: Path) -> None:
    """Makes a folder (--out) unless it exists. Raises `UsageError` if it can't be written."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out: {path} can't be written: {error}") from error


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yields an empty temporary folder. If nothing raises, it is then renamed to `path` (--out).

    Raises `UsageError` if `path` exists or can't be written.
    """
    if path.exists():
        raise UsageError(f"--out {path}: already exists")
    parent = path.absolute().parent
    make_folder(parent)
    with tempfile.TemporaryDirectory(dir=parent, prefix=f".{path.name}.") as temporary:
        folder = Path(temporary) / path.name
        folder.mkdir()
        yield folder
        folder.replace(path)
