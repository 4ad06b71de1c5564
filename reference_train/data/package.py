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
from ..files import new_folder, written_whole


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
        file = arguments.package
        if file is None:
            file = download(package.url, package.sha256, work / Path(package.url).name)
        print(f"{arguments.out}: {build(file, folder, work)}")


def download(url: str, sha256: str, path: Path) -> Path:
    """Downloads a file of known SHA-256 to `path`, whole.

    Raises `Stopped` if it doesn't come, or is another.
    """
    try:
        with urllib.request.urlopen(url, timeout=60) as answer:
            size = int(answer.headers["Content-Length"] or 0)
            with wrap_file(answer, size, description=f"downloading {path.name}") as content:
                data = content.read()
    except OSError as error:
        raise Stopped(f"{url}: {error}; --help says how to give what is on disk") from error
    if hashlib.sha256(data).hexdigest() != sha256:
        raise Stopped(f"{url}: not the file it was (SHA-256); --help says how to give another")
    with written_whole(path) as partial:
        partial.write_bytes(data)
    return path
