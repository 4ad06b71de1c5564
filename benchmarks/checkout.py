"""Runs from a bare checkout: no installation needed, only torch, triton and numpy."""

from pathlib import Path

import cyclip_loss

ROOT = Path(__file__).parents[1]


def make_kernels_importable() -> None:
    """Let `import cyclip_loss.kernels` find `kernels/` where no installation does.

    An installation maps the folder to that name (`package-dir` in pyproject.toml). In a checkout
    that is only on the path, `cyclip_loss` is found and its kernels are not. Imports neither them
    nor Triton.
    """
    if str(ROOT) not in cyclip_loss.__path__:
        cyclip_loss.__path__.append(str(ROOT))
