"""Tux Paint's stamps, photographs and drawings with captions, as an evaluation data set.

`python -m reference_train.data.stamps --out DIR` takes them from Debian's package
`tuxpaint-stamps-default` (81 MB; `--package` for one that is on disk) and writes clip-benchmark's
layout of WebDatasets: `test/0.tar`, `test/nshards.txt`, `classnames.txt` and
`zeroshot_classification_templates.txt`. A sample is `.png` (RGB on white, at most 256 pixels long),
`.cls` (which line of classnames.txt, from 0), `.txt` (the English caption) and `.json` (caption,
class, photo, file). They are under the GPL, version 2, Bill Kendrick and others, tuxpaint.org.

What is a photograph: a stamp without an SVG beside it, in no folder of drawings (`DRAWN`), in which
at most 40 % of the neighbouring pixels are equal. Of the 950 stamps of package 2025.03.31 (one more
is white on white, and left out) that makes 376 photographs. Looked at one by one, 14 are on the
wrong side: 11 shaded or scanned drawings (a button, Santa, two road signs) and 3 flat photographs
(an explosion, a flower, the crescent moon).

Classes are the package's folders, two levels deep and named by hand (`CLASSES`).
"""

import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from PIL import Image, ImageChops
from rich.progress import track

from ..errors import CannotStart, run
from .package import Package, make_data_set
from .samples import on_white

PACKAGE = Package(
    "https://deb.debian.org/debian/pool/main/t/tuxpaint-stamps/"
    "tuxpaint-stamps-default_2025.03.31-1_all.deb",
    "6312d03a37d0220b10fc91a7467bf2a2a2336e08c2f416de04311d25fd7aeacb",
    "apt-get download tuxpaint-stamps-default",
)
STAMPS = "usr/share/tuxpaint/stamps/"
LONG_SIDE = 256  # pixels
TEMPLATES = ("{c}", "a {c}", "a photo of a {c}", "a drawing of a {c}", "a picture of a {c}")

# Folders of drawings that are shaded like photographs; so is every folder named "cartoon".
DRAWN = ("seasonal/easter", "seasonal/hanukkah", "seasonal/newyears", "symbols/faces")
FLAT = 0.4  # share of equal neighbours above which a picture is a drawing

# Folder -> class; a folder that isn't here is of the class of the folder that it is in.
CLASSES = {
    "animals/amphibians": "amphibian",
    "animals/birds": "bird",
    "animals/dinosaur": "dinosaur",
    "animals/fish": "fish",
    "animals/insects": "insect",
    "animals/lizards": "lizard",
    "animals/mammals": "mammal",
    "animals/marsupials": "marsupial",
    "animals/shellfish": "shellfish",
    "clothes": "piece of clothing",
    "clothes/armor": "piece of armour",
    "clothes/hats": "hat",
    "food": "food",
    "food/dessert": "dessert",
    "food/fruit": "fruit",
    "food/nuts": "nut",
    "food/spices": "spice",
    "food/vegetables": "vegetable",
    "hobbies": "hobby",
    "hobbies/music": "musical instrument",
    "household": "household item",
    "household/arttools": "drawing tool",
    "household/dishes": "piece of tableware",
    "household/electronics": "electronic device",
    "household/tools": "tool",
    "medical": "medical instrument",
    "military": "military equipment",
    "military/vehicles": "military vehicle",
    "naturalforces": "force of nature",
    "people": "person",
    "people/body_parts": "part of the body",
    "people/toys": "doll",
    "plants": "plant",
    "plants/flowers": "flower",
    "plants/mushrooms": "mushroom",
    "plants/trees": "tree",
    "seasonal": "seasonal decoration",
    "seasonal/christmas": "Christmas decoration",
    "seasonal/easter": "Easter decoration",
    "seasonal/halloween": "Halloween decoration",
    "seasonal/hanukkah": "Hanukkah decoration",
    "seasonal/newyears": "New Year decoration",
    "seasonal/winter": "winter decoration",
    "space": "spacecraft",
    "space/solarsystem": "planet",
    "sports": "piece of sports equipment",
    "symbols": "symbol",
    "symbols/alphabets": "letter",
    "symbols/alphabets/asl": "hand sign",
    "symbols/chess": "chess piece",
    "symbols/faces": "smiley",
    "symbols/math": "number",
    "symbols/math/operators": "mathematical sign",
    "symbols/money": "coin",
    "symbols/money/00_symbols": "currency sign",
    "symbols/music": "musical note",
    "symbols/shapes": "shape",
    "town": "mailbox",
    "town/cartoon": "building",
    "town/flags": "flag",
    "town/houses": "building",
    "town/monuments": "monument",
    "town/roadsigns": "road sign",
    "vehicles": "vehicle",
    "vehicles/auto": "car",
    "vehicles/construction": "construction vehicle",
    "vehicles/cycle": "bicycle",
    "vehicles/emergency": "emergency vehicle",
    "vehicles/farming": "tractor",
    "vehicles/flight": "aircraft",
    "vehicles/locomotive": "train",
    "vehicles/masstransit": "bus",
    "vehicles/race": "racing car",
    "vehicles/ship": "ship",
}


class Stamp(NamedTuple):
    """A picture of the package with its caption."""

    path: PurePosixPath  # in the package's folder of stamps, without suffix
    png: bytes
    caption: str
    drawn: bool  # whether the package has it as a drawing (SVG) as well


