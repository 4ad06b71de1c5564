"""Reads the icon sets of npm's package `@iconify/json`, and names, captions and draws icons."""

import colorsys
import hashlib
import io
import json
import random
import re
import signal
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import resvg_py
from PIL import Image

from ..command_line import UsageError, first_line
from .samples import READ_ERRORS

URL = "https://registry.npmjs.org/@iconify/json/-/json-2.2.535.tgz"
SHA256 = "1a545f86fa224d6531d8fb101dcbe83aac2b28689a21cbed6fc68318a5af4d91"
SEED = 0
VALIDATION_SHARE = 0.02  # of the names
DROPPED_GROUPS = {"logos", "logo", "brand", "brands", "flags", "flag"}
# Words that say how an icon is drawn, or which variant it is, but not what it shows. They are
# removed from the names of a set only if the set uses them often (`style_words`).
STYLES = """
outline outlined outlines filled fill solid line linear lines bold thin light regular duotone duo
twotone sharp round rounded broken bulk stroke flat remix color colored colour alt glyph variant
freehand micro mini baseline sm lg xl medium small large
"""
TEMPLATES = (
    "{name}",
    "{name}",
    "{name}",
    "a drawing of {name}",
    "a picture of {name}",
    "an icon of {name}",
    "a small drawing of {name}",
    "{name}, {style}",
    "{name} icon, {set}",
    "{name}, {group}",
)
SIZE = 64  # pixels
TIMEOUT = 20  # seconds for one icon, which usually takes milliseconds
set_alarm = getattr(signal, "alarm", lambda seconds: None)  # Windows has no alarm
# Matches an href, in any namespace, to anything outside the icon itself.
EXTERNAL_REFERENCE = re.compile(r"""href\s*=\s*["']\s*(?!#)""", re.IGNORECASE)


class Icon(NamedTuple):
    """One icon before it is drawn."""

    key: str  # SET__ICON, by their names in the package
    set: str
    name: str  # what it shows, in words
    style: str  # how it is drawn, in words
    group: str  # its category in the set, or ""
    svg: str


def read_sets(archive: Path) -> tuple[dict[str, Any], list[Icon]]:
    """Returns the sets that are used (prefix -> information), and their icons, shuffled."""
    collections = read_json(archive, ["collections.json"])["collections.json"]
    sets = {prefix: info for prefix, info in collections.items() if is_used(info)}
    content = read_json(archive, [f"json/{prefix}.json" for prefix in sets])
    icons: list[Icon] = []
    for prefix in sets:
        icons += read_set(prefix, content.pop(f"json/{prefix}.json"))
    random.Random(SEED).shuffle(icons)
    return sets, icons


def read_json(archive: Path, files: Sequence[str]) -> dict[str, Any]:
    """Reads JSON files of an archive, by name. Raises `UsageError` if one can't be read."""
    found = {}
    try:
        with tarfile.open(archive, "r|*") as tar:
            for member in tar:
                if (file := member.name.removeprefix("package/")) in files:
                    found[file] = json.load(tar.extractfile(member) or io.BytesIO())
    except READ_ERRORS as error:
        raise UsageError(f"{archive}: can't be read: {first_line(error)}") from error
    if missing := set(files) - set(found):
        raise UsageError(f"{archive}: has no {min(missing)}: it is not the expected package")
    return found


def is_used(info: dict[str, Any]) -> bool:
    """Whether a set is used: no logos, emoji, flags, and no non-commercial licence."""
    category = (info.get("category") or "").lower()
    is_of_logos_or_emoji = re.search("brands|emoji|flag", info["name"].lower())
    return not (category in ("logos", "emoji") or is_of_logos_or_emoji or "-NC" in licence(info))


def licence(info: dict[str, Any]) -> str:
    """The licence of a set: its SPDX identifier, or its title."""
    return info["license"].get("spdx") or info["license"]["title"]


