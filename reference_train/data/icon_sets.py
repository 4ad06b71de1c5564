"""Reads the icon sets of npm's package `@iconify/json`, except those that are left out."""

import io
import json
import random
import re
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..command_line import CannotStart, first_line
from .icon_names import SEED, Icon, split_name, style_words

URL = "https://registry.npmjs.org/@iconify/json/-/json-2.2.535.tgz"
SHA256 = "1a545f86fa224d6531d8fb101dcbe83aac2b28689a21cbed6fc68318a5af4d91"
DROPPED_GROUPS = {"logos", "logo", "brand", "brands", "flags", "flag"}


def read_sets(archive: Path, left_out: Counter[str]) -> tuple[dict[str, Any], list[Icon]]:
    """Returns the sets that are used (prefix -> information), and their icons, shuffled.

    Adds to `left_out` how many icons are left out, by reason.
    """
    sets: dict[str, Any] = {}
    for prefix, info in read_json(archive, ["collections.json"])["collections.json"].items():
        if reason := why_left_out(info):
            left_out[f"sets: {reason}"] += info["total"]
        else:
            sets[prefix] = info
    content = read_json(archive, [f"json/{prefix}.json" for prefix in sets])
    icons: list[Icon] = []
    for prefix in sets:
        icons += read_set(prefix, content.pop(f"json/{prefix}.json"), left_out)
    random.Random(SEED).shuffle(icons)
    return sets, icons


def read_json(archive: Path, files: Sequence[str]) -> dict[str, Any]:
    """Reads JSON files of an archive, by name. Raises `CannotStart` if one can't be read."""
    found = {}
    try:
        with tarfile.open(archive, "r|*") as tar:
            for member in tar:
                if (file := member.name.removeprefix("package/")) in files:
                    found[file] = json.load(tar.extractfile(member) or io.BytesIO())
    except (OSError, EOFError, ValueError, tarfile.TarError, zlib.error) as error:
        raise CannotStart(f"{archive}: can't be read: {first_line(error)}") from error
    if missing := set(files) - set(found):
        raise CannotStart(f"{archive}: has no {min(missing)}: it is not the expected package")
    return found


def why_left_out(info: dict[str, Any]) -> str | None:
    """The reason why a whole set is left out; None if it is used."""
    name, category = info["name"].lower(), (info.get("category") or "").lower()
    if category == "logos" or "brands" in name:
        return "logos"
    if category == "emoji" or "emoji" in name:
        return "emoji"
    if "flag" in name:
        return "flags"
    return "non-commercial licence" if "-NC" in licence(info) else None


def licence(info: dict[str, Any]) -> str:
    """The licence of a set: its SPDX identifier, or its title."""
    return info["license"].get("spdx") or info["license"]["title"]


def read_set(prefix: str, content: dict[str, Any], left_out: Counter[str]) -> Iterator[Icon]:
    """The icons of one set that are used. content: the set's JSON file."""
    categories = (content.get("categories") or {}).items()
    groups = {icon: group for group, icons in categories for icon in icons}
    inherited = {k: v for k, v in content.items() if k in ("left", "top", "width", "height")}
    styles = style_words(list(content["icons"]))
    for key, icon in content["icons"].items():
        group = groups.get(key, "")
        name, style = split_name(key, styles)
        if group.lower() in DROPPED_GROUPS or name.startswith(("logo ", "brand ", "flag ")):
            left_out["logos and flags in other sets"] += 1
        elif icon.get("hidden") or not re.search("[a-z]{2}", name):
            left_out["hidden, or a name without a word"] += 1
        else:
            group_words = re.sub(r"([a-z])([A-Z])", r"\1 \2", group).lower()
            svg = square_svg({**inherited, **icon})
            yield Icon(
                key=f"{prefix}__{key}",
                set=prefix,
                name=name,
                style=" ".join(style),
                group=group_words,
                svg=svg,
            )


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
