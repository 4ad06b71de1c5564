"""The icons, from a package made here: which are taken and held out, and what is recorded."""

import faulthandler
import hashlib
import json
import sys
from itertools import product
from random import Random

import numpy as np
import pytest
from miniature import write_tar

from reference_train.command_line import RunFailed, UsageError
from reference_train.data import icon_sets, icons
from reference_train.data.samples import decode, read_samples
from reference_train.evaluate.datasets import find


def square(size, colour="currentColor"):
    return {"body": f'<path fill="{colour}" d="M1 1h{size}v{size}h-{size}z"/>'}


def a_set(title, category="UI 24px", licence="MIT"):
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
    "unseen": {**square(7), "hidden": True},
    "of-a-firm": square(6),
    "wide": {**square(9), "width": 32},
    "crash": CRASH,
    "endless": ENDLESS,
    "file": {"body": f'<image width="9" height="9" xlink:href="{__file__}.png"/>'},
    **{f"thing-{letter}x-outline": square(16 + i) for i, letter in enumerate("abcdefgh")},
}
SETS = {
    "plain": (a_set("Plain Icons"), DRAWINGS),
    "other": (
        a_set("Others"),
        {f"thing-{x}x": {**square(ord(x) - 86), "width": 32} for x in "abcdefgh"},
    ),
    "faces": (a_set("Some Emoji", category="Emoji"), {"grin": square(2)}),
    "brands": (a_set("Logos", category="Logos"), {"logo": square(3)}),
    "countries": (a_set("Flag Icons", category="Flags / Maps"), {"fr": square(4)}),
    "unfree": (a_set("Unfree", licence="CC-BY-NC-4.0"), {"cat": square(5)}),
}


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """A package as npm packs it."""
    files = {"collections": {name: info for name, (info, _) in SETS.items()}}
    for name, (_, drawings) in SETS.items():
        files[f"json/{name}"] = {"prefix": name, "icons": drawings, "width": 24, "height": 24}
    files["json/plain"]["categories"] = {"Brands": ["of-a-firm"], "RedThings": ["red-box"]}
    content = {f"package/{name}.json": json.dumps(files[name]).encode() for name in files}
    return write_tar(tmp_path_factory.mktemp("icons") / "icons.tgz", content, "w:gz")


@pytest.fixture(scope="module")
def built(package):
    """The shards of `SETS`. More names are held out than usual, because there are so few."""
    faulthandler.disable()  # pytest enables it, and it would show how a child crashes
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(icon_sets, "VALIDATION_SHARE", 0.5)
        patch.setattr(icon_sets, "TIMEOUT", 2)
        patch.setattr(icons, "CHUNK", 4)  # so that some are drawn before a crash
        patch.setattr(icons, "SAMPLES_PER_SHARD", 6)
        patch.setitem(icons.PICTURES_OF_A_NAME, "train", 1)
        out = package.parent / "out"
        icons.main(f"--out {out} --package {package}".split())
    faulthandler.enable(sys.__stderr__)
    return out


def samples(folder, files="*.tar"):
    pairs = [s for path in sorted(folder.glob(files)) for s in read_samples([str(path)])]
    return {s.key: s for s in pairs}


def test_the_shards_have_each_name_once_and_the_manifest_says_where_icons_come_from(package, built):
    manifest = json.loads((built / "manifest.json").read_text())
    assert [*manifest["sets"]] == ["plain", "other"]
    drawn = {key.split("__")[1] for key in samples(built)}
    for other in "again", "alarm-clock-16":  # of the same picture, and of the same name
        assert ("alarm-clock-outline" in drawn) != (other in drawn)
    assert drawn & DRAWINGS.keys() >= {"traffic-light", "red-box", "wide"}
    left_out = {"nothing", "nothing-but-red", "broken", "crash", "endless", "file", "12", "brand-x"}
    assert not drawn & {*left_out, "unseen", "of-a-firm"}
    about = {"title": "Plain Icons", "author": {"name": "Somebody"}, "licence": "MIT"}
    assert manifest["sets"]["plain"] == about
    assert sum(manifest["pairs"].values()) == len(samples(built))
    assert manifest["sha256"] == hashlib.sha256(package.read_bytes()).hexdigest()
    sizes = json.loads((built / "sizes.json").read_text())
    assert sizes == {path.name: len(samples(built, path.name)) for path in built.glob("*.tar")}


