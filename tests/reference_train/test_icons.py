"""The icons, from a package made here: which are taken and held out, and what is recorded."""

import faulthandler
import hashlib
import json
import sys
from pathlib import Path

import pytest
from tars import write_tar

from reference_train.command_line import UsageError
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


@pytest.fixture(scope="module")
def two_sets(tmp_path_factory) -> str:
    """A package of eight names, each in two sets."""
    sets = {}
    for prefix, size in (("one", 2), ("two", 10)):
        drawings = {f"thing-{letter}x": square(size + i) for i, letter in enumerate("abcdefgh")}
        sets[prefix] = a_set(prefix), drawings
    return str(make_package(tmp_path_factory.mktemp("two") / "icons.tgz", sets))


@pytest.mark.parametrize(("most", "trained_on"), [(40, 2), (1, 1)])
def test_a_name_is_held_out_in_all_sets_or_in_none(
    most: int, trained_on: int, two_sets: str, tmp_path: Path, monkeypatch
) -> None:
    """A held-out name has one picture, other names as many as `PICTURES_OF_A_NAME` allows."""
    monkeypatch.setitem(icons.PICTURES_OF_A_NAME, "train", most)
    held_out_share = sum(icon_sets.is_held_out(f"name {i}") for i in range(10_000)) / 10_000
    assert held_out_share == 0.0202  # pinned: other names would be held out
    monkeypatch.setattr(icon_sets, "VALIDATION_SHARE", 0.5)
    out = tmp_path / "out"
    icons.main(f"--out {out} --package {two_sets}".split())
    manifest = manifest_of(out)
    assert sum((*manifest["pairs"].values(), *manifest["left_out"].values())) == 16
    val, train = (samples(out, f"{part}-*.tar").values() for part in ("val", "train"))
    held_out = {sample.info["name"] for sample in val}
    assert len(held_out) == len(val)
    assert 0 < len(val) < 8
    assert len(train) == trained_on * (8 - len(val))
    assert not [s for s in train if any(name in s.caption for name in held_out)]


def test_some_downloaded_icons_are_drawn_as_in_the_whole_package(
    two_sets: str, tmp_path: Path, monkeypatch
) -> None:
    """Another package than the expected one is refused."""
    monkeypatch.setattr(icons, "URL", Path(two_sets).as_uri())
    with pytest.raises(RuntimeError, match="invalid hash value"):
        icons.main(f"--out {tmp_path}/out".split())
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(icons, "SHA256", hashlib.sha256(Path(two_sets).read_bytes()).hexdigest())
    icons.main(f"--out {tmp_path}/whole --package {two_sets}".split())
    icons.main(f"--out {tmp_path}/some --limit 1".split())
    manifest = manifest_of(tmp_path / "some")
    assert manifest["package"] == icons.URL
    assert (sum(manifest["pairs"].values()), manifest["limit"]) == (1, 1)
    assert samples(tmp_path / "some").items() <= samples(tmp_path / "whole").items()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--out out --package none.tgz", r"none\.tgz: can't be read: .*No such file"),
        ("--out out --package other.tgz", r"other\.tgz: has no collections\.json"),
        ("--out out --package lacks.tgz", r"lacks\.tgz: has no json/plain\.json"),
        ("--out .", "--out .*: already exists"),
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
