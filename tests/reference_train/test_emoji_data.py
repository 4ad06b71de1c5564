"""The emoji shards that ship, and the script that builds them (which downloads; these do not)."""

import io
import json
import re
import sys
import tarfile
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("PIL")
pytest.importorskip("webdataset")
pytest.importorskip("rich")

from PIL import Image, ImageChops, ImageStat

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
    return {style: read_shard(FOLDER / f"{style}.tar.xz") for style in SAMPLES}


@pytest.fixture(scope="module")
def infos(shards: dict[str, Shard]) -> dict[str, list[dict]]:
    return {
        style: [json.loads(sample["json"]) for sample in shard.values()]
        for style, shard in shards.items()
    }


def test_one_shard_per_style():
    assert set(build.STYLES) == set(SAMPLES)
    assert {path.name for path in FOLDER.glob("*.tar*")} == {f"{s}.tar.xz" for s in SAMPLES}


@pytest.mark.parametrize("style", SAMPLES)
def test_counts(infos: dict[str, list[dict]], style: str):
    splits = Counter(info["split"] for info in infos[style])
    counts = tuple(splits[split] for split in ("train", "validation", "test"))
    assert counts == SAMPLES[style]


@pytest.mark.parametrize("style", SAMPLES)
def test_images_are_rgb_pictures_on_white(shards: dict[str, Shard], style: str):
    pictures = set()
    for sample in shards[style].values():
        with Image.open(io.BytesIO(sample["png"])) as image:
            image.load()  # decodes, checksums included
            assert (image.format, image.mode, image.size) == ("PNG", "RGB", (64, 64))
            pictures.add(image.tobytes())
            assert image.getextrema() != ((255, 255),) * 3, "blank"
    assert len(pictures) == len(shards[style]), "two concepts with one picture"


@pytest.mark.parametrize("style", SAMPLES)
def test_captions_and_fields(shards: dict[str, Shard], style: str):
    for key, sample in shards[style].items():
        assert set(sample) == {"json", "png", "txt"}
        info = json.loads(sample["json"])
        assert set(info) == FIELDS
        assert info["concept"] == key
        assert build.bare(key) == build.bare("-".join(f"{ord(c):04X}" for c in info["emoji"]))
        assert info["name"] == sample["txt"].decode()
        assert info["style"] == style
        assert info["split"] == build.split_of(key)
        assert info["keywords"]
        assert all(info["keywords"])


def test_concepts_are_the_same_in_every_style(infos: dict[str, list[dict]]):
    seen: dict[str, dict] = {}
    for info in (info for style in infos.values() for info in style):
        concept = {field: value for field, value in info.items() if field != "style"}
        assert seen.setdefault(info["concept"], concept) == concept
    assert len(seen) == 1597
    assert len({concept["name"] for concept in seen.values()}) == len(seen)
    assert len({concept["group"] for concept in seen.values()}) == 8
    subgroups = {concept["subgroup"] for concept in seen.values()}
    trained = {info["subgroup"] for info in infos["twemoji"] if info["split"] == "train"}
    assert len(subgroups) == 95
    assert trained == subgroups


def test_no_flags_skin_tones_or_near_duplicates(infos: dict[str, list[dict]]):
    for info in (info for style in infos.values() for info in style):
        points = info["concept"].split("-")
        assert not any("1F3FB" <= point <= "1F3FF" and len(point) == 5 for point in points)
        assert not any("1F1E6" <= point <= "1F1FF" and len(point) == 5 for point in points)
        assert info["group"] not in ("flags", "components")
        assert not re.search(r"facing right$|^family:|skin tone|^flag", info["name"]) or (
            info["name"] == "flag in hole"  # golf
        )


def test_splits_are_disjoint_and_of_the_stated_size(infos: dict[str, list[dict]]):
    splits: dict[str, set[str]] = {"train": set(), "validation": set(), "test": set()}
    for info in (info for style in infos.values() for info in style):
        splits[info["split"]].add(info["concept"])
    train, validation, test = splits.values()
    assert not train & validation
    assert not train & test
    assert not validation & test
    total = len(train | validation | test)
    assert len(test) / total == pytest.approx(0.15, abs=0.01)
    assert len(validation) / total == pytest.approx(0.10, abs=0.01)


def test_split_depends_on_the_concept_alone():
    # Written out: a changed hash would move concepts from test to train unseen.
    expected = {
        "1F600": "train",
        "1F603": "train",
        "1F604": "test",
        "1F601": "test",
        "1F60D": "validation",
        "1F636": "validation",
    }
    assert {code: build.split_of(code) for code in expected} == expected


def mean_difference(a: Image.Image, b: Image.Image) -> float:
    return ImageStat.Stat(ImageChops.difference(a, b)).mean[0]


def test_mirrored_alias_is_the_mirror_image(shards: dict[str, Shard]):
    # Fluent's "pointing right" is an alias of "pointing left", flipped.
    for style in ("fluent-emoji-flat", "fluent-emoji", "fluent-emoji-high-contrast"):
        left, right = (
            Image.open(io.BytesIO(shards[style][code]["png"])).convert("L")
            for code in ("1F448", "1F449")
        )
        mirrored = left.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        assert mean_difference(mirrored, right) < 0.5  # of 255: antialiasing
        assert mean_difference(left, right) > 10


