"""Writes files and folders whole or not at all, and locks folders."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import filelock

from .command_line import RunFailed, UsageError, first_line, say

# The workers of a process that was killed hold its lock until they notice, after some seconds.
PATIENCE = 10.0  # seconds


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yields a temporary path to write to. If nothing raises, the file is then renamed to `path`.

    Raises `RunFailed` if the file can't be written.
    """
    temporary = path.with_name(f".{path.name}.part")  # a killed process leaves at most this one
    try:
        yield temporary
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        # torch.save raises RuntimeError on a full disk, and does not say why.
        why = getattr(error, "strerror", None) or f"is the disk full? {first_line(error)}"
        raise RunFailed(f"{path} can't be written: {why}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def write_text(content: str, path: Path) -> None:
    """Writes a text file whole or not at all."""
    with atomic_write(path) as temporary:
        temporary.write_text(content, encoding="utf-8")


def make_folder(path: Path) -> None:
    """Makes a folder (--out) unless it exists. Raises `UsageError` if it can't be written."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise UsageError(f"--out: {path} can't be written: {error}") from error


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Makes a folder (--out), and locks it until the context or the process ends.

    Raises `UsageError` if another process holds the lock for `PATIENCE` seconds, or the folder
    can't be written.
    """
    make_folder(folder)
    lock = filelock.FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=PATIENCE)
    except filelock.Timeout as error:
        why = "another process is writing to it: choose another --out or --name"
        raise UsageError(f"{folder}: {why}") from error
    except (OSError, NotImplementedError) as error:  # some network file systems have no locks
        say(f"{folder} can't be locked, so let no other process write to it: {error}")
    try:
        yield
    finally:
        lock.release()


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
