"""Draws SVG icons as PNG, in several processes. The colours of an icon depend on its key only."""

import colorsys
import hashlib
import io
import random
import re
import signal
from collections.abc import Generator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import NamedTuple

import numpy as np
from PIL import Image

from .icon_names import Icon

SIZE = 64  # pixels
CHUNK = 64  # icons in a task of the process pool
TIMEOUT = 20  # seconds for one icon, which usually takes milliseconds
set_alarm = getattr(signal, "alarm", lambda seconds: None)  # Windows has no alarm
# Matches an href, in any namespace, to anything outside the icon itself.
EXTERNAL_REFERENCE = re.compile(r"""href\s*=\s*["']\s*(?!#)""", re.IGNORECASE)


class Drawn(NamedTuple):
    """An icon's picture, or the reason why there is none."""

    png: bytes = b""
    digest: bytes = b""  # a hash of the picture before it is coloured
    error: str = ""


def draw_in_processes(icons: Sequence[Icon]) -> Generator[Drawn, None, None]:
    """Draws icons in their order, in a process for each core.

    Some icons crash the renderer and end its process. Then the next `CHUNK` icons are drawn one by
    one, each in a process of its own, and the rest as before.
    """
    done = 0
    while done < len(icons):
        pool = ProcessPoolExecutor()
        try:
            for drawn in pool.map(draw, icons[done:], chunksize=CHUNK):
                done += 1
                yield drawn
        except BrokenProcessPool:
            if len(icons) == 1:
                yield Drawn(error="crashes the renderer, or takes it for ever")
            else:
                for icon in icons[done : done + CHUNK]:
                    yield from draw_in_processes([icon])
            done += CHUNK
        finally:
            pool.shutdown(cancel_futures=True)


def draw(icon: Icon) -> Drawn:
    """Draws an icon. Its key is the seed of its colours, so every run draws the same picture."""
    # The renderer would open local files that an icon refers to.
    if EXTERNAL_REFERENCE.search(icon.svg):
        return Drawn(error="refers to something outside itself")
    try:
        set_alarm(TIMEOUT)  # the renderer can't be interrupted, so the alarm ends the process
        image = render(icon.svg.replace("currentColor", "#000000"))
    except ValueError:  # some icons are not valid SVG
        return Drawn(error="blank")
    finally:
        set_alarm(0)
    rgba = np.asarray(image, dtype=np.float32) / 255
    rgb, alpha = rgba[..., :3], rgba[..., 3:]
    is_black = not (rgb * alpha > 0.02).any()
    ink, background = colours(random.Random(icon.key)) if is_black else (rgb, np.ones(3))
    digest = hashlib.sha256((rgba * 15).round().astype(np.uint8).tobytes()).digest()
    picture = alpha * ink + (1 - alpha) * background
    if np.ptp(picture, axis=(0, 1)).max() < 0.1:
        return Drawn(error="blank")
    file = io.BytesIO()
    Image.fromarray((picture * 255).round().astype(np.uint8)).save(file, "png", compress_level=3)
    return Drawn(file.getvalue(), digest)


def render(svg: str) -> Image.Image:
    """Renders an SVG document as RGBA, SIZE x SIZE. Raises ValueError if it is not valid SVG."""
    import resvg_py

    # The fonts of a machine must not change a picture. No icon holds text.
    png = resvg_py.svg_to_bytes(svg_string=svg, width=SIZE, height=SIZE, skip_system_fonts=True)
    return Image.open(io.BytesIO(bytes(png))).convert("RGBA")


def colours(rng: random.Random) -> tuple[np.ndarray, np.ndarray]:
    """Ink and background colour of a one-coloured icon, each (3,) in [0, 1].

    50% of the icons are black on white, 20% coloured on white, 15% coloured on a pale background,
    and 15% pale on a dark background.
    """
    kind, hue, background_hue = rng.random(), rng.random(), rng.random()
    ink = colorsys.hls_to_rgb(hue, rng.uniform(0.2, 0.55), rng.uniform(0.3, 1))
    if kind < 0.5:
        return np.zeros(3), np.ones(3)
    if kind < 0.7:
        return np.array(ink), np.ones(3)
    if kind < 0.85:
        background = colorsys.hls_to_rgb(background_hue, rng.uniform(0.85, 0.97), 0.6)
        return np.array(ink), np.array(background)
    pale = colorsys.hls_to_rgb(hue, rng.uniform(0.75, 1), rng.uniform(0.3, 1))
    dark = colorsys.hls_to_rgb(background_hue, rng.uniform(0.05, 0.3), 0.6)
    return np.array(pale), np.array(dark)
