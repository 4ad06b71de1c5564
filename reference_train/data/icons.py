"""About 250,000 icons with the names that people gave them, as image-caption shards.

Draws npm's `@iconify/json` (104 MB) into WebDataset shards in about eight minutes: `train-*.tar` to
train on, `val-*.tar` with names that training never sees, `sizes.json` as OpenCLIP reads it, and
`manifest.json` with the sets, their authors and licences, and what was left out and why.
"""

import colorsys
import contextlib
import hashlib
import importlib.util
import io
import json
import random
import re
import signal
import sys
import tarfile
import tempfile
import zlib
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import webdataset as wds
from PIL import Image
from rich.progress import track

from ..command_line import CannotStart, Parser, Stopped, first_line, run, whole_number
from ..files import new_folder
from .samples import count_pairs

URL = "https://registry.npmjs.org/@iconify/json/-/json-2.2.535.tgz"
SHA256 = "1a545f86fa224d6531d8fb101dcbe83aac2b28689a21cbed6fc68318a5af4d91"
SIZE = 64  # pixels
SAMPLES_PER_SHARD = 5000
CHUNK = 64  # icons that are drawn as one piece of work
SECONDS = 20  # to draw an icon, which takes milliseconds
ALARM = getattr(signal, "alarm", lambda seconds: None)  # Windows has none
PICTURES_OF_A_NAME = 40  # to train on
VALIDATION_SHARE = 0.02  # of the names
SEED = 0

DROPPED_GROUPS = {"logos", "logo", "brand", "brands", "flags", "flag"}
# Words that say how an icon is drawn or which of several it is, not what it shows. They are taken
# off a name only in a set that uses them again and again (`style_words`).
STYLES = """
outline outlined outlines filled fill solid line linear lines bold thin light regular duotone duo
twotone sharp round rounded broken bulk stroke flat remix color colored colour alt glyph variant
freehand micro mini baseline sm lg xl medium small large
"""
TEMPLATES = (
    *("{name}", "{name}", "{name}", "a drawing of {name}", "a picture of {name}"),
    *("an icon of {name}", "a small drawing of {name}", "{name}, {style}", "{name} icon, {set}"),
    "{name}, {group}",
)
# A reference that is not to a part of the same drawing, in any namespace.
OUTSIDE = re.compile(r"""href\s*=\s*["']\s*(?!#)""", re.IGNORECASE)


class Icon(NamedTuple):
    """One icon before it is drawn."""

    key: str  # set and icon as iconify has them, with "__" between
    set: str
    name: str  # words, without those of style
    style: str  # how it is drawn, in words
    group: str  # what its set files it under, or ""
    svg: str


def style_words(names: Sequence[str]) -> set[str]:
    """The words of `STYLES` that end or begin at least 2 % of a set's names."""
    ends = Counter(name.rsplit("-", 1)[-1] for name in names if "-" in name)
    starts = Counter(name.split("-", 1)[0] for name in names if "-" in name)
    return {w for w in STYLES.split() if ends[w] + starts[w] >= 0.02 * len(names)}


def split_name(icon: str, styles: set[str]) -> tuple[str, list[str]]:
    """An icon's name -> what it shows ("alarm clock"), and the words of style at either end.

    Numbers at the end go as well: they are sizes, or count variants.
    """
    words = [word for word in re.split(r"[-_]+", icon.lower()) if word]
    style = []
    while len(words) > 1 and (words[-1] in styles or re.fullmatch(r"\d+(px)?", words[-1])):
        style.append(words.pop())
    while len(words) > 1 and words[0] in styles:
        style.append(words.pop(0))
    return " ".join(words), [word for word in style if not word[0].isdigit()]


