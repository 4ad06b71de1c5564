"""Files and folders that are there whole or not at all."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from .command_line import CannotStart, Stopped, first_line, say


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Yields where to write; what is written there becomes `path` at the end, unless one raises.

    Raises `Stopped` if it can't be written.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield partial
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:
        # PyTorch's writer does not say that a disk is full
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
    """Yields an empty folder that becomes `path` (--out) at the end, unless something raises.

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
    """Raises `CannotStart` if a folder (of --out) can't be made or written; makes nothing."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    try:  # some folders only look as if they could be written to: /proc, for example
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        why = f"{there} is no folder to write to"
        raise CannotStart(f"--out: {folder} can't be written: {why}") from error


@contextlib.contextmanager
def locked(folder: Path, wait: bool = False) -> Iterator[None]:
    """Makes a folder, for one process at a time; the end of the process, too, frees it.

    Raises `CannotStart` if another process has it and wait is false, or it can't be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("w")
    except OSError as error:
        raise CannotStart(f"--out: {folder} can't be written: {error}") from error
    with file:
        try:
            import fcntl

            # a record lock: forked children, which may outlive this process, don't have it
            fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except (BlockingIOError, PermissionError) as error:
            taken = "another process is at work there: choose another --name"
            raise CannotStart(f"{folder}: {taken}") from error
        except (ImportError, OSError) as error:
            say(f"{folder} can't be locked ({error}): don't use its --name twice at once")
        yield
