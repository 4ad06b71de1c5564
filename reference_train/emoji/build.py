"""Rebuilds the emoji shards from public npm packages.

`python -m reference_train.emoji.build --out DIR` writes one WebDataset shard per drawing style. A
sample is one Unicode emoji: `{hexcode}.png` (64 x 64 RGB, on white), `{hexcode}.txt` (its Unicode
name, the caption) and `{hexcode}.json` (name, keywords, group, subgroup, style, split). README.md
beside this file is the data card.

Sources: the names, keywords and groups of Unicode, as `emojibase-data` has them
(https://emojibase.dev/docs/datasets); the drawings as the `@iconify-json/*` packages have them, one
SVG body per icon (https://iconify.design/docs/types/iconify-json.html).

Needs the extra `data`: `pip install resvg-py pillow rich`.
"""

from __future__ import annotations

import io
import json
import lzma
import re
import struct
import tarfile
import tempfile
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.progress import track

from ..arguments import Parser
from ..data.iconify import check_renderer, position, render, square_svg
from ..data.package import Package, end_cleanly, fetch, read_json
from ..errors import Stopped, run
from ..files import written_whole

Json = dict[str, Any]


NAMES = Package(
    "emojibase-data", "17.0.0", "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a"
)
# Three to train on, three never trained on (the natural shift of style), and one black on white.
STYLES = {
    style: Package(f"@iconify-json/{style}", version, sha256)
    for style, version, sha256 in map(
        str.split,
        """\
noto 1.2.9 3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad
twemoji 1.2.5 19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7
fluent-emoji-flat 1.2.6 7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175
noto-v1 1.2.5 2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37
openmoji 1.2.29 03181e2c156cab35cf4a62f1f7886bd971d59212e75ac3f189d5a4cae3930fc5
fluent-emoji 1.2.7 8044210dbf11e016d4de85f15d01a243423bd832457e7e2491df1b751c0e272b
fluent-emoji-high-contrast 1.2.6 0b92d48c90d2200bd499e3cdd09a127ca6a8c8ddefd34c35eb5a1e4994012ae0
""".splitlines(),
    )
}
# These two have no table of characters, but the icon names of a set that has one.
NAMED_AS_IN = {"noto-v1": "noto", "fluent-emoji": "fluent-emoji-flat"}

SIZE = 64  # pixels
TEST_SHARE, VALIDATION_SHARE = 0.15, 0.10
# Of the seeds 0 to 199 that leave every subgroup a concept to train on, the one with the most even
# shares over the eight groups. Chosen from the counts, before anything was trained.
SPLIT_SEED = 52


def read_concepts(archive: Path) -> list[Json]:
    """The emoji that ship, from `emojibase-data`: base skin tone, no flags, no near-duplicates.

    A concept is what a sample's json says of it, but for the style.
    """
    files = dict(read_json(archive, ["meta/groups.json", "en/messages.json", "en/data.json"]))
    keys = files["meta/groups.json"]
    titles = {g["key"]: g["message"] for g in files["en/messages.json"]["groups"]}
    concepts = []
    # Skin tones need no rule: emojibase nests them in the base emoji.
    for entry in files["en/data.json"]:
        group = keys["groups"].get(str(entry.get("group")))
        # No group: the letters that flags are spelled with. Components: bare skin tones and hair.
        if group in (None, "flags", "component"):
            continue
        # Mirror images of other emoji, and 29 ways to count a family: alike in all but a detail.
        if entry["label"].endswith("facing right") or entry["label"].startswith("family:"):
            continue
        concepts.append(
            {
                "concept": entry["hexcode"],  # "1F469-200D-1F33E"
                "name": entry["label"],
                "keywords": entry.get("tags", []),
                "group": titles[group],
                "subgroup": keys["subgroups"][str(entry["subgroup"])],
                "style": "",
                "split": split_of(entry["hexcode"]),
                "emoji": entry["emoji"],
            }
        )
    return concepts


def split_of(hexcode: str) -> str:
    """`train`, `validation` or `test`.

    A function of the concept alone: the same in every style, and unchanged when Unicode adds emoji.
    """
    place = position(SPLIT_SEED, hexcode)
    if place < TEST_SHARE:
        return "test"
    return "validation" if place < TEST_SHARE + VALIDATION_SHARE else "train"


class IconSet(NamedTuple):
    """The icons of one style."""

    icons: dict[str, Json]  # by name; mirrored copies resolved, mere second names left out
    characters: dict[str, str]  # hexcode, see `bare` -> icon name; empty where there is no table


def read_icon_set(archive: Path) -> IconSet:
    """The icon set of an `@iconify-json/*` package."""
    files = dict(read_json(archive, ["icons.json", "chars.json"]))
    data = files["icons.json"]
    try:
        icons = dict(data["icons"])
        for name, alias in data.get("aliases", {}).items():
            # An alias with a transformation is a picture of its own: in Fluent "pointing right" is
            # "pointing left", flipped. One without is an older name, and some have changed their
            # meaning: to "cricket", the insect, noto-v1 offers the game.
            if alias.keys() - {"parent"}:
                icons[name] = {**data["icons"][alias["parent"]], **alias}
        size = {"width": data["width"], "height": data["height"]}
        characters = {bare(hexcode): name for hexcode, name in files["chars.json"].items()}
        return IconSet({name: {**size, **icon} for name, icon in icons.items()}, characters)
    except (KeyError, TypeError, AttributeError):
        raise Stopped(f"{archive}: not an icon set as Iconify describes it") from None


