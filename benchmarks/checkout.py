"""Runs from a bare checkout: no installation needed, only torch, triton and numpy."""

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def make_kernels_importable() -> None:
    """Register the folder `kernels/` as the package `cyclip_loss.kernels`, unless it is installed.

    An installation maps the folder to that name (`package-dir` in pyproject.toml). In a checkout
    that is only on the path, `cyclip_loss` is found and its kernels are not.
    """
    import cyclip_loss

    if importlib.util.find_spec("cyclip_loss.kernels") is not None:
        return
    folder = ROOT / "kernels"
    spec = importlib.util.spec_from_file_location(
        "cyclip_loss.kernels", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    if spec is None or spec.loader is None:
        raise ImportError(f"no kernels in {folder}: `pip install -e {ROOT}` from a full checkout")
    module = importlib.util.module_from_spec(spec)
    sys.modules["cyclip_loss.kernels"] = module
    spec.loader.exec_module(module)
    cyclip_loss.kernels = module