def is_held_out(name: str) -> bool:
    """Whether a name is one of the validation's; by the name alone."""
    digest = hashlib.sha256(f"{SEED}:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < VALIDATION_SHARE


def caption(icon: Icon, title: str, rng: random.Random) -> str:
    """A caption from the name and, at times, the style, the set's title or the group."""
    template = rng.choice(TEMPLATES)
    if ("{style}" in template and not icon.style) or ("{group}" in template and not icon.group):
        template = "{name}"
    return template.format(name=icon.name, style=icon.style, set=title, group=icon.group)


def describe(info: dict[str, Any], icons: int) -> dict[str, Any]:
    """What the manifest says of a set."""
    author, licence = info["author"], info["license"].get("spdx") or info["license"]["title"]
    about = {"title": info["name"], "author": author["name"], "url": author.get("url")}
    return {**about, "licence": licence, "icons": icons}


def why_left_out(info: dict[str, Any]) -> str | None:
    """The reason for which a set as a whole is not taken."""
    name, category = info["name"].lower(), (info.get("category") or "").lower()
    if category == "logos" or "brands" in name:
        return "logos"
    if category == "emoji" or "emoji" in name:
        return "emoji"
    if "flag" in name:
        return "flags"
    return "non-commercial licence" if "-NC" in describe(info, 0)["licence"] else None


def read_set(prefix: str, content: dict[str, Any], left_out: Counter[str]) -> Iterator[Icon]:
    """The icons of one set. content: its JSON file."""
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
            words = re.sub(r"([a-z])([A-Z])", r"\1 \2", group).lower()
            svg = square_svg({**inherited, **icon})
            yield Icon(f"{prefix}__{key}", prefix, name, " ".join(style), words, svg)


def read_sets(archive: Path, left_out: Counter[str]) -> tuple[dict[str, Any], list[Icon]]:
    """What is known of each set that is taken, by its prefix, and their icons in a random order."""
    taken: dict[str, Any] = {}
    for prefix, info in read_json(archive, ["collections.json"])["collections.json"].items():
        if reason := why_left_out(info):
            left_out[f"sets: {reason}"] += info["total"]
        else:
            taken[prefix] = info
    content = read_json(archive, [f"json/{prefix}.json" for prefix in taken])
    icons = [i for p in taken for i in read_set(p, content.pop(f"json/{p}.json"), left_out)]
    random.Random(SEED).shuffle(icons)
    return taken, icons


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


def render(svg: str) -> Image.Image:
    """Draws an SVG in RGBA, SIZE x SIZE. Raises ValueError for what is none.

    The renderer would draw files of this machine into one that refers to them: see `OUTSIDE`.
    """
    import resvg_py

    # no icon holds text, and a machine's fonts must not matter
    png = resvg_py.svg_to_bytes(svg_string=svg, width=SIZE, height=SIZE, skip_system_fonts=True)
    return Image.open(io.BytesIO(bytes(png))).convert("RGBA")


class Drawn(NamedTuple):
    """An icon's picture, or why there is none."""

    png: bytes = b""
    digest: bytes = b""  # of the picture before it was coloured
    fault: str = ""


def draw(icon: Icon) -> Drawn:
    """Draws an icon, the same in every run: its colours are drawn by its key."""
    if OUTSIDE.search(icon.svg):
        return Drawn(fault="refers to something outside itself")
    try:
        ALARM(SECONDS)  # the renderer can't be interrupted: the process ends
        image = render(icon.svg.replace("currentColor", "#000000"))
    except ValueError:  # some icons are no valid SVG
        return Drawn(fault="blank")
    finally:
        ALARM(0)
    rgba = np.asarray(image, dtype=np.float32) / 255
    rgb, alpha = rgba[..., :3], rgba[..., 3:]
    one_colour = not (rgb * alpha > 0.02).any()
    ink, ground = colours(random.Random(icon.key)) if one_colour else (rgb, np.ones(3))
    digest = hashlib.sha256((rgba * 15).round().astype(np.uint8).tobytes()).digest()
    picture = alpha * ink + (1 - alpha) * ground
    if np.ptp(picture, axis=(0, 1)).max() < 0.1:
        return Drawn(fault="blank")
    file = io.BytesIO()
    Image.fromarray((picture * 255).round().astype(np.uint8)).save(file, "png", compress_level=3)
    return Drawn(file.getvalue(), digest)


def draw_in_processes(icons: Sequence[Icon]) -> Generator[Drawn, None, None]:
    """Draws icons in their order, in a process for each core; one may crash the renderer."""
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
            else:  # by one of the next chunk, or later: those one by one, then on
                for icon in icons[done : done + CHUNK]:
                    yield from draw_in_processes([icon])
            done += CHUNK
        finally:
            pool.shutdown(cancel_futures=True)


def colours(rng: random.Random) -> tuple[np.ndarray, np.ndarray]:
    """Ink and ground of a one-coloured icon, each (3,) in [0, 1]; half are black on white."""
    kind, hue, other = rng.random(), rng.random(), rng.random()
    ink = colorsys.hls_to_rgb(hue, rng.uniform(0.2, 0.55), rng.uniform(0.3, 1))
    if kind < 0.5:
        return np.zeros(3), np.ones(3)
    if kind < 0.7:
        return np.array(ink), np.ones(3)
    if kind < 0.85:
        return np.array(ink), np.array(colorsys.hls_to_rgb(other, rng.uniform(0.85, 0.97), 0.6))
    pale = colorsys.hls_to_rgb(hue, rng.uniform(0.75, 1), rng.uniform(0.3, 1))
    return np.array(pale), np.array(colorsys.hls_to_rgb(other, rng.uniform(0.05, 0.3), 0.6))


def build(archive: Path, out: Path, limit: int | None, pictures_of_a_name: int) -> dict[str, Any]:
    """Writes the shards and sizes.json into `out`; returns what the manifest says of them.

    limit: how many icons to draw, picked at random; None: all. pictures_of_a_name: at most so many
    are trained on; 0: all. Of a name that is held out there is one.
    """
    left_out: Counter[str] = Counter()
    taken, icons = read_sets(archive, left_out)
    icons = icons[:limit]
    most = {"train": pictures_of_a_name or len(icons), "val": 1}  # pictures of a name
    seen: set[bytes] = set()
    names: dict[str, Counter[str]] = {part: Counter() for part in most}
    sets: Counter[str] = Counter()
    # A whole number as the time of each file: the same bytes again, and no extra header to read.
    shards = partial(wds.ShardWriter, maxcount=SAMPLES_PER_SHARD, mtime=0, verbose=0)
    with (
        shards(str(out / "train-%05d.tar")) as train,
        shards(str(out / "val-%05d.tar")) as val,
        contextlib.closing(draw_in_processes(icons)) as drawing,
    ):
        for icon, drawn in zip(icons, track(drawing, "drawing", total=len(icons)), strict=True):
            part = "val" if is_held_out(icon.name) else "train"
            if drawn.fault or drawn.digest in seen:
                left_out[drawn.fault or "the same picture again"] += 1
                continue
            seen.add(drawn.digest)
            if names[part][icon.name] >= most[part]:
                left_out[f"more pictures of a name ({part})"] += 1
                continue
            names[part][icon.name] += 1
            sets[icon.set] += 1
            text = caption(icon, taken[icon.set]["name"], random.Random(icon.key))
            key = icon.key.replace(".", "_")
            sample: dict[str, Any] = {"__key__": key, "png": drawn.png, "txt": text}
            if part == "val":  # training doesn't read it, and each file of a tar costs it time
                sample["json"] = {"name": icon.name, "style": icon.style, "set": icon.set}
            (train if part == "train" else val).write(sample)
    pairs = {part: sum(names[part].values()) for part in most}
    written = sorted(out.glob("*.tar"))
    sizes = {shard.name: count_pairs(str(shard), SAMPLES_PER_SHARD) for shard in written}
    (out / "sizes.json").write_text(json.dumps(sizes))
    return {
        "pairs": pairs,
        "names": {part: len(counter) for part, counter in names.items()},
        "left_out": dict(left_out.most_common()),
        "sets": {p: describe(taken[p], sets[p]) for p in taken if sets[p]},
    }


def main(argv: Sequence[str]) -> None:
    """The command line."""
    parser = Parser("python -m reference_train.data.icons", description=__doc__)
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="a new folder")
    add("--package", type=Path, metavar="FILE", help="what `npm pack @iconify/json` downloads")
    add("--limit", type=whole_number(1), metavar="N", help="draw N icons, picked at random")
    words = "train on at most N icons with the same name; default %(default)s; 0: on all"
    most, count = PICTURES_OF_A_NAME, whole_number(0)
    add("--pictures-of-a-name", type=count, default=most, metavar="N", help=words)
    options = parser.parse_args(argv)
    if importlib.util.find_spec("resvg_py") is None:
        raise Stopped("resvg_py is not installed: pip install resvg-py")
    # SIGTERM ends this process as an error would, so that no unfinished file is left
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with new_folder(options.out) as folder, tempfile.TemporaryDirectory() as temporary:
        archive = options.package or Path(temporary) / "icons.tgz"
        if not options.package:
            try:
                torch.hub.download_url_to_file(URL, str(archive), SHA256)
            except (OSError, RuntimeError) as error:  # RuntimeError: another file than it was
                what = f"{URL}: {first_line(error)}"
                raise Stopped(f"{what}; --help says how to give what is on disk") from error
        built = build(archive, folder, options.limit, options.pictures_of_a_name)
        source = {
            "package": str(options.package or URL),
            "sha256": hashlib.sha256(archive.read_bytes()).hexdigest(),
            "limit": options.limit,
            "pictures_of_a_name": options.pictures_of_a_name,
        }
        manifest = json.dumps({**source, **built}, indent=1, ensure_ascii=False)
        (folder / "manifest.json").write_text(manifest)
    pairs = built["pairs"]
    print(f"{options.out}: {pairs['train']:,} pairs to train on, {pairs['val']:,} held out")


if __name__ == "__main__":
    run(main)
