"""Reads pairs of images and captions, gives them ids, and splits them into parts by their texts."""

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from webdataset.shardlists import expand_urls

from ..command_line import UsageError
from ..data.emoji import SHIFT_STYLES, TRAIN_STYLES, Concept, read_emoji
from ..evaluate.datasets import Images, TarImages, Unusable

SPLIT_SEED = 0
MOST_TEST_PAIRS, MOST_VALIDATION_PAIRS = 5000, 2000


@dataclass
class Pairs:
    """Pairs as rows of numbers. A text may stand in several rows, and so may an image."""

    images: Images  # distinct files
    texts: list[str]  # distinct, except for spaces and capitals
    rows: np.ndarray  # (n, 2) int64: the index of the image, and that of the text
    is_test: np.ndarray  # (n,) bool: pairs that were given to test on


def read(data: Sequence[str], test: Sequence[str]) -> Pairs:
    """The pairs of CSV files and tar files. test: files of pairs to test on; may be empty.

    Raises `UsageError` if a file can't be read, or no file has pairs.
    """
    images: dict[Any, int] = {}
    keys: dict[str, int] = {}
    texts: list[str] = []
    rows, is_test = [], []
    for files, are_tests in ((data, False), (test, True)):
        for file in (Path(name) for pattern in files for name in expand_urls(pattern)):
            for place, text in read_csv(file) if file.suffix == ".csv" else read_tar(file):
                words = text.split()
                if not words:
                    continue
                number = keys.setdefault(" ".join(words).casefold(), len(texts))
                if number == len(texts):
                    texts.append(text)
                rows.append((images.setdefault(place, len(images)), number))
                is_test.append(are_tests)
    if not rows:
        raise UsageError(f"--data {' '.join(data)}: has no images with captions")
    return Pairs(Images([*images]), texts, np.array(rows), np.array(is_test))


def read_csv(file: Path) -> Iterator[tuple[Any, str]]:
    """The place of each image, and its caption: the first two columns. A heading is left out."""
    try:
        with file.open(newline="", encoding="utf-8") as opened:
            for number, line in enumerate(csv.reader(opened)):
                if len(line) < 2:
                    raise UsageError(f"{file}: line {number + 1} has no path and caption")
                path = file.parent / line[0]
                is_file = path.is_file()
                if number or is_file:
                    yield (path, "", 0, path.stat().st_size if is_file else 0), line[1]
    except (OSError, ValueError, csv.Error) as error:
        raise UsageError(f"{file}: can't be read: {error}") from error


def read_tar(file: Path) -> Iterator[tuple[Any, str]]:
    """The place of each image in a tar file, and its captions: the lines of its text."""
    try:
        samples = TarImages([file]).samples
    except (Unusable, ValueError) as error:
        raise UsageError(f"{file}: can't be read: {error}") from error
    for sample in samples:
        for text in sample.get("txt", "").splitlines():
            yield sample["image"], text


def read_shipped() -> Pairs:
    """The emoji of the repository. The test pairs show concepts of split `test` in new styles."""
    emoji = read_emoji()
    trained = emoji.in_split("train") + emoji.in_split("validation")
    pixels: list[torch.Tensor] = []
    texts: dict[str, int] = {}
    rows, is_test = [], []
    for styles, concepts in ((TRAIN_STYLES, trained), (SHIFT_STYLES, emoji.in_split("test"))):
        images, shown, _ = emoji.drawings(styles, concepts)
        first = sum(len(x) for x in pixels)
        for image, concept in enumerate(shown.tolist(), start=first):
            own = captions(emoji.concepts[concept])
            for text in own[:1] if styles == SHIFT_STYLES else own:
                rows.append((image, texts.setdefault(text, len(texts))))
                is_test.append(styles == SHIFT_STYLES)
        pixels.append(images)
    return Pairs(Images(torch.cat(pixels)), [*texts], np.array(rows), np.array(is_test))


def captions(concept: Concept) -> list[str]:
    """The captions of a drawing. The first is its name."""
    name, words = concept.name, ", ".join(concept.keywords[:3])
    return [
        name,
        f"a drawing of {name}",
        f"{name}, a kind of {concept.subgroup}",
        f"{name}, {words}",
    ]


def same_ids(rows: np.ndarray) -> np.ndarray:
    """An id for each pair, (n,): pairs that share an image or a text, or are linked by others that
    do, have the same.
    """
    images, texts = rows.max(axis=0) + 1
    nodes = images + texts
    edges = coo_array((np.ones(len(rows)), (rows[:, 0], images + rows[:, 1])), (nodes, nodes))
    ids: np.ndarray = connected_components(edges, directed=False)[1][rows[:, 0]]
    return ids.astype(np.int64)


def split(ids: np.ndarray, is_test: np.ndarray) -> dict[str, np.ndarray]:
    """The rows to train on, for validation, and to test on. No two parts have a common id.

    Without test pairs a tenth of all pairs is for the test: at least 1,000 if a quarter is as many,
    and at most 5,000. As many, but at most 2,000, are for validation. Raises `UsageError` if a part
    is empty.
    """
    rng, count = np.random.default_rng(SPLIT_SEED), int((~is_test).sum())
    wanted = min(max(count // 10, min(count // 4, 1000)), MOST_TEST_PAIRS)
    if is_test.any():
        test = choose(ids, is_test, MOST_TEST_PAIRS, rng)
    else:
        test = choose(ids, ~is_test, wanted, rng)
    rest = ~np.isin(ids, ids[test | is_test])
    validation = choose(ids, rest, min(wanted, MOST_VALIDATION_PAIRS), rng)
    parts = {"train": rest & ~validation, "validation": validation, "test": test}
    if empty := [name for name, part in parts.items() if not part.any()]:
        why = "too few, or too many of them are linked by common images and texts"
        raise UsageError(f"{count:,} pairs can't be split, and the {empty[0]} part is empty: {why}")
    return {name: part.nonzero()[0] for name, part in parts.items()}


def choose(
    ids: np.ndarray, candidates: np.ndarray, wanted: int, rng: np.random.Generator
) -> np.ndarray:
    """Which of the candidates are chosen, (n,) bool: all of an id or none, up to `wanted` pairs.

    An id that has more than half as many pairs is not chosen.
    """
    found, sizes = np.unique(ids[candidates], return_counts=True)
    order = rng.permutation((sizes <= max(1, wanted / 2)).nonzero()[0])
    chosen = order[np.cumsum(sizes[order]) <= wanted]
    is_chosen: np.ndarray = candidates & np.isin(ids, found[chosen])
    return is_chosen