def bare(hexcode: str) -> str:
    """A hexcode without the presentation selector, which some packages write and some do not."""
    return hexcode.lower().replace("-fe0f", "")


def icon_of(concept: Json, style: str, sets: dict[str, IconSet]) -> Json | None:
    """The icon that draws a concept in a style, if there is one."""
    name = sets[NAMED_AS_IN.get(style, style)].characters.get(bare(concept["concept"]))
    if name is None:  # the tables leave aliases out
        name = re.sub(r"[^a-z0-9]+", "-", concept["name"].lower())
    return sets[style].icons.get(name)


def draw(icon: Json) -> bytes:
    """An icon as a PNG on white."""
    if icon.keys() & {"vFlip", "rotate"}:
        raise Stopped(f"a transformation that this script does not know: {icon}")
    image = render(square_svg(icon), SIZE, background="#ffffff")
    return stored_png(image.convert("RGB").tobytes(), *image.size)


def stored_png(pixels: bytes, width: int, height: int) -> bytes:
    """An RGB PNG whose pixels are stored as they are, neither filtered nor compressed.

    xz then finds what the icons of a style share: a shard is up to half as large as with ordinary
    PNGs.
    """
    rows = b"".join(b"\0" + pixels[i : i + 3 * width] for i in range(0, len(pixels), 3 * width))
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)  # 8-bit RGB
    png = b"\x89PNG\r\n\x1a\n"
    for kind, content in ((b"IHDR", header), (b"IDAT", zlib.compress(rows, 0)), (b"IEND", b"")):
        png += struct.pack(">I", len(content)) + kind + content
        png += struct.pack(">I", zlib.crc32(kind + content))
    return png


def drop_shared_pictures(samples: list[tuple[Json, bytes]]) -> list[tuple[Json, bytes]]:
    """Without the pictures that a style uses for several concepts: which name would be right?"""
    uses = Counter(png for _, png in samples)
    return [sample for sample in samples if uses[sample[1]] == 1]


def write_shard(path: Path, samples: Iterable[tuple[Json, bytes]]) -> None:
    """Writes a shard whole or not at all; the same samples give the same bytes, in any order."""
    # A dictionary as large as a shard (24 MB), so that every icon can refer to every other.
    xz = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": 32 << 20}]
    with (
        written_whole(path) as partial,
        lzma.open(partial, "wb", filters=xz) as stream,
        tarfile.open(fileobj=stream, mode="w|", format=tarfile.USTAR_FORMAT) as tar,
    ):
        for info, png in sorted(samples, key=lambda sample: sample[0]["concept"]):
            files = {
                "json": json.dumps(info, ensure_ascii=False).encode(),
                "png": png,
                "txt": info["name"].encode(),
            }
            for suffix, content in files.items():
                # Its defaults are time 0, owner 0 and no owner's name.
                member = tarfile.TarInfo(f"{info['concept']}.{suffix}")
                member.size, member.mode = len(content), 0o644
                tar.addfile(member, io.BytesIO(content))


def build(out: Path, packages: Path) -> None:
    """Builds all shards into `out`; `packages` holds the npm archives or receives them."""
    out.mkdir(parents=True, exist_ok=True)
    packages.mkdir(parents=True, exist_ok=True)
    concepts = read_concepts(fetch(NAMES, packages))
    sets = {style: read_icon_set(fetch(package, packages)) for style, package in STYLES.items()}
    for style in STYLES:
        samples = [
            ({**concept, "style": style}, draw(icon))
            for concept in track(concepts, description=style)
            if (icon := icon_of(concept, style, sets))
        ]
        kept = drop_shared_pictures(samples)
        path = out / f"{style}.tar.xz"
        write_shard(path, kept)
        splits = Counter(info["split"] for info, _ in kept)
        counts = ", ".join(f"{splits[split]} {split}" for split in ("train", "validation", "test"))
        print(f"{path}: {len(kept)} of {len(concepts)} concepts ({counts}), ", end="")
        print(f"{len(samples) - len(kept)} shared pictures dropped, {path.stat().st_size:,} bytes")


def main(argv: Sequence[str]) -> None:
    """The command line."""
    parser = Parser(
        prog="python -m reference_train.emoji.build", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--out", type=Path, required=True, help="the folder for the shards")
    parser.add_argument(
        "--packages",
        type=Path,
        metavar="DIR",
        help="a folder of npm's archives, named as its registry names them; missing ones are "
        "downloaded into it (default: a temporary folder)",
    )
    options = parser.parse_args(argv)
    check_renderer()
    end_cleanly()
    try:
        with tempfile.TemporaryDirectory() as temporary:
            build(options.out, options.packages or Path(temporary))
    except OSError as error:
        raise Stopped(str(error)) from error


if __name__ == "__main__":
    run(main)
