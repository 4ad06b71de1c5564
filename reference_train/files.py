"""Files and folders that appear whole or not at all, and locks."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from .command_line import CannotStart, Stopped, first_line, say


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Yields a temporary path. If nothing raises, its file is renamed to `path` at the end.

    Raises `Stopped` if the file can't be written.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield partial
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:
        # PyTorch's writer does not say that a disk is full.
        why = getattr(error, "strerror", None) or f"is the disk full? ({first_line(error)})"
        raise Stopped(f"{path} can't be written: {why}") from error
    finally:
        partial.unlink(missing_ok=True)


def write_text(content: str, path: Path) -> None:
    """Writes a text file whole."""
    with written_whole(path) as partial:
        partial.write_text(content, encoding="utf-8")


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yields an empty folder. If nothing raises, it is renamed to `path` (--out) at the end.

    Raises `CannotStart` if `path` is there already, or can't be written.
    """
    if path.exists():
        raise CannotStart(f"--out {path}: is there already")
    check_writable(path)
    parent = path.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=parent, prefix=f".{path.name}.") as made:
        folder = Path(made) / path.name
        folder.mkdir()
        yield folder
        folder.replace(path)


def check_writable(folder: Path) -> None:
    """Raises `CannotStart` if a folder (of --out) can't be made or written. Makes nothing."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    try:  # Permissions do not tell: /proc, for example, looks writable.
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        why = f"{existing} is no folder to write to"
        raise CannotStart(f"--out: {folder} can't be written: {why}") from error


@contextlib.contextmanager
def locked(folder: Path, wait: bool = False) -> Iterator[None]:
    """Makes a folder, and holds its lock until the context or the process ends.

    wait: wait for another process that holds the lock.

    Raises `CannotStart` if another process holds the lock and wait is false, or the folder can't be
    written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("w")
    except OSError as error:
        raise CannotStart(f"--out: {folder} can't be written: {error}") from error
    with file:
        try:
            import fcntl

            # A record lock is not inherited by forked children, which may outlive this process.
            fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except (BlockingIOError, PermissionError) as error:
            why = "another process is at work there: choose another --name"
            raise CannotStart(f"{folder}: {why}") from error
        except (ImportError, OSError) as error:
            say(f"{folder} can't be locked ({error}): start no second run of its --name")
        yield
