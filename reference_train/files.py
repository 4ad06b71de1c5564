"""Writes files and folders whole or not at all, and locks folders."""

import contextlib
import errno
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from .command_line import CannotStart, Stopped, first_line, say

# Errors that a disk gives when it is full, or may not be written.
CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yields a temporary path to write to. If nothing raises, the file is then renamed to `path`.

    Raises `Stopped` if the file can't be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        # On a full disk PyTorch raises a RuntimeError that does not give the reason.
        why = getattr(error, "strerror", None) or f"is the disk full? ({first_line(error)})"
        raise Stopped(f"{path} can't be written: {why}") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_text(content: str, path: Path) -> None:
    """Writes a text file whole or not at all."""
    with atomic_write(path) as temporary:
        temporary.write_text(content, encoding="utf-8")


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yields an empty temporary folder. If nothing raises, it is then renamed to `path` (--out).

    Raises `CannotStart` if `path` exists or can't be written, and `Stopped` if the disk is full.
    """
    if path.exists():
        raise CannotStart(f"--out {path}: already exists")
    check_writable(path)
    parent = path.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=parent, prefix=f".{path.name}.") as temporary:
        folder = Path(temporary) / path.name
        folder.mkdir()
        try:
            yield folder
        except OSError as error:
            if error.errno not in CANNOT_WRITE:
                raise
            raise Stopped(f"--out {path} can't be written: {error.strerror}") from error
        folder.replace(path)


def check_writable(folder: Path) -> None:
    """Raises `CannotStart` if the folder of --out can't be created or written. Creates nothing."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    try:  # Permission bits are not enough: /proc, for example, looks writable.
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        why = f"{existing} is not a writable folder"
        raise CannotStart(f"--out: {folder} can't be written: {why}") from error


@contextlib.contextmanager
def locked(folder: Path, wait: bool = False) -> Iterator[None]:
    """Creates a folder, and holds its lock until the context or the process ends.

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
            why = "another process is using it: choose another --name or --out"
            raise CannotStart(f"{folder}: {why}") from error
        except (ImportError, OSError) as error:
            say(f"{folder} can't be locked ({error}): do not start a second command with it")
        yield
