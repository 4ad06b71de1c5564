"""Icons as Iconify stores them (https://iconify.design/docs/types/iconify-json.html)."""

import hashlib
import io
import re
from typing import Any

from PIL import Image

from ..errors import Stopped

# A reference that is not to a part of the same drawing, in any namespace.
OUTSIDE = re.compile(r"""href\s*=\s*["']\s*(?!#)""", re.IGNORECASE)


class OutsideReference(ValueError):
    """A drawing refers to something outside itself."""


def square_svg(icon: dict[str, Any]) -> str:
    """An icon as a square SVG document; a box that is not square is centred, never stretched.

    icon: its fields, with what it inherits from its set.
    """
    left, top = icon.get("left", 0), icon.get("top", 0)
    width, height = icon.get("width", 16), icon.get("height", 16)
    body = icon["body"]
    if icon.get("hFlip"):
        body = f'<g transform="translate({2 * left + width} 0) scale(-1 1)">{body}</g>'
    side = max(width, height)
    left, top = left - (side - width) / 2, top - (side - height) / 2
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left:g} {top:g} {side:g} {side:g}" width="{side:g}" height="{side:g}">'
        f"{body}</svg>"
    )


def check_renderer() -> None:
    """Raises `Stopped` if `render` can't be used here."""
    try:
        import resvg_py  # noqa: F401
    except ImportError as error:
        raise Stopped(f"{error.name} is not installed: pip install resvg-py") from None


def render(svg: str, size: int, background: str | None = None) -> Image.Image:
    """Draws an SVG, size x size.

    Raises ValueError for what is no SVG, and `OutsideReference` for one that refers to anything
    outside itself: the renderer would draw files of this machine into it.
    """
    import resvg_py

    if OUTSIDE.search(svg):
        raise OutsideReference("refers to something outside itself")
    png = resvg_py.svg_to_bytes(
        svg_string=svg,
        width=size,
        height=size,
        background=background,
        skip_system_fonts=True,  # no icon holds text, and a machine's fonts must not matter
    )
    with Image.open(io.BytesIO(bytes(png))) as image:
        image.load()
        return image


def position(seed: int, name: str) -> float:
    """A number in [0, 1), uniform over names; by it they are split, each for itself."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
