"""The icons, from a package made here: which are taken, and how they are named and drawn."""

import faulthandler
import hashlib
import io
import json
import random
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tars import write_tar

from reference_train.command_line import RunFailed, UsageError
from reference_train.data import icon_sets, icons
from reference_train.data.samples import Sample, read_samples


def square(size: int, colour: str = "currentColor") -> dict:
    return {"body": f'<path fill="{colour}" d="M1 1h{size}v{size}h-{size}z"/>'}


def a_set(title: str, category: str = "UI 24px", licence: str = "MIT") -> dict:
    info = {"name": title, "total": 1, "category": category, "author": {"name": "Somebody"}}
    return {**info, "license": {"title": f"The {licence} licence", "spdx": licence}}


NOISE = '<filter id="f"><feTurbulence baseFrequency=".1" numOctaves="2000000000"/></filter>'
# With CRASH, the renderer of resvg-py 0.5 overflows its stack, and its process dies. It would need
# years to draw ENDLESS.
CRASH = {"body": "<g opacity='.9'>" * 900 + square(8)["body"] + "</g>" * 900}
ENDLESS = {"body": NOISE + '<rect width="20" height="20" filter="url(#f)"/>'}
DRAWINGS = {
    "alarm-clock-outline": square(10),
    "alarm-clock-16": square(11),
    "traffic-light": square(12),  # "light" ends 2% of the names, so it is a style
    "again": square(10),
    "nothing": {"body": "<g/>"},
    "broken": {"body": "<path"},
    "12": square(13),
    "red-box": square(14, "#ff0000"),
    "nothing-but-red": {"body": '<rect width="24" height="24" fill="red"/>'},
    "brand-x": square(15),
    "wide": {**square(9), "width": 32},
    "crash": CRASH,
    "endless": ENDLESS,
    "file": {"body": f'<image width="9" height="9" xlink:href="{__file__}.png"/>'},
    **{f"thing-{letter}x-outline": square(16 + i) for i, letter in enumerate("abcdefgh")},
}
SETS = {
    "plain": (a_set("Plain Icons"), DRAWINGS),
    "faces": (a_set("Some Emoji", category="Emoji"), {"grin": square(2)}),
    "brands": (a_set("Logos", category="Logos"), {"logo": square(3)}),
    "countries": (a_set("Flag Icons", category="Flags / Maps"), {"fr": square(4)}),
    "unfree": (a_set("Unfree", licence="CC-BY-NC-4.0"), {"cat": square(5)}),
}


def make_package(path: Path, sets: dict = SETS, without: str = "") -> Path:
    """A package as npm packs it. without: a file that it lacks."""
    files = {"collections": {name: info for name, (info, _) in sets.items()}}
    for name, (_, drawings) in sets.items():
        files[f"json/{name}"] = {"prefix": name, "icons": drawings, "width": 24, "height": 24}
    files.pop(without, None)
    content = {f"package/{name}.json": json.dumps(files[name]).encode() for name in files}
    return write_tar(path, content, "w:gz")


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """The shards of `SETS`. More names are held out than usual, because there are so few."""
    folder = tmp_path_factory.mktemp("icons")
    package = make_package(folder / "icons.tgz")
    faulthandler.disable()  # pytest enables it, and it would show how a child crashes
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(icon_sets, "VALIDATION_SHARE", 0.3)
        patch.setattr(icon_sets, "TIMEOUT", 2)
        patch.setattr(icons, "CHUNK", 4)  # so that some are drawn before a crash
        patch.setattr(icons, "SAMPLES_PER_SHARD", 6)
        icons.main(f"--out {folder}/out --package {package}".split())
    faulthandler.enable(sys.__stderr__)
    return folder / "out"


def manifest_of(folder: Path) -> dict:
    return json.loads((folder / "manifest.json").read_text())


def samples(folder: Path, files: str = "*.tar") -> dict[str, Sample]:
    pairs = [s for path in sorted(folder.glob(files)) for s in read_samples([str(path)])]
    return {s.key: s for s in pairs}


