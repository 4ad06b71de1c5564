"""Icons of Iconify: npm's package of all sets is read, and their icons are drawn.

An icon is an SVG body, see https://iconify.design/docs/types/iconify-json.html.
"""

import io
import json
import re
import tarfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ..command_line import CannotStart, first_line

# A reference that is not to a part of the same drawing, in any namespace.
OUTSIDE = re.compile(r"""href\s*=\s*["']\s*(?!#)""", re.IGNORECASE)


def read_json(archive: Path, files: Sequence[str]) -> dict[str, Any]:
    """Some JSON files of an archive by their names. Raises `CannotStart` if one can't be read."""
    found = {}
    try:
        with tarfile.open(archive, "r|*") as tar:
            for member in tar:
                if (file := member.name.removeprefix("package/")) in files:
                    found[file] = json.load(tar.extractfile(member) or io.BytesIO())
    except (OSError, EOFError, ValueError, tarfile.TarError, zlib.error) as error:
        raise CannotStart(f"{archive}: can't be read: {first_line(error)}") from error
    if missing := set(files) - set(found):
        raise CannotStart(f"{archive}: has no {min(missing)}: not the package expected")
    return found


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


def render(svg: str, size: int) -> Image.Image:
    """Draws an SVG, size x size. Raises ValueError for what is none.

    The renderer would draw files of this machine into one that refers to them: see `OUTSIDE`.
    """
    import resvg_py

    png = resvg_py.svg_to_bytes(
        svg_string=svg,
        width=size,
        height=size,
        skip_system_fonts=True,  # no icon holds text, and a machine's fonts must not matter
    )
    with Image.open(io.BytesIO(bytes(png))) as image:
        image.load()
        return image
