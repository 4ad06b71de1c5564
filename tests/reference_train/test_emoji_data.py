"""The emoji shards that ship, and the script that builds them (which downloads; these do not)."""

import io
import json
import re
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("PIL")
pytest.importorskip("webdataset")
pytest.importorskip("rich")

from PIL import Image, ImageChops, ImageStat
from tars import write_package

from reference_train.emoji import build
from reference_train.errors import Stopped

FOLDER = Path(build.__file__).parent
SAMPLES = {  # style -> train, validation, test; the counts of the data card
    "noto": (1189, 152, 253),
    "twemoji": (1190, 153, 254),
    "fluent-emoji-flat": (1168, 149, 248),
    "noto-v1": (827, 113, 179),
    "openmoji": (1160, 149, 248),
    "fluent-emoji": (1171, 150, 248),
    "fluent-emoji-high-contrast": (1152, 149, 242),
}
FIELDS = {"concept", "name", "keywords", "group", "subgroup", "style", "split", "emoji"}
Shard = dict[str, dict[str, bytes]]  # key -> suffix -> content


def read_shard(path: Path) -> Shard:
    shard: Shard = {}
    with tarfile.open(path, "r|*") as tar:  # as a stream, which is how webdataset reads
        for member in tar:
            key, suffix = member.name.split(".")
            content = tar.extractfile(member)
            assert content is not None
            assert suffix not in shard.setdefault(key, {})
            shard[key][suffix] = content.read()
    return shard


@pytest.fixture(scope="module")
def shards() -> dict[str, Shard]:
    assert {path.name for path in FOLDER.glob("*.tar*")} == {f"{s}.tar.xz" for s in build.STYLES}
    return {style: read_shard(FOLDER / f"{style}.tar.xz") for style in SAMPLES}


@pytest.fixture(scope="module")
def infos(shards: dict[str, Shard]) -> list[dict[str, Any]]:
    return [json.loads(s["json"]) for shard in shards.values() for s in shard.values()]


def test_counts(infos: list[dict[str, Any]]) -> None:
    found = Counter((info["style"], info["split"]) for info in infos)
    splits = ("train", "validation", "test")
    assert {s: tuple(found[s, split] for split in splits) for s in SAMPLES} == SAMPLES


@pytest.mark.parametrize("style", SAMPLES)
def test_samples(shards: dict[str, Shard], style: str) -> None:
    pictures = set()
    for key, sample in shards[style].items():
        assert set(sample) == {"json", "png", "txt"}
        with Image.open(io.BytesIO(sample["png"])) as image:
            image.load()  # decodes, checksums included
            assert (image.format, image.mode, image.size) == ("PNG", "RGB", (64, 64))
            pictures.add(image.tobytes())
            assert image.getextrema() != ((255, 255),) * 3, "blank"
        info = json.loads(sample["json"])
        assert set(info) == FIELDS
        assert (info["concept"], info["style"]) == (key, style)
        assert build.bare(key) == build.bare("-".join(f"{ord(c):04X}" for c in info["emoji"]))
        assert info["name"] == sample["txt"].decode()
        assert info["split"] == build.split_of(key)
        assert info["keywords"]
        assert all(info["keywords"])
    assert len(pictures) == len(shards[style]), "two concepts with one picture"


def test_concepts(infos: list[dict[str, Any]]) -> None:
    """They are the same in every style, and none is a flag, a skin tone or a near-duplicate."""
    seen: dict[str, dict[str, Any]] = {}
    for info in infos:
        concept = {field: value for field, value in info.items() if field != "style"}
        assert seen.setdefault(info["concept"], concept) == concept
    assert len(seen) == len({concept["name"] for concept in seen.values()}) == 1597
    assert len({concept["group"] for concept in seen.values()} - {"flags", "components"}) == 8
    subgroups = {concept["subgroup"] for concept in seen.values()}
    trained = {c["subgroup"] for c in seen.values() if c["split"] == "train"}
    assert (len(subgroups), trained) == (95, subgroups)
    shares = Counter(concept["split"] for concept in seen.values())
    assert shares["test"] / len(seen) == pytest.approx(0.15, abs=0.01)
    assert shares["validation"] / len(seen) == pytest.approx(0.10, abs=0.01)
    for code, concept in seen.items():
        assert not re.search(r"\b1F3F[B-F]\b|\b1F1[EF]", code)
        assert not re.search(r"facing right$|^family:|skin tone|^flag(?! in hole)", concept["name"])


def test_split_depends_on_the_concept_alone() -> None:
    # Written out: a changed hash would move concepts from test to train unseen.
    expected = {"1F600": "train", "1F603": "train", "1F604": "test", "1F601": "test"}
    expected |= {"1F60D": "validation", "1F636": "validation"}
    assert {code: build.split_of(code) for code in expected} == expected