def test_the_manifest_says_what_was_left_out_and_where_the_icons_come_from(built: Path) -> None:
    manifest, archive = manifest_of(built), built.parent / "icons.tgz"
    assert manifest["left_out"] == {
        "blank": 3,
        "crashes the renderer, or takes it for ever": 2,
        **{f"sets: {kind}": 1 for kind in ("emoji", "logos", "flags", "non-commercial licence")},
        "refers to something outside itself": 1,
        "the same picture again": 1,
        "hidden, or a name without a word": 1,
        "logos and flags in other sets": 1,
    }
    assert sum(manifest["pairs"].values()) == len(DRAWINGS) - 9
    assert {name: about["licence"] for name, about in manifest["sets"].items()} == {"plain": "MIT"}
    assert manifest["package"] == str(archive)
    assert manifest["sha256"] == hashlib.sha256(archive.read_bytes()).hexdigest()
    sizes = json.loads((built / "sizes.json").read_text())
    assert sizes == {path.name: len(samples(built, path.name)) for path in built.glob("*.tar")}
    assert max(sizes.values()) == 6


# Each sample of `SETS` in the order of the shards: its caption, the name and the style of held-out
# icons, and the colours of a pixel in the icon and of one outside it.
BUILT = """
thing-ex-outline: thing ex icon, Plain Icons [206, 176, 217] on [26, 10, 7]
thing-cx-outline: a drawing of thing cx [0, 0, 0] on [255, 255, 255]
alarm-clock-outline: alarm clock [0, 0, 0] on [255, 255, 255]
thing-fx-outline: a picture of thing fx [76, 148, 100] on [255, 255, 255]
thing-hx-outline: an icon of thing hx [0, 0, 0] on [255, 255, 255]
thing-dx-outline: thing dx [79, 74, 152] on [243, 248, 225]
wide: wide [255, 255, 255] on [255, 255, 255]
alarm-clock-16: a picture of alarm clock [225, 214, 248] on [47, 25, 12]
thing-ax-outline: a drawing of thing ax [0, 0, 0] on [255, 255, 255]
thing-gx-outline: thing gx icon, Plain Icons [thing gx] [outline] [173, 224, 246] on [12, 46, 42]
traffic-light: a drawing of traffic [traffic] [light] [0, 0, 0] on [255, 255, 255]
red-box: red box [red box] [] [255, 0, 0] on [255, 255, 255]
thing-bx-outline: thing bx [thing bx] [outline] [62, 32, 225] on [228, 242, 203]
"""


def test_the_shards_have_the_known_names_captions_and_colours(built: Path) -> None:
    lines = []
    for key, sample in samples(built).items():
        with Image.open(io.BytesIO(sample.image)) as image:
            assert (image.size, image.mode) == ((64, 64), "RGB")
            ink, ground = np.asarray(image)[[20, 0], [20, 63]].tolist()
        info = "".join(f" [{sample.info[name]}]" for name in ("name", "style") if sample.info)
        lines.append(f"{key.split('__')[1]}: {sample.caption}{info} {ink} on {ground}")
    assert lines == BUILT.strip().splitlines()


def test_words_of_style_are_those_that_two_percent_of_the_names_have() -> None:
    names = ["bold-cat", "bold-dog", "cat-thin", "dog-thin", "cat-light", *["thin"] * 95]
    assert icon_sets.style_words(names) == {"bold", "thin"}


def test_an_icon_without_a_view_box_has_that_of_its_set() -> None:
    drawings = {"cat": {"body": "CAT", "hFlip": True, "width": 8}, "dog": {"body": "DOG"}}
    content = {"icons": {**drawings, "us": {"body": ""}}, "left": 1, "top": 2, "height": 12}
    content["categories"] = {"PetsAndMore": ["cat"], "Flags": ["us"]}
    left_out: Counter[str] = Counter()
    cat, dog = icon_sets.read_set("set", content, left_out)
    assert cat[:5] == ("set__cat", "set", "cat", "", "pets and more")
    assert 'viewBox="-1 2 12 12" width="12" height="12"><g transform="translate(10 0)' in cat.svg
    assert 'viewBox="1 0 16 16" width="16" height="16">DOG<' in dog.svg
    assert 'viewBox="0 0 16 16"' in icon_sets.square_svg({"body": ""})
    assert left_out == {"logos and flags in other sets": 1}


