"""Icons as Iconify stores them (https://iconify.design/docs/types/iconify-json.html)."""

import hashlib
from typing import Any


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


def position(seed: int, name: str) -> float:
    """A number in [0, 1), uniform over names; by it they are split, each for itself."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
