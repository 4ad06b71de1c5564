"""The data: the icons, from a package made here, and the emoji that ship."""

import faulthandler
import hashlib
import io
import json
import os
import random
import re
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from processes import start
from tars import write_tar

from reference_train.command_line import CannotStart, Stopped
from reference_train.data import icons
from reference_train.data.emoji import ALL_STYLES, EMOJI_FOLDER
from reference_train.data.samples import Sample, read_samples


def square(size: int, colour: str = "currentColor") -> dict:
    return {"body": f'<path fill="{colour}" d="M1 1h{size}v{size}h-{size}z"/>'}


def a_set(title: str, category: str = "UI 24px", licence: str = "MIT") -> dict:
    info = {"name": title, "total": 1, "category": category, "author": {"name": "Somebody"}}
    return {**info, "license": {"title": f"The {licence} licence", "spdx": licence}}


NOISE = '<filter id="f"><feTurbulence baseFrequency=".1" numOctaves="2000000000"/></filter>'
PLAIN = {
    "alarm-clock-outline": square(10),
    "alarm-clock-16": square(11),
    "traffic-light": square(12),  # "light" ends one name: not a style here
    "again": square(10),
    "nothing": {"body": "<g/>"},
    "broken": {"body": "<path"},
    "12": square(13),
    "red-box": square(14, "#ff0000"),
    "nothing-but-red": {"body": '<rect width="24" height="24" fill="red"/>'},
    "brand-x": square(15),
    "wide": {**square(9), "width": 32},
    # the renderer of resvg-py 0.5 overflows its stack, and its process dies
    "deep": {"body": "<g opacity='.9'>" * 900 + square(8)["body"] + "</g>" * 900},
    "endless": {"body": NOISE + '<rect width="20" height="20" filter="url(#f)"/>'},
    "file": {"body": f'<image width="9" height="9" xlink:href="{__file__}.png"/>'},
    **{f"thing-{chr(97 + i)}x-outline": square(16 + i) for i in range(8)},
}
SETS = {
    "plain": (a_set("Plain Icons"), PLAIN),
    "faces": (a_set("Some Emoji", category="Emoji"), {"grin": square(2)}),
    "brands": (a_set("Logos", category="Logos"), {"logo": square(3)}),
    "countries": (a_set("Flag Icons", category="Flags / Maps"), {"fr": square(4)}),
    "unfree": (a_set("Unfree", licence="CC-BY-NC-4.0"), {"cat": square(5)}),
}


def make_package(path: Path, sets: dict = SETS, without: str = "") -> Path:
    """As npm packs it; without a file."""
    files = {"collections": {name: info for name, (info, _) in sets.items()}}
    for name, (_, drawings) in sets.items():
        files[f"json/{name}"] = {"prefix": name, "icons": drawings, "width": 24, "height": 24}
    files.pop(without, None)
    content = {f"package/{name}.json": json.dumps(files[name]).encode() for name in files}
    return write_tar(path, content, "w:gz")


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """With more held out than in truth, for some of so few."""
    folder = tmp_path_factory.mktemp("icons")
    package = make_package(folder / "icons.tgz")
    faulthandler.disable()  # pytest's would show how "deep" crashes a child
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(icons, "VALIDATION_SHARE", 0.3)
        patch.setattr(icons, "SECONDS", 2)
        patch.setattr(icons, "CHUNK", 4)  # so that some are drawn before a crash
        patch.setattr(icons, "SAMPLES_PER_SHARD", 6)
        icons.main(["--out", str(folder / "out"), "--package", str(package)])
    faulthandler.enable(sys.__stderr__)
    return folder / "out"


def manifest_of(folder: Path) -> dict:
    return json.loads((folder / "manifest.json").read_text())


def samples(folder: Path, files: str = "*.tar") -> dict[str, Sample]:
    pairs = [s for path in sorted(folder.glob(files)) for s in read_samples([str(path)])]
    return {s.key: s for s in pairs}


def test_what_is_left_out(built: Path) -> None:
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
    assert sum(manifest["pairs"].values()) == len(PLAIN) - 9
    assert {name: about["licence"] for name, about in manifest["sets"].items()} == {"plain": "MIT"}
    assert manifest["package"] == str(archive)
    assert manifest["sha256"] == hashlib.sha256(archive.read_bytes()).hexdigest()


