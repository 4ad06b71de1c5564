"""The emoji that ship: pictures, concepts, the split of the data card, and questions about them."""

import hashlib
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from processes import ROOT

from reference_train.data import emoji
from reference_train.data.emoji import ALL_STYLES, BLACK_AND_WHITE, EMOJI_FOLDER
from reference_train.data.samples import Sample, read_samples
from reference_train.demo import datasets, demo
from reference_train.evaluate import report
from reference_train.evaluate.datasets import Dataset, open_emoji


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


def test_every_subgroup_has_concepts_to_train_on(concepts) -> None:
    trained = {c["subgroup"] for c in concepts.values() if c["split"] == "train"}
    assert len(trained) == len({c["subgroup"] for c in concepts.values()}) == 95


def test_concepts_are_split_by_the_rule_of_the_data_card(concepts) -> None:
    for key, concept in concepts.items():
        fraction = int.from_bytes(hashlib.sha256(f"52:{key}".encode()).digest()[:8], "big") / 2**64
        split = "test" if fraction < 0.15 else "validation" if fraction < 0.25 else "train"
        assert concept["split"] == split


def test_no_concept_is_a_variant_of_another_one_and_each_has_keywords(concepts) -> None:
    """No skin tones, families, flags of countries, or second directions."""
    for key, concept in concepts.items():
        assert concept["keywords"]
        assert all(concept["keywords"])
        assert not re.search(r"\b1F3F[B-F]\b|\b1F1[EF]", key)
        assert not re.search(r"facing right$|^family:|skin tone|^flag(?! in hole)", concept["name"])


@pytest.fixture(scope="module")
def without_pictures(shipped: dict[str, list[Sample]]):
    """Lets the shipped emoji be read from memory, with pictures of one pixel."""

    def read_again(shards: list[str]) -> list[Sample]:
        return shipped[Path(shards[0]).name.removesuffix(".tar.xz")]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(emoji, "read_samples", read_again)
        patch.setattr(emoji, "decode", lambda *_: np.zeros((3, 1, 1), np.uint8))
        yield


@pytest.fixture(scope="module")
def evaluated(without_pictures: None) -> Dataset:
    """The data set of the emoji, as `evaluate` opens it."""
    return open_emoji()


def test_all_shipped_emoji_are_evaluated_with_their_names(evaluated: Dataset) -> None:
    names = evaluated.classes[""]
    assert [[names.names[concept]] for concept in names.labels.tolist()] == evaluated.captions
    assert len(evaluated.images) == len(evaluated.groups) == 10_544


def test_the_superclass_of_a_name_is_its_subgroup(evaluated: Dataset) -> None:
    names, subgroups = evaluated.classes[""], evaluated.classes["subgroup"]
    assert torch.equal(names.superclass[names.labels], subgroups.labels)


def test_black_and_white_is_left_out_of_the_mean_over_styles(evaluated: Dataset) -> None:
    assert set(evaluated.groups) - evaluated.excluded_groups == {*ALL_STYLES} - {*BLACK_AND_WHITE}


def record(name: str) -> dict:
    return json.loads((ROOT / "reference_train" / "results" / name).read_text())


def test_the_recorded_results_have_the_settings_of_their_preset() -> None:
    assert demo.PRESETS["short"].items() <= record("short/evaluation.json")["settings"].items()
    assert demo.PRESETS["long"].items() <= record("long/evaluation.json")["settings"].items()


def test_the_demonstration_asks_about_the_recorded_concepts(without_pictures: None) -> None:
    """They leave out the quarter of the trained concepts on which settings were chosen."""
    recorded = record("short/evaluation.json")["data_sets"]
    shipped = emoji.read_emoji()
    for name in datasets.DATASETS:
        assert recorded[name] == report.describe(datasets.open_dataset(shipped, name))
