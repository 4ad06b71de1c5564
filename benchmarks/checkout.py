"""Runs from a bare checkout: no installation needed, only torch, triton and numpy."""

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[1]


class KernelsFinder(MetaPathFinder):
    """Finds the folder `kernels/` as the package `cyclip_loss.kernels`.

    An installation maps the folder to that name (`package-dir` in pyproject.toml). In a checkout
    that is only on the path, `cyclip_loss` is found and its kernels are not.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """As `importlib` asks for it."""
        if fullname != "cyclip_loss.kernels":
            return None
        folder = ROOT / "kernels"
        return spec_from_file_location(
            fullname, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )


def make_kernels_importable() -> None:
    """Let `import cyclip_loss.kernels` find them where no installation does; imports nothing."""
    if not any(isinstance(finder, KernelsFinder) for finder in sys.meta_path):
        sys.meta_path.append(KernelsFinder())
