"""The emoji shards that ship, against their data card."""

import hashlib
import io
import json
import re
import tarfile
from typing import Any

import pytest

pytest.importorskip("PIL")
pytest.importorskip("webdataset")

from PIL import Image

from reference_train.data.emoji import ALL_STYLES, EMOJI_FOLDER

Shard = dict[str, dict[str, bytes]]  # key -> suffix -> content


@pytest.fixture(scope="module")
def shards() -> dict[str, Shard]:
    found: dict[str, Shard] = {}
    for path in EMOJI_FOLDER.glob("*.tar*"):
        shard = found.setdefault(path.name.removesuffix(".tar.xz"), {})
        with tarfile.open(path, "r|*") as tar:  # as a stream, which is how webdataset reads
            for member in tar:
                key, suffix = member.name.split(".")
                shard.setdefault(key, {})[suffix] = tar.extractfile(member).read()  # type: ignore[union-attr]
    assert set(found) == set(ALL_STYLES)
    return found


def split_of(key: str) -> str:
    """As the data card says."""
    place = int.from_bytes(hashlib.sha256(f"52:{key}".encode()).digest()[:8], "big") / 2**64
    return "test" if place < 0.15 else "validation" if place < 0.25 else "train"


@pytest.mark.parametrize("style", ALL_STYLES)
def test_samples(shards: dict[str, Shard], style: str) -> None:
    pictures = set()
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
    assert len(pictures) == len(shards[style]), "two concepts with one picture"


def test_concepts(shards: dict[str, Shard]) -> None:
    """They are the same in every style, and none is a flag, a skin tone or a near-duplicate."""
    assert sum(map(len, shards.values())) == 10_544
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