def test_mirrored_alias_is_the_mirror_image(shards: dict[str, Shard]) -> None:
    # Fluent's "pointing right" is an alias of "pointing left", flipped.
    for style in ("fluent-emoji-flat", "fluent-emoji", "fluent-emoji-high-contrast"):
        left, right = (
            Image.open(io.BytesIO(shards[style][code]["png"])).convert("L")
            for code in ("1F448", "1F449")
        )
        mirrored = left.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        same, other = (ImageStat.Stat(ImageChops.difference(x, right)) for x in (mirrored, left))
        assert same.mean[0] < 0.5  # of 255: antialiasing
        assert other.mean[0] > 10


# The script


def sample(code: str, shade: int) -> tuple[dict[str, Any], bytes]:
    return {"concept": code, "name": f"name of {code}"}, build.stored_png(bytes([shade] * 12), 2, 2)


def test_png_is_what_was_drawn() -> None:
    pixels = bytes(range(5 * 3 * 3))
    with Image.open(io.BytesIO(build.stored_png(pixels, width=5, height=3))) as image:
        assert (image.size, image.mode, image.tobytes()) == ((5, 3), "RGB", pixels)


def test_a_shard_is_the_same_bytes_or_the_old_one(tmp_path: Path) -> None:
    samples = [sample("1F600", 1), sample("1F601", 2)]
    first, second = tmp_path / "a.tar.xz", tmp_path / "b.tar.xz"
    build.write_shard(first, samples)
    build.write_shard(second, reversed(samples))
    assert (before := first.read_bytes()) == second.read_bytes()
    assert list(read_shard(first)) == ["1F600", "1F601"]
    with tarfile.open(first) as tar:
        owners = {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in tar}
    assert owners == {(0, 0, 0, "", "", 0o644)}
    with pytest.raises(TypeError):
        build.write_shard(first, [samples[0], ({**samples[1][0], "odd": object()}, b"")])
    assert first.read_bytes() == before
    assert sorted(tmp_path.iterdir()) == [first, second]


def test_shared_pictures_are_dropped() -> None:
    samples = [sample("1F600", 1), sample("1F601", 1), sample("1F602", 2)]
    assert build.drop_shared_pictures(samples) == samples[2:]


def test_icons_by_character_and_by_the_names_of_the_sister_set() -> None:
    names = [("2600-FE0F", "sun"), ("2601", "cloud"), ("1F449", "to right")]
    sets = {
        "fluent-emoji-flat": build.IconSet(
            {"the-sun": {"body": "flat sun"}, "to-right": {"body": "hand"}}, {"2600": "the-sun"}
        ),
        "fluent-emoji": build.IconSet({n: {"body": n} for n in ("the-sun", "cloud")}, {}),
    }
    found = {
        style: [build.icon_of({"concept": code, "name": name}, style, sets) for code, name in names]
        for style in sets
    }
    assert found == {
        "fluent-emoji-flat": [{"body": "flat sun"}, None, {"body": "hand"}],
        "fluent-emoji": [{"body": "the-sun"}, {"body": "cloud"}, None],
    }


def test_icon_set_resolves_flips_and_leaves_second_names_out(tmp_path: Path) -> None:
    icons = {
        "icons": {"left": {"body": "<path/>", "width": 4}},
        "aliases": {"right": {"parent": "left", "hFlip": True}, "second": {"parent": "left"}},
        **{"width": 8, "height": 8},
    }
    files = {"icons.json": icons, "chars.json": {"1F448": "left"}}
    read = build.read_icon_set(write_package(tmp_path / "p.tgz", files))
    assert set(read.icons) == {"left", "right"}
    assert read.characters == {"1f448": "left"}
    assert 'viewBox="-2 0 8 8"' in build.square_svg(read.icons["left"])  # narrow: centred
    assert 'translate(4 0) scale(-1 1)"><path/>' in build.square_svg(read.icons["right"])


def test_errors_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lacks = write_package(tmp_path / "lacks.tgz", {"icons.json": {}})
    other = write_package(tmp_path / "o.tgz", {"icons.json": {"icons": {}}, "chars.json": {}})
    (tmp_path / "no.tgz").write_bytes(b"not an archive")
    for path, message in (
        (lacks, "has no chars.json"),
        (other, "not an icon set"),
        (tmp_path / "no.tgz", "can't be read"),
    ):
        with pytest.raises(Stopped, match=message) as error:
            build.read_icon_set(path)
        assert "\n" not in str(error.value)

    def fails(url: str, timeout: float) -> None:
        raise OSError(f"no network for {url}")

    monkeypatch.setattr("urllib.request.urlopen", fails)
    packages = tmp_path / "packages"
    with pytest.raises(Stopped, match=r"no network for https://.*/emojibase-data-17\.0\.0\.tgz"):
        build.main(["--out", str(tmp_path / "out"), "--packages", str(packages)])
    assert not list(packages.iterdir())
