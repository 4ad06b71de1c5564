"""npm's packages: downloaded, checked and read."""

import hashlib
import io
import json
import signal
import sys
import tarfile
import urllib.request
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.progress import wrap_file

from ..errors import CannotStart, Stopped, first_line
from ..files import written_whole


class Package(NamedTuple):
    """A package of npm's registry. sha256: of its archive."""

    name: str
    version: str
    sha256: str

    @property
    def file(self) -> str:
        """The archive's name, which `npm pack` gives it, too, but for the scope."""
        return f"{self.name.rpartition('/')[2]}-{self.version}.tgz"

    @property
    def url(self) -> str:
        """Where it is downloaded from."""
        return f"https://registry.npmjs.org/{self.name}/-/{self.file}"


def fetch(package: Package, folder: Path) -> Path:
    """The archive of `package` in `folder`, downloaded if it is not there.

    Raises `Stopped` if it doesn't come, or is another.
    """
    path = folder / package.file
    if path.is_file():
        return path
    try:
        with urllib.request.urlopen(package.url, timeout=60) as answer:
            size = int(answer.headers["Content-Length"] or 0)
            with wrap_file(answer, size, description=f"downloading {path.name}") as content:
                data = content.read()
    except OSError as error:
        raise Stopped(f"{package.url}: {error}; --help says how to give what is on disk") from error
    if hashlib.sha256(data).hexdigest() != package.sha256:
        raise Stopped(f"{package.url}: not the file it was (SHA-256)")
    with written_whole(path) as partial:
        partial.write_bytes(data)
    return path


def read_json(archive: Path, files: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Some JSON files of an archive by their names, in the archive's order.

    Raises `CannotStart` if one is not there, or can't be read.
    """
    missing = {f"package/{file}": file for file in files}
    try:
        with tarfile.open(archive, "r|*") as tar:
            for member in tar:
                if (file := missing.pop(member.name, None)) is not None:
                    content = tar.extractfile(member)
                    yield file, json.load(content or io.BytesIO())
    except (OSError, EOFError, ValueError, tarfile.TarError, zlib.error) as error:
        raise CannotStart(f"{archive}: can't be read: {first_line(error)}") from error
    if missing:
        raise CannotStart(f"{archive}: has no {min(missing.values())}: not the package expected")


def end_cleanly() -> None:
    """Makes SIGTERM end this process as an error would, so that no unfinished file is left."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
