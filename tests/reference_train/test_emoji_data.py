"""The emoji shards that ship, against their data card."""

import hashlib
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

from PIL import Image

from reference_train.data.emoji import ALL_STYLES, EMOJI_FOLDER

SAMPLES = {  # style -> train, validation, test; the counts of the data card
    "noto": (1189, 152, 253),
    "twemoji": (1190, 153, 254),
    "fluent-emoji-flat": (1168, 149, 248),
    "noto-v1": (827, 113, 179),
    "openmoji": (1160, 149, 248),
    "fluent-emoji": (1171, 150, 248),
    "fluent-emoji-high-contrast": (1152, 149, 242),
}
Shard = dict[str, dict[str, bytes]]  # key -> suffix -> content


def read_shard(path: Path) -> Shard:
    shard: Shard = {}
    with tarfile.open(path, "r|*") as tar:  # as a stream, which is how webdataset reads
        for member in tar:
            key, suffix = member.name.split(".")
            content = tar.extractfile(member)
            assert content is not None
            shard.setdefault(key, {})[suffix] = content.read()
    return shard


@pytest.fixture(scope="module")
def shards() -> dict[str, Shard]:
    assert {p.name for p in EMOJI_FOLDER.glob("*.tar*")} == {f"{s}.tar.xz" for s in SAMPLES}
    assert set(SAMPLES) == set(ALL_STYLES)
    return {style: read_shard(EMOJI_FOLDER / f"{style}.tar.xz") for style in SAMPLES}


def split_of(key: str) -> str:
    """As the data card says."""
    place = int.from_bytes(hashlib.sha256(f"52:{key}".encode()).digest()[:8], "big") / 2**64
    return "test" if place < 0.15 else "validation" if place < 0.25 else "train"


@pytest.mark.parametrize("style", SAMPLES)
def test_samples(shards: dict[str, Shard], style: str) -> None:
    pictures, splits = set(), Counter()
    for key, sample in shards[style].items():
        with Image.open(io.BytesIO(sample["png"])) as image:
            image.load()  # decodes, checksums included
            assert (image.format, image.mode, image.size) == ("PNG", "RGB", (64, 64))
            pictures.add(image.tobytes())
            assert image.getextrema() != ((255, 255),) * 3, "blank"
        info = json.loads(sample["json"])
        assert (info["concept"], info["style"]) == (key, style)
        code = "-".join(f"{ord(c):04X}" for c in info["emoji"])
        assert key.replace("-FE0F", "") == code.replace("-FE0F", "")
        assert info["name"] == sample["txt"].decode()
        assert info["split"] == split_of(key)
        assert all(info["keywords"]) == bool(info["keywords"]) is True
        splits[info["split"]] += 1
    assert len(pictures) == len(shards[style]), "two concepts with one picture"
    assert tuple(splits[split] for split in ("train", "validation", "test")) == SAMPLES[style]


def test_concepts(shards: dict[str, Shard]) -> None:
    """They are the same in every style, and none is a flag, a skin tone or a near-duplicate."""
    seen: dict[str, dict[str, Any]] = {}
    for info in (json.loads(s["json"]) for shard in shards.values() for s in shard.values()):
        concept = {field: value for field, value in info.items() if field != "style"}
        assert seen.setdefault(info["concept"], concept) == concept
    assert len(seen) == len({concept["name"] for concept in seen.values()}) == 1597
    subgroups = {concept["subgroup"] for concept in seen.values()}
    trained = {c["subgroup"] for c in seen.values() if c["split"] == "train"}
    assert (len(subgroups), trained) == (95, subgroups)
    for code, concept in seen.items():
        assert not re.search(r"\b1F3F[B-F]\b|\b1F1[EF]", code)
        assert not re.search(r"facing right$|^family:|skin tone|^flag(?! in hole)", concept["name"])
