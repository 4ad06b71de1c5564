"""Writes files and folders whole or not at all, and locks folders."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import filelock

from .command_line import RunFailed, UsageError, first_line

# The workers of a process that was killed hold its lock until they notice, after some seconds.
PATIENCE = 10.0  # seconds


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
    except RuntimeError as error:
        if "inline_container" not in str(error):  # PyTorch's writer, which gives no reason
            raise
        raise RunFailed(
            f"{path} can't be written: is the disk full? {first_line(error)}"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_text(content: str, path: Path) -> None:
    """Writes a text file whole or not at all."""
    with atomic_write(path) as temporary:
        temporary.write_text(content, encoding="utf-8")


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yields an empty temporary folder. If nothing raises, it is then renamed to `path` (--out).

    Raises `UsageError` if `path` exists or can't be written.
    """
    if path.exists():
        raise UsageError(f"--out {path}: already exists")
    parent = path.absolute().parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        temporary = tempfile.TemporaryDirectory(dir=parent, prefix=f".{path.name}.")
    except OSError as error:
        raise UsageError(f"--out: {path} can't be written: {error}") from error
    with temporary:
        folder = Path(temporary.name) / path.name
        folder.mkdir()
        yield folder
        folder.replace(path)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Creates a folder, and holds its lock until the context or the process ends.

    Raises `UsageError` if another process holds the lock for `PATIENCE` seconds, or the folder
    can't be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(folder / ".lock").acquire(timeout=PATIENCE)
    except filelock.Timeout as error:
        why = "another process is using it: choose another --name or --out"
        raise UsageError(f"{folder}: {why}") from error
    except OSError as error:
        raise UsageError(f"--out: {folder} can't be written: {error}") from error
    with lock:
        yield