def test_shards_are_as_open_clip_reads_them(built: Path) -> None:
    sizes = json.loads((built / "sizes.json").read_text())
    assert sizes == {p.name: len(list(read_samples([str(p)]))) for p in built.glob("*.tar")}
    assert max(sizes.values()) == 6
    things = [key for key in samples(built, "train-*.tar") if "thing" in key]
    assert things != sorted(things)
    for sample in samples(built).values():
        with Image.open(io.BytesIO(sample.image)) as image:
            assert (image.size, image.mode) == ((64, 64), "RGB")
            if "red box" in sample.caption:  # an icon in colours keeps them on white
                assert np.asarray(image)[[20, 0], [20, 63]].tolist() == [[255, 0, 0], [255] * 3]


def test_names_without_their_style() -> None:
    found = ["bold-cat", "bold-dog", "cat-thin", "dog-thin", "cat-light", *["thin"] * 95]
    assert icons.style_words(found) == {"bold", "thin"}  # 2% of the names have them
    names = ("Alarm-clock-24-outline", "traffic-light", "outline", "outline-3d_rotation")
    without = ["alarm clock", "traffic light", "outline", "3d rotation"]
    found = [icons.split_name(name, {"outline"}) for name in names]
    assert found == list(zip(without, (["outline"], [], [], ["outline"]), strict=True))


def test_an_icon_as_its_set_has_it() -> None:
    """With its set's box where it has none, in a square, and with its group in words."""
    drawings = {"cat": {"body": "CAT", "hFlip": True, "width": 8}, "dog": {"body": "DOG"}}
    content = {"icons": {**drawings, "us": {"body": ""}}, "left": 1, "top": 2, "height": 12}
    content["categories"] = {"PetsAndMore": ["cat"], "Flags": ["us"]}
    left_out: Counter[str] = Counter()
    cat, dog = icons.read_set("set", content, left_out)
    assert cat[:5] == ("set__cat", "set", "cat", "", "pets and more")
    assert 'viewBox="-1 2 12 12" width="12" height="12"><g transform="translate(10 0)' in cat.svg
    assert 'viewBox="1 0 16 16" width="16" height="16">DOG<' in dog.svg
    assert 'viewBox="0 0 16 16"' in icons.square_svg({"body": ""})
    assert left_out == {"logos and flags in other sets": 1}


def test_ink_and_ground() -> None:
    """Half are black on white, a fifth in a colour on white; all can be seen."""
    drawn = [icons.colours(random.Random(number)) for number in range(1000)]
    inks, grounds = (np.array(colours) for colours in zip(*drawn, strict=True))
    assert 0 <= min(inks.min(), grounds.min()) < max(inks.max(), grounds.max()) <= 1
    lighter = inks.mean(axis=1) > grounds.mean(axis=1)
    shares = [(inks == 0).all(axis=1).mean(), (grounds == 1).all(axis=1).mean(), lighter.mean()]
    assert shares == pytest.approx([0.5, 0.7, 0.15], abs=0.03)
    assert np.abs(inks - grounds).max(axis=1).min() > 0.2
    for key in map(str, range(9)):
        icon = icons.Icon(key, "set", "box", "", "", icons.square_svg(square(12)))
        with Image.open(io.BytesIO(icons.draw(icon).png)) as image:
            pixels = np.asarray(image)[[20, 0], [20, 63]] / 255
        np.testing.assert_allclose(pixels, icons.colours(random.Random(key)), atol=0.003)


def test_names_in_two_sets(tmp_path: Path, monkeypatch) -> None:
    """Held out in both or in none. A held-out one has one picture; the others as many as wanted."""
    monkeypatch.setattr(icons, "VALIDATION_SHARE", 0.5)
    monkeypatch.setattr(icons, "PICTURES_OF_A_NAME", 1)
    sets = {}
    for of, size in (("one", 2), ("two", 10)):
        sets[of] = a_set(of), {f"thing-{chr(97 + i)}x": square(size + i) for i in range(8)}
    package = str(make_package(tmp_path / "icons.tgz", sets))
    for option, most in ("", 1), ("--pictures-of-a-name=0", 2), ("--pictures-of-a-name=3", 2):
        out = tmp_path / f"out{option}"
        icons.main(["--out", str(out), "--package", package, *option.split()])
        manifest = manifest_of(out)
        assert manifest["pictures_of_a_name"] == int(option[-1:] or 1)
        assert sum((*manifest["pairs"].values(), *manifest["left_out"].values())) == 16
        val, train = (samples(out, f"{part}-*.tar").values() for part in ("val", "train"))
        held_out = [sample.info["name"] for sample in val]
        assert 0 < len(held_out) == len(set(held_out)) < 8
        assert len(train) == most * (8 - len(held_out))
        assert not [s for s in train if any(name in s.caption for name in held_out)]