@pytest.fixture(scope="module")
def two_sets(tmp_path_factory) -> str:
    """A package of eight names, each in two sets."""
    sets = {}
    for prefix, size in (("one", 2), ("two", 10)):
        drawings = {f"thing-{letter}x": square(size + i) for i, letter in enumerate("abcdefgh")}
        sets[prefix] = a_set(prefix), drawings
    return str(make_package(tmp_path_factory.mktemp("two") / "icons.tgz", sets))


@pytest.mark.parametrize(("most", "trained_on"), [(0, 2), (1, 1)])
def test_a_name_is_held_out_in_all_sets_or_in_none(
    most: int, trained_on: int, two_sets: str, tmp_path: Path, monkeypatch
) -> None:
    """A held-out name has one picture, other names as many as --pictures-of-a-name allows."""
    held_out_share = sum(icon_sets.is_held_out(f"name {i}") for i in range(10_000)) / 10_000
    assert held_out_share == 0.0202  # pinned: other names would be held out
    monkeypatch.setattr(icon_sets, "VALIDATION_SHARE", 0.5)
    out = tmp_path / "out"
    icons.main(f"--out {out} --package {two_sets} --pictures-of-a-name {most}".split())
    manifest = manifest_of(out)
    assert sum((*manifest["pairs"].values(), *manifest["left_out"].values())) == 16
    val, train = (samples(out, f"{part}-*.tar").values() for part in ("val", "train"))
    held_out = {sample.info["name"] for sample in val}
    assert len(held_out) == len(val)
    assert 0 < len(val) < 8
    assert len(train) == trained_on * (8 - len(val))
    assert not [s for s in train if any(name in s.caption for name in held_out)]


def test_a_caption_is_the_name_if_the_icon_lacks_what_the_template_needs() -> None:
    always = {"cat", "a small drawing of cat", "cat icon, Set"}
    always |= {f"{words} cat" for words in ("a drawing of", "a picture of", "an icon of")}
    for lacks, other in ("style", "cat, pets"), ("group", "cat, bold"):
        icon = icon_sets.Icon("key", "set", "cat", "bold", "pets", "")._replace(**{lacks: ""})
        found = {icon_sets.caption(icon, "Set", random.Random(seed)) for seed in range(300)}
        assert found == {*always, other}


def test_some_downloaded_icons_are_drawn_as_in_the_whole_package(
    two_sets: str, tmp_path: Path, monkeypatch
) -> None:
    """Another package than the expected one is refused."""
    monkeypatch.setattr(icons, "URL", Path(two_sets).as_uri())
    with pytest.raises(RunFailed, match=r"invalid hash value.*; --package takes a file"):
        icons.main(f"--out {tmp_path}/out".split())
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(icons, "SHA256", hashlib.sha256(Path(two_sets).read_bytes()).hexdigest())
    icons.main(f"--out {tmp_path}/whole --package {two_sets}".split())
    icons.main(f"--out {tmp_path}/some --limit 3".split())
    manifest = manifest_of(tmp_path / "some")
    assert manifest["package"] == icons.URL
    assert (sum(manifest["pairs"].values()), manifest["limit"]) == (3, 3)
    assert samples(tmp_path / "some").items() <= samples(tmp_path / "whole").items()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--out out --package none.tgz", r"none\.tgz: can't be read: .*No such file"),
        ("--out out --package other.tgz", r"other\.tgz: has no collections\.json"),
        ("--out out --package lacks.tgz", r"lacks\.tgz: has no json/plain\.json"),
        ("--out out --pictures-of-a-name -1", "--pictures-of-a-name: must be a whole number >= 0"),
        ("", "arguments are required: --out"),
        ("--out .", "--out .*: already exists"),
        ("--out /proc/icons", "--out: /proc/icons can't be written"),
    ],
)
def test_bad_arguments_and_packages_raise_an_error_and_leave_nothing(
    arguments: str, message: str, tmp_path: Path, monkeypatch
) -> None:
    make_package(tmp_path / "other.tgz", without="collections")
    make_package(tmp_path / "lacks.tgz", without="json/plain")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=message):
        icons.main(arguments.split())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["lacks.tgz", "other.tgz"]