def data_of(package: Path) -> tarfile.TarFile:
    """The files of a Debian package, which is an `ar` archive of tar files (deb(5))."""
    try:
        content = package.read_bytes()
        place = 8  # after the magic
        while content.startswith(b"!<arch>\n") and place < len(content):
            name, size = content[place : place + 16].strip(), int(content[place + 48 : place + 58])
            if name.startswith(b"data.tar"):
                return tarfile.open(fileobj=io.BytesIO(content[place + 60 : place + 60 + size]))
            place += 60 + size + size % 2
    except (OSError, ValueError, tarfile.TarError) as error:
        raise CannotStart(f"--package {package}: can't be read: {error}") from error
    raise CannotStart(f"--package {package}: not a Debian package")


def read_stamps(package: Path) -> list[Stamp]:
    """The captioned stamps of a package, by path; raises `CannotStart` if it has none."""
    files: dict[PurePosixPath, bytes] = {}
    with data_of(package) as tar:
        for member in tar:
            path = PurePosixPath(member.name)
            content = tar.extractfile(member) if path.suffix in (".png", ".svg", ".txt") else None
            if content and path.is_relative_to(STAMPS):
                files[path.relative_to(STAMPS)] = content.read()
    stamps = [
        Stamp(
            path.with_suffix(""),
            png,
            files[path.with_suffix(".txt")].decode().partition("\n")[0].strip(),  # then languages
            path.with_suffix(".svg") in files,
        )
        for path, png in sorted(files.items())
        if path.suffix == ".png" and path.with_suffix(".txt") in files
    ]
    if not stamps:
        raise CannotStart(f"--package {package}: no captioned PNG in {STAMPS}")
    return stamps


def class_of(path: PurePosixPath) -> str:
    """The class of a stamp; raises `CannotStart` for a folder that `CLASSES` doesn't cover."""
    for folder in path.parents:
        if str(folder) in CLASSES:
            return CLASSES[str(folder)]
    raise CannotStart(f"--package: no class is known for {path}")


def equal_neighbours(image: Image.Image) -> float:
    """The share of equal pairs among pairs of opaque pixels side by side; image: RGBA.

    1 if there is no such pair: a picture that is transparent all over was drawn.
    """
    left = image.crop((0, 0, image.width - 1, image.height))
    right = image.crop((1, 0, image.width, image.height))
    red, green, blue, _ = ImageChops.difference(left, right).split()
    difference = ImageChops.lighter(ImageChops.lighter(red, green), blue)
    opaque = ImageChops.darker(left.getchannel("A"), right.getchannel("A"))
    counts = difference.histogram(mask=opaque.point([0] * 251 + [255] * 5))
    return counts[0] / sum(counts) if any(counts) else 1.0


def is_photo(stamp: Stamp, image: Image.Image) -> bool:
    """Whether a stamp is a photograph; see the top of this file."""
    folders = [str(folder) for folder in stamp.path.parents]
    drawn = stamp.drawn or "cartoon" in stamp.path.parts or any(f in DRAWN for f in folders)
    return not drawn and equal_neighbours(image) <= FLAT


def make_sample(stamp: Stamp) -> dict[str, bytes] | None:
    """Suffix -> content; None for a picture that is white on white."""
    try:
        with Image.open(io.BytesIO(stamp.png)) as opened:
            image = opened.convert("RGBA")
    except OSError as error:
        raise CannotStart(f"--package: {stamp.path}.png is no picture that can be read") from error
    photo = is_photo(stamp, image)
    image.thumbnail((LONG_SIDE, LONG_SIDE))
    drawn = on_white(image)
    if drawn.getextrema() == ((255, 255),) * 3:
        return None
    png = io.BytesIO()
    drawn.save(png, "PNG")
    name = class_of(stamp.path)
    info = {"caption": stamp.caption, "class": name, "photo": photo, "file": f"{stamp.path}.png"}
    return {
        "png": png.getvalue(),
        "cls": str(classes().index(name)).encode(),
        "txt": stamp.caption.encode(),
        "json": json.dumps(info, ensure_ascii=False).encode(),
    }


def classes() -> list[str]:
    """The class names, in the order of their numbers."""
    return list(dict.fromkeys(CLASSES.values()))


def build(package: Path, folder: Path) -> tuple[int, int]:
    """Writes the data set into an empty folder; returns how many stamps and photographs it has."""
    (folder / "test").mkdir()
    count = photos = 0
    with tarfile.open(folder / "test" / "0.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for stamp in track(read_stamps(package), description="stamps"):
            sample = make_sample(stamp)
            if sample is None:
                continue
            count += 1
            photos += json.loads(sample["json"])["photo"]
            for suffix, content in sample.items():
                member = tarfile.TarInfo(f"{'_'.join(stamp.path.parts)}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    (folder / "test" / "nshards.txt").write_text("1\n")
    (folder / "classnames.txt").write_text("".join(f"{name}\n" for name in classes()))
    templates = folder / "zeroshot_classification_templates.txt"
    templates.write_text("".join(f"{template}\n" for template in TEMPLATES))
    return count, photos


def from_package(file: Path, folder: Path, _: Path) -> str:
    """Builds, and says how many stamps there are."""
    count, photos = build(file, folder)
    return f"{count} stamps, {photos} photographs and {count - photos} drawings"


def main(argv: Sequence[str]) -> None:
    """The command line."""
    make_data_set(argv, "stamps", __doc__, PACKAGE, from_package)


if __name__ == "__main__":
    run(main)
