"""Finds the data sets in the folders of `--data`."""

import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from torchvision.datasets import CIFAR10, CIFAR100

from .cifar import open_cifar
from .datasets import Opener
from .paper import SETS
from .tar_sets import open_icons, open_tars


def find(roots: Sequence[Path]) -> tuple[dict[str, Opener], list[Path], list[Path]]:
    """The data sets in `roots`, data sets with the name of another one, and what is no data set.

    roots: data sets, or folders of data sets. The paper's data sets come first in the result.
    """
    found: dict[str, Opener] = {}
    repeated: list[Path] = []
    unrecognised: list[Path] = []

    def add(known: tuple[str, Opener], path: Path) -> None:
        if found.setdefault(*known) is not known[1]:
            repeated.append(path)

    for root in dict.fromkeys(path.resolve() for path in roots):  # so that "." has a name
        if known := recognise(root):
            add(known, root)
            continue
        for path in sorted(root.iterdir()):
            try:
                known = recognise(path) if path.is_dir() else None
            except PermissionError:  # a disk's lost+found, for example
                known = None
            if known:
                add(known, path)
            elif not path.name.startswith("."):
                unrecognised.append(path)
    ordered = {name: found[name] for name in [*SETS, *found] if name in found}
    return ordered, repeated, unrecognised


def recognise(folder: Path) -> tuple[str, Opener] | None:
    """The name of the data set in a folder, and its opener; None if there is no data set."""
    name = re.sub(r"^(wds-)?(vtab-)?", "", folder.name.lower().replace("_", "-"))
    if (folder / "test" / "nshards.txt").is_file() or (folder / "test" / "0.tar").is_file():
        return name, partial(open_tars, folder, name)
    if next(folder.glob("val-*.tar"), None) is not None:
        return name, partial(open_icons, folder)
    for kind in (CIFAR10, CIFAR100):
        if folder.name == kind.base_folder:
            return kind.__name__.lower(), partial(open_cifar, folder.parent, kind)
    return None
