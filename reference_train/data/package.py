"""The command line of a data set that is made from one package."""

import argparse
import hashlib
import tempfile
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from rich.progress import wrap_file

from ..arguments import Parser
from ..errors import Stopped
from ..files import new_folder


class Package(NamedTuple):
    """Where a package comes from."""

    url: str
    sha256: str
    by_hand: str  # the command that fetches it


def make_data_set(
    argv: Sequence[str], name: str, doc: str | None, package: Package, build: Callable[..., str]
) -> None:
    """Makes a data set in a new folder, whole or not at all.

    build: (the package's file, the folder, an empty one for its work) -> what to say at the end.
    """
    parser = Parser(
        prog=f"python -m reference_train.data.{name}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=doc,
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder")
    parser.add_argument(
        "--package",
        type=Path,
        metavar="FILE",
        help=f"a package on disk (`{package.by_hand}`); default: downloaded",
    )
    arguments = parser.parse_args(argv)
    with new_folder(arguments.out) as folder, tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        file = arguments.package or download(package.url, package.sha256, work / "downloaded")
        print(f"{arguments.out}: {build(file, folder, work)}")


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