def test_webdataset_reads_a_shard_as_it_is():
    wds = pytest.importorskip("webdataset")
    path = FOLDER / "noto-v1.tar.xz"
    samples = list(wds.WebDataset(str(path), shardshuffle=False).decode("pil"))
    assert len(samples) == sum(SAMPLES["noto-v1"])
    assert all(sample["png"].size == (64, 64) for sample in samples)
    assert {sample["txt"] for sample in samples} >= {"grinning face", "red apple"}


# ------------------------------------------------------------------------------------------------
# The script


def make_sample(code: str, shade: int) -> build.Sample:
    concept = build.Concept(code, chr(int(code, 16)), f"name of {code}", ["word"], "group", "kind")
    return build.make_sample(concept, "style", build.stored_png(bytes([shade] * 12), 2, 2))


def test_png_is_what_was_drawn():
    pixels = bytes(range(5 * 3 * 3))
    with Image.open(io.BytesIO(build.stored_png(pixels, width=5, height=3))) as image:
        assert (image.size, image.mode, image.tobytes()) == ((5, 3), "RGB", pixels)


def test_writer_gives_the_same_bytes(tmp_path: Path):
    samples = [make_sample("1F600", 1), make_sample("1F601", 2)]
    build.write_shard(tmp_path / "a.tar.xz", samples)
    build.write_shard(tmp_path / "b.tar.xz", reversed(samples))
    assert (tmp_path / "a.tar.xz").read_bytes() == (tmp_path / "b.tar.xz").read_bytes()
    with tarfile.open(tmp_path / "a.tar.xz") as tar:
        members = tar.getmembers()
    stems = [f"{code}.{suffix}" for code in ("1F600", "1F601") for suffix in ("json", "png", "txt")]
    assert [member.name for member in members] == stems
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in members} == {
        (0, 0, 0, "", "", 0o644)
    }


def test_writer_leaves_the_old_shard_if_it_fails(tmp_path: Path):
    path = tmp_path / "a.tar.xz"
    build.write_shard(path, [make_sample("1F600", 1)])
    before = path.read_bytes()
    broken = make_sample("1F601", 2)._replace(info={"keywords": object()})
    with pytest.raises(TypeError):
        build.write_shard(path, [make_sample("1F600", 3), broken])
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_shared_pictures_are_dropped():
    samples = [make_sample("1F600", 1), make_sample("1F601", 1), make_sample("1F602", 2)]
    assert build.drop_shared_pictures(samples) == samples[2:]


def icon_set(names: list[str], characters: dict[str, str]) -> build.IconSet:
    return build.IconSet({name: {"body": ""} for name in names}, characters, 8, 8)


def test_match_by_character_and_by_the_names_of_the_sister_set():
    def concept(code: str, name: str) -> build.Concept:
        return build.Concept(code, "", name, [], "", "")

    concepts = [concept("2600-FE0F", "sun"), concept("2601", "cloud"), concept("1F449", "to right")]
    sets = {
        "fluent-emoji-flat": icon_set(["the-sun", "to-right"], {"2600": "the-sun"}),
        "fluent-emoji": icon_set(["the-sun", "cloud"], {}),
    }
    assert build.match(concepts, sets) == {
        "fluent-emoji-flat": {"2600-FE0F": "the-sun", "1F449": "to-right"},
        "fluent-emoji": {"2600-FE0F": "the-sun", "2601": "cloud"},
    }


def write_package(path: Path, files: dict[str, object]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            data = json.dumps(content).encode()
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def test_icon_set_resolves_flips_and_leaves_second_names_out(tmp_path: Path):
    icons = {
        "icons": {"left": {"body": "<path/>", "width": 4}},
        "aliases": {
            "right": {"parent": "left", "hFlip": True},
            "second": {"parent": "left"},
        },
        "width": 8,
        "height": 8,
    }
    files = {"icons.json": icons, "chars.json": {"1F448": "left"}}
    package = write_package(tmp_path / "p.tgz", files)
    read = build.read_icon_set(package)
    assert set(read.icons) == {"left", "right"}
    assert read.characters == {"1f448": "left"}
    assert 'viewBox="-2 0 8 8"' in build.to_svg("left", read)  # narrow: centred
    assert 'translate(4 0) scale(-1 1)"><path/>' in build.to_svg("right", read)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"icons.json": {}}, "has no chars.json"),
        ({"icons.json": {"icons": {}}, "chars.json": {}}, "not an icon set"),
        (None, "can't read icons.json"),
    ],
)
def test_wrong_package_is_an_error_of_one_line(
    tmp_path: Path, files: dict[str, object] | None, message: str
):
    path = tmp_path / "p.tgz"
    if files is None:
        path.write_bytes(b"not an archive")
    else:
        write_package(path, files)
    with pytest.raises(Stopped, match=message) as error:
        build.read_icon_set(path)
    assert "\n" not in str(error.value)


def test_a_download_that_does_not_come_is_an_error_of_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    asked = []

    def fails(url: str, timeout: float) -> None:
        asked.append(url)
        raise OSError("no network")

    monkeypatch.setattr("urllib.request.urlopen", fails)
    monkeypatch.setattr(build, "load_renderer", lambda: None)
    with pytest.raises(Stopped, match="no network") as error:
        build.main(["--out", str(tmp_path / "out"), "--packages", str(tmp_path / "packages")])
    assert "\n" not in str(error.value)
    assert asked == ["https://registry.npmjs.org/emojibase-data/-/emojibase-data-17.0.0.tgz"]
    assert not list((tmp_path / "packages").iterdir())


def test_missing_renderer_is_an_error_of_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    with pytest.raises(Stopped, match=r"^resvg_py is not installed: pip install"):
        build.main(["--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