def test_a_name_is_held_out_in_all_sets_or_in_none(built):
    """A held-out name has one picture."""
    held_out_share = sum(icon_sets.is_held_out(f"name {i}") for i in range(10_000)) / 10_000
    assert held_out_share == 0.0202  # pinned: other names would be held out
    evaluated, train = find([built])["out"](), samples(built, "train-*.tar").values()
    names = evaluated.classes[""]
    held_out = {*names.names}
    assert names.labels.tolist() == [*range(len(held_out))]
    for name, [text] in zip(names.names, evaluated.captions, strict=True):
        assert name in text
    things = [f"thing {letter}x" for letter in "abcdefgh"]
    assert 0 < len(held_out & {*things}) < 8
    for name in (*held_out, *things):
        in_train = sum(name in sample.caption for sample in train)
        assert in_train == (name not in held_out)  # PICTURES_OF_A_NAME


def test_some_downloaded_icons_are_drawn_as_in_the_whole_package(
    package, built, tmp_path, monkeypatch
):
    """Another package than the expected one is refused. Without a network there is none."""
    for url, why in (("file:///nowhere", "No such file"), (package.as_uri(), "invalid hash value")):
        monkeypatch.setattr(icons, "URL", url)
        with pytest.raises(RunFailed, match=f"{url} can't be downloaded: .*{why}"):
            icons.main(f"--out {tmp_path}/out".split())
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(icons, "SHA256", hashlib.sha256(package.read_bytes()).hexdigest())
    icons.main(f"--out {tmp_path}/some --part 0 1".split())
    manifest = json.loads((tmp_path / "some" / "manifest.json").read_text())
    assert manifest["package"] == package.as_uri()
    found = samples(tmp_path / "some")
    assert len(found) == 1
    assert found.items() <= samples(built).items()
    with pytest.raises(UsageError, match="already exists"):
        icons.main(f"--out {tmp_path}/some".split())


def test_a_part_has_all_held_out_icons_and_other_training_icons(
    package, built, tmp_path, monkeypatch
):
    monkeypatch.setattr(icon_sets, "VALIDATION_SHARE", 0.5)
    drawn = []

    def draw_nothing(chosen):
        drawn.append(chosen)
        yield from ()

    monkeypatch.setattr(icons, "distinct_pictures", draw_nothing)
    for first, last in ((0, 3), (3, 6)):
        icons.build(package, tmp_path, (first, last))
    (held_out, first), (again, second) = (
        [
            [icon.key for icon in part if icon_sets.is_held_out(icon.name) == is_held_out]
            for is_held_out in (True, False)
        ]
        for part in drawn
    )
    assert held_out == again
    assert {*samples(built, "val-*.tar")} <= {*held_out}
    assert len(first) == len(second) == 3
    assert not {*first} & {*second}


def test_a_black_icon_gets_the_colours_of_its_key_and_a_coloured_one_keeps_its_own():
    keys = map(str, range(100))
    key = next(key for key in keys if icon_sets.colours(Random(key))[1].max() < 0.5)  # dark
    red = np.array([1, 0, 0]), np.ones(3)
    for drawing, expected in (
        (square(10), icon_sets.colours(Random(key))),
        (square(10, "#ff0000"), red),
    ):
        svg = icon_sets.square_svg(drawing)
        picture = decode(icon_sets.draw(icon_sets.Icon(key, "", "", "", "", svg)).png, 64)
        for place, colour in zip((20, 60), expected, strict=True):
            assert picture[:, place, place].tolist() == (255 * colour).round().tolist()
        svg = icon_sets.square_svg({**drawing, "hFlip": True})
        flipped = decode(icon_sets.draw(icon_sets.Icon(key, "", "", "", "", svg)).png, 64)
        assert (flipped[:, :, ::-1] == picture).all()


def test_colours_and_captions_have_the_shares_that_are_said():
    colours = [icon_sets.colours(Random(i)) for i in range(4000)]
    black, white = (sum(x[i].tolist() == [i] * 3 for x in colours) / 4000 for i in (0, 1))
    assert (black, white) == pytest.approx((0.5, 0.7), abs=0.03)
    plain = icon_sets.Icon("", "s", "cat", "", "", "")
    full = plain._replace(style="bold", group="pets")
    bare, told = (
        {icon_sets.caption(icon, "Set", Random(i)) for i in range(200)} for icon in (plain, full)
    )
    assert bare == {text for text in told if "bold" not in text and "pets" not in text}
    assert told - bare == {"cat, bold", "cat, pets"}
    assert {"cat", "a drawing of cat", "cat icon, Set"} <= bare


def test_a_name_has_up_to_40_pictures_to_train_on_and_one_held_out(package, tmp_path, monkeypatch):
    def fifty(_):
        for i, name in product(range(50), ("cat", "dog")):
            yield icon_sets.Icon(f"{name}{i}", "plain", name, "", "", ""), b""

    monkeypatch.setattr(icons, "distinct_pictures", fifty)
    monkeypatch.setattr(icons, "is_held_out", "cat".__eq__)
    assert icons.build(package, tmp_path, None)["pairs"] == {"train": 40, "val": 1}