def read_set(prefix: str, content: dict[str, Any]) -> Iterator[Icon]:
    """The icons of one set that are used. content: the set's JSON file."""
    categories = (content.get("categories") or {}).items()
    groups = {icon: group for group, icons in categories for icon in icons}
    inherited = {k: v for k, v in content.items() if k in ("left", "top", "width", "height")}
    styles = style_words(list(content["icons"]))
    for key, icon in content["icons"].items():
        group = groups.get(key, "")
        name, style = split_name(key, styles)
        if group.lower() in DROPPED_GROUPS or name.startswith(("logo ", "brand ", "flag ")):
            continue
        if icon.get("hidden") or not re.search("[a-z]{2}", name):
            continue
        group_words = re.sub(r"([a-z])([A-Z])", r"\1 \2", group).lower()
        svg = square_svg({**inherited, **icon})
        yield Icon(f"{prefix}__{key}", prefix, name, " ".join(style), group_words, svg)


def square_svg(icon: dict[str, Any]) -> str:
    """An icon as a square SVG document. The icon is centred and never stretched.

    icon: its fields, and the fields that it inherits from its set.
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


def style_words(names: Sequence[str]) -> set[str]:
    """The words of `STYLES` that at least 2% of a set's names begin or end with."""
    counts = Counter(
        word for name in names if "-" in name for word in (name.split("-")[0], name.split("-")[-1])
    )
    return {word for word in STYLES.split() if counts[word] >= 0.02 * len(names)}


def split_name(icon: str, styles: set[str]) -> tuple[str, list[str]]:
    """Splits an icon's name into what it shows ("alarm clock") and the style words at its ends.

    Numbers at the end are removed. They are sizes, or number the variants of an icon.
    """
    words = [word for word in re.split(r"[-_]+", icon.lower()) if word]
    style = []
    while len(words) > 1 and (words[-1] in styles or re.fullmatch(r"\d+(px)?", words[-1])):
        style.append(words.pop())
    while len(words) > 1 and words[0] in styles:
        style.append(words.pop(0))
    return " ".join(words), [word for word in style if not word[0].isdigit()]


def is_held_out(name: str) -> bool:
    """Whether icons of this name are validation data. It depends on the name only."""
    digest = hashlib.sha256(f"{SEED}:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < VALIDATION_SHARE


def caption(icon: Icon, set_title: str, rng: random.Random) -> str:
    """A random caption from the name and, in some templates, the style, the set or the group.

    If the template needs a style or a group and the icon has none, the caption is the name.
    """
    template = rng.choice(TEMPLATES)
    if ("{style}" in template and not icon.style) or ("{group}" in template and not icon.group):
        template = "{name}"
    return template.format(name=icon.name, style=icon.style, set=set_title, group=icon.group)


class Drawn(NamedTuple):
    """An icon's picture."""

    png: bytes
    digest: bytes  # a hash of the picture before it is coloured


def draw(icon: Icon) -> Drawn | None:
    """Draws an icon. Its key is the seed of its colours, so every run draws the same picture.

    None if the picture is blank, the SVG is not valid, or it refers to something outside itself.
    """
    # The renderer would open local files that an icon refers to.
    if EXTERNAL_REFERENCE.search(icon.svg):
        return None
    try:
        set_alarm(TIMEOUT)  # the renderer can't be interrupted, so the alarm ends the process
        image = render(icon.svg.replace("currentColor", "#000000"))
    except ValueError:  # some icons are not valid SVG
        return None
    finally:
        set_alarm(0)
    rgba = np.asarray(image, dtype=np.float32) / 255
    rgb, alpha = rgba[..., :3], rgba[..., 3:]
    is_black = not (rgb * alpha > 0.02).any()
    ink, background = colours(random.Random(icon.key)) if is_black else (rgb, np.ones(3))
    digest = hashlib.sha256((rgba * 15).round().astype(np.uint8).tobytes()).digest()
    picture = alpha * ink + (1 - alpha) * background
    if np.ptp(picture, axis=(0, 1)).max() < 0.1:
        return None
    file = io.BytesIO()
    Image.fromarray((picture * 255).round().astype(np.uint8)).save(file, "png", compress_level=3)
    return Drawn(file.getvalue(), digest)


def render(svg: str) -> Image.Image:
    """Renders an SVG document as RGBA, SIZE x SIZE. Raises ValueError if it is not valid SVG."""
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