def test_captions() -> None:
    """Templates that name what an icon lacks become its name alone."""
    of_a = {f"{words} cat" for words in ("a drawing of", "a picture of", "an icon of")}
    for lacks, other in ("style", "cat, pets"), ("group", "cat, bold"):
        icon = icons.Icon("key", "set", "cat", "bold", "pets", "")._replace(**{lacks: ""})
        found = {icons.caption(icon, "Set", random.Random(seed)) for seed in range(300)}
        assert found == {"cat", "a small drawing of cat", "cat icon, Set", *of_a, other}


def test_the_package_is_downloaded(built: Path, tmp_path: Path, monkeypatch) -> None:
    """And the same icons give the same pictures."""
    file = built.parent / "icons.tgz"
    monkeypatch.setattr(icons, "URL", file.as_uri())
    monkeypatch.setattr(icons, "VALIDATION_SHARE", 0.3)
    with pytest.raises(Stopped, match="invalid hash value"):
        icons.main(["--out", str(tmp_path / "out")])
    monkeypatch.setattr(icons, "SHA256", hashlib.sha256(file.read_bytes()).hexdigest())
    icons.main(["--out", str(tmp_path / "out"), "--limit", "3"])
    manifest = manifest_of(tmp_path / "out")
    assert manifest["package"] == icons.URL
    assert sum(manifest["pairs"].values()) <= manifest["limit"] == 3
    assert samples(tmp_path / "out").items() <= samples(built).items()


def test_what_cannot_be_built(tmp_path: Path, monkeypatch) -> None:
    make_package(tmp_path / "other.tgz", without="collections")
    make_package(tmp_path / "lacks.tgz", without="json/plain")
    monkeypatch.chdir(tmp_path)
    for arguments, message in (
        ("--out out --package none.tgz", r"none\.tgz: can't be read: .*No such file"),
        ("--out out --package other.tgz", r"other\.tgz: has no collections\.json"),
        ("--out out --package lacks.tgz", r"lacks\.tgz: has no json/plain\.json"),
        ("--out out --pictures-of-a-name -1", "--pictures-of-a-name: must be a whole number >= 0"),
        ("", "arguments are required: --out"),
        ("--out .", "--out .*: is there already"),
        ("--out /proc/icons", "--out: /proc/icons can't be written"),
    ):
        with pytest.raises(CannotStart, match=message):
            icons.main(arguments.split())
    monkeypatch.setattr(icons.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(Stopped, match="pip install resvg-py"):
        icons.main(["--out", "out"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["lacks.tgz", "other.tgz"]


def test_sigterm_leaves_nothing(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    os.mkfifo(tmp_path / "package")  # it is waited for
    command = [sys.executable, "-m", "reference_train.data.icons", "--package"]
    with start([*command, f"{tmp_path}/package", "--out", f"{tmp_path}/new/out"]) as process:
        while not list(tmp_path.glob("new/.out.*/out")) and process.poll() is None:
            time.sleep(0.05)
        process.terminate()
        assert process.wait(300) == 143
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["new", "package"]


def test_samples_and_concepts() -> None:
    """Concepts are the same in every style, and split by the data card's rule."""
    concepts = dict[str, dict]()
    for style in ALL_STYLES:
        samples = list(read_samples([str(EMOJI_FOLDER / f"{style}.tar.xz")]))
        pictures = [Image.open(io.BytesIO(sample.image)) for sample in samples]
        assert {(p.format, p.mode, p.size) for p in pictures} == {("PNG", "RGB", (64, 64))}
        assert len({picture.tobytes() for picture in pictures}) == len(samples)  # all differ
        for key, _, caption, info in samples:
            assert (info.pop("style"), info["concept"], info["name"]) == (style, key, caption)
            assert concepts.setdefault(key, info) == info
    assert len(concepts) == 1597
    trained = {c["subgroup"] for c in concepts.values() if c["split"] == "train"}
    assert len(trained) == len({c["subgroup"] for c in concepts.values()}) == 95
    for key, concept in concepts.items():
        place = int.from_bytes(hashlib.sha256(f"52:{key}".encode()).digest()[:8], "big") / 2**64
        split = "test" if place < 0.15 else "validation" if place < 0.25 else "train"
        assert (concept["split"], all(concept["keywords"] or [""])) == (split, True)
        assert not re.search(r"\b1F3F[B-F]\b|\b1F1[EF]", key)
        assert not re.search(r"facing right$|^family:|skin tone|^flag(?! in hole)", concept["name"])
