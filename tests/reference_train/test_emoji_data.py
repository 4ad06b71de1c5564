"""The emoji shards that ship, against their data card."""

import hashlib
import io
import re
from itertools import chain

import pytest
from PIL import Image

from reference_train.data.emoji import ALL_STYLES, EMOJI_FOLDER
from reference_train.data.samples import Sample, read_samples


@pytest.fixture(scope="module")
def shards() -> dict[str, list[Sample]]:
    paths = {path.name.removesuffix(".tar.xz"): path for path in EMOJI_FOLDER.glob("*.tar*")}
    assert set(paths) == set(ALL_STYLES)
    return {style: list(read_samples([str(path)])) for style, path in paths.items()}


def split_of(key: str) -> str:
    """As the data card says."""
    place = int.from_bytes(hashlib.sha256(f"52:{key}".encode()).digest()[:8], "big") / 2**64
    return "test" if place < 0.15 else "validation" if place < 0.25 else "train"


@pytest.mark.parametrize("style", ALL_STYLES)
def test_samples(shards: dict[str, list[Sample]], style: str) -> None:
    pictures = set()
    for key, png, caption, info in shards[style]:
        with Image.open(io.BytesIO(png)) as image:
            image.load()  # decodes, checksums included
            assert (image.format, image.mode, image.size) == ("PNG", "RGB", (64, 64))
            pictures.add(image.tobytes())
            assert image.getextrema() != ((255, 255),) * 3, "blank"
        assert (info["concept"], info["style"]) == (key, style)
        code = "-".join(f"{ord(c):04X}" for c in info["emoji"])
        assert key.replace("-FE0F", "") == code.replace("-FE0F", "")
        assert info["name"] == caption
        assert info["split"] == split_of(key)
        assert all(info["keywords"]) == bool(info["keywords"]) is True
    assert len(pictures) == len(shards[style]), "two concepts with one picture"


def test_concepts(shards: dict[str, list[Sample]]) -> None:
    """They are the same in every style, and none is a flag, a skin tone or a near-duplicate."""
    assert sum(map(len, shards.values())) == 10_544
    seen: dict[str, dict] = {}
    for _, _, _, info in chain.from_iterable(shards.values()):
        concept = {field: value for field, value in info.items() if field != "style"}
        assert seen.setdefault(info["concept"], concept) == concept
    assert len(seen) == len({concept["name"] for concept in seen.values()}) == 1597
    subgroups = {concept["subgroup"] for concept in seen.values()}
    trained = {c["subgroup"] for c in seen.values() if c["split"] == "train"}
    assert (len(subgroups), trained) == (95, subgroups)
    for code, concept in seen.items():
        assert not re.search(r"\b1F3F[B-F]\b|\b1F1[EF]", code)
        assert not re.search(r"facing right$|^family:|skin tone|^flag(?! in hole)", concept["name"])
