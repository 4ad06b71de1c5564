"""The emoji that ship: pictures, concepts, and the split of the data card."""

import hashlib
import io
import re

import pytest
from PIL import Image

from reference_train.data.emoji import ALL_STYLES, EMOJI_FOLDER
from reference_train.data.samples import Sample, read_samples


@pytest.fixture(scope="module")
def shipped() -> dict[str, list[Sample]]:
    """The samples of each style."""
    return {s: list(read_samples([str(EMOJI_FOLDER / f"{s}.tar.xz")])) for s in ALL_STYLES}


@pytest.fixture(scope="module")
def concepts(shipped: dict[str, list[Sample]]) -> dict[str, dict]:
    """What the samples say about each concept, without the style."""
    found = dict[str, dict]()
    for samples in shipped.values():
        for sample in samples:
            info = {name: value for name, value in sample.info.items() if name != "style"}
            found.setdefault(sample.key, info)
    return found


def test_pictures_of_a_style_are_64_pixels_wide_and_all_different(shipped) -> None:
    for samples in shipped.values():
        pictures = [Image.open(io.BytesIO(sample.image)) for sample in samples]
        assert {(p.format, p.mode, p.size) for p in pictures} == {("PNG", "RGB", (64, 64))}
        assert len({picture.tobytes() for picture in pictures}) == len(samples)


def test_a_concept_is_the_same_in_every_style(shipped, concepts) -> None:
    assert len(concepts) == 1597
    for style, samples in shipped.items():
        for key, _, caption, info in samples:
            assert (info["style"], info["concept"], info["name"]) == (style, key, caption)
            assert info == {**concepts[key], "style": style}


def test_every_subgroup_is_trained_on(concepts) -> None:
    trained = {c["subgroup"] for c in concepts.values() if c["split"] == "train"}
    assert len(trained) == len({c["subgroup"] for c in concepts.values()}) == 95


def test_concepts_are_split_by_the_rule_of_the_data_card(concepts) -> None:
    for key, concept in concepts.items():
        place = int.from_bytes(hashlib.sha256(f"52:{key}".encode()).digest()[:8], "big") / 2**64
        split = "test" if place < 0.15 else "validation" if place < 0.25 else "train"
        assert concept["split"] == split


def test_no_concept_is_a_variant_of_another_one_and_each_has_keywords(concepts) -> None:
    """No skin tones, families, flags of countries, or second directions."""
    for key, concept in concepts.items():
        assert concept["keywords"]
        assert all(concept["keywords"])
        assert not re.search(r"\b1F3F[B-F]\b|\b1F1[EF]", key)
        assert not re.search(r"facing right$|^family:|skin tone|^flag(?! in hole)", concept["name"])
