"""Draws icons: SVG to PNG, in colours that depend on the icon alone, in several processes."""

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
CHUNK = 64  # icons that are drawn as one piece of work
SECONDS = 20  # the limit for one icon, which usually takes milliseconds
ALARM = getattr(signal, "alarm", lambda seconds: None)  # Windows has none
# A reference to anything but a part of the same drawing, in any namespace.
OUTSIDE = re.compile(r"""href\s*=\s*["']\s*(?!#)""", re.IGNORECASE)


class Drawn(NamedTuple):
    """An icon's picture, or why there is none."""

    png: bytes = b""
    digest: bytes = b""  # of the picture before it was coloured
    fault: str = ""


def draw_in_processes(icons: Sequence[Icon]) -> Generator[Drawn, None, None]:
    """Draws icons in their order, in a process for each core.

    Some icons crash the renderer, and its process ends. The chunk after the last drawn icon is then
    drawn one by one, and the rest as before.
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
                yield Drawn(fault="crashes the renderer, or takes it for ever")
            else:
                for icon in icons[done : done + CHUNK]:
                    yield from draw_in_processes([icon])
            done += CHUNK
        finally:
            pool.shutdown(cancel_futures=True)


def draw(icon: Icon) -> Drawn:
    """Draws an icon. The result is the same in every run: the key is the seed of its colours."""
    # The renderer would draw files of this machine into an icon that refers to them.
    if OUTSIDE.search(icon.svg):
        return Drawn(fault="refers to something outside itself")
    try:
        ALARM(SECONDS)  # the renderer can't be interrupted, so the alarm ends the process
        image = render(icon.svg.replace("currentColor", "#000000"))
    except ValueError:  # some icons are not valid SVG
        return Drawn(fault="blank")
    finally:
        ALARM(0)
    rgba = np.asarray(image, dtype=np.float32) / 255
    rgb, alpha = rgba[..., :3], rgba[..., 3:]
    is_black = not (rgb * alpha > 0.02).any()
    ink, ground = colours(random.Random(icon.key)) if is_black else (rgb, np.ones(3))
    digest = hashlib.sha256((rgba * 15).round().astype(np.uint8).tobytes()).digest()
    picture = alpha * ink + (1 - alpha) * ground
    if np.ptp(picture, axis=(0, 1)).max() < 0.1:
        return Drawn(fault="blank")
    file = io.BytesIO()
    Image.fromarray((picture * 255).round().astype(np.uint8)).save(file, "png", compress_level=3)
    return Drawn(file.getvalue(), digest)


def render(svg: str) -> Image.Image:
    """An SVG document in RGBA, SIZE x SIZE. Raises ValueError if it is not valid SVG."""
    import resvg_py

    # No icon holds text. A machine's fonts must not change a picture.
    png = resvg_py.svg_to_bytes(svg_string=svg, width=SIZE, height=SIZE, skip_system_fonts=True)
    return Image.open(io.BytesIO(bytes(png))).convert("RGBA")


def colours(rng: random.Random) -> tuple[np.ndarray, np.ndarray]:
    """Ink and ground of a one-coloured icon, each (3,) in [0, 1].

    Half are black on white, a fifth coloured on white, 15% coloured on a pale ground, and 15% pale
    on a dark ground.
    """
    kind, hue, ground_hue = rng.random(), rng.random(), rng.random()
    ink = colorsys.hls_to_rgb(hue, rng.uniform(0.2, 0.55), rng.uniform(0.3, 1))
    if kind < 0.5:
        return np.zeros(3), np.ones(3)
    if kind < 0.7:
        return np.array(ink), np.ones(3)
    if kind < 0.85:
        ground = colorsys.hls_to_rgb(ground_hue, rng.uniform(0.85, 0.97), 0.6)
        return np.array(ink), np.array(ground)
    pale = colorsys.hls_to_rgb(hue, rng.uniform(0.75, 1), rng.uniform(0.3, 1))
    dark = colorsys.hls_to_rgb(ground_hue, rng.uniform(0.05, 0.3), 0.6)
    return np.array(pale), np.array(dark)
