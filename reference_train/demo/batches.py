"""What a training batch is, and what it never holds."""

import os
import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from braceexpand import braceexpand
from torch import Tensor

from ..data.emoji import TRAIN_STYLES, Concept, EmojiSet
from ..data.samples import Sample, decode, read_samples
from ..errors import CannotStart
from .ranks import WHOLE, Part

# What a caption is: half of them a name in a template, a quarter name and kind, 15 % the kind
# alone, 10 % keywords (CAPTION_SHARES, in the order of `captions_of`).
NAME_TEMPLATES = (
    "{}",
    "{}",
    "a drawing of {}",
    "a picture of {}",
    "an emoji of {}",
    "an icon of {}",
    "the {} emoji",
    "a small drawing of {}",
)
KIND_TEMPLATES = ("{}, a kind of {}",)
SUBGROUP_TEMPLATES = ("{}", "a kind of {}", "a drawing of {}", "an emoji of {}")
KEYWORD_CAPTIONS = 4  # drawn once for each concept: up to three keywords, in random order
CAPTION_SHARES = (0.50, 0.25, 0.15, 0.10)


def captions_of(concept: Concept) -> list[list[str]]:
    """All captions training may show for a concept: one list for each of `CAPTION_SHARES`."""
    rng = random.Random(concept.code)
    keywords = concept.keywords or (concept.name,)
    return [
        [template.format(concept.name) for template in NAME_TEMPLATES],
        [template.format(concept.name, concept.subgroup) for template in KIND_TEMPLATES],
        [template.format(concept.subgroup) for template in SUBGROUP_TEMPLATES],
        [", ".join(rng.sample(keywords, min(3, len(keywords)))) for _ in range(KEYWORD_CAPTIONS)],
    ]


class Position(NamedTuple):
    """Where in the data a batch starts."""

    epoch: int = 0
    offset: int = 0  # emoji: batches of the epoch; streamed: samples read in the epoch


class Batch(NamedTuple):
    """N distinct concepts, an image and a caption of each; or this rank's part of them."""

    images: Tensor  # (n, 3, S, S) uint8
    tokens: Tensor  # (n, L)
    next: Position


Tokenize = Callable[[list[str]], Tensor]


def as_asked(batch_size: int, part: Part) -> str:
    """The batch of all ranks as the command line has it, for a message."""
    ranks = f" on each of {part.world_size} ranks" if part.world_size > 1 else ""
    return f"--batch-size {batch_size // part.world_size}{ranks}"


class EmojiBatches:
    """Endless batches of distinct training concepts, a random training style and caption each."""

    def __init__(
        self,
        emoji: EmojiSet,
        tokenize: Tokenize,
        batch_size: int,
        seed: int,
        part: Part = WHOLE,
    ):
        """batch_size: of all ranks. Raises `CannotStart` if there are too few concepts for it."""
        drawn = {int(i) for style in TRAIN_STYLES for i in emoji.concept[style]}
        self.concepts = [i for i in emoji.in_split("train") if i in drawn]
        self.batch_size, self.seed, self.part = batch_size, seed, part
        if len(self.concepts) < batch_size:
            raise CannotStart(
                f"{as_asked(batch_size, part)} is more than the {len(self.concepts)} distinct "
                "concepts to train on"
            )
        # (concepts, styles) -> row of `images`; a style that lacks a concept repeats another's row
        self.images = torch.cat([emoji.images[style] for style in TRAIN_STYLES])
        rows: dict[int, list[int]] = {}
        owners = torch.cat([emoji.concept[style] for style in TRAIN_STYLES]).tolist()
        for row, concept in enumerate(owners):
            rows.setdefault(concept, []).append(row)
        styles = len(TRAIN_STYLES)
        self.rows = np.array([(rows[i] * styles)[:styles] for i in self.concepts])
        # (concepts, captions, L): every caption is tokenised once, here
        captions = [captions_of(emoji.concepts[i]) for i in self.concepts]
        flat = [text for kinds in captions for kind in kinds for text in kind]
        self.tokens = tokenize(flat).view(len(captions), -1, tokenize([""]).shape[1])
        counts = [len(kind) for kind in captions[0]]
        shares = [[share / n] * n for share, n in zip(CAPTION_SHARES, counts, strict=True)]
        self.caption_shares = np.cumsum(np.concatenate(shares))

    def batches(self, start: Position) -> Iterator[Batch]:
        """Each epoch is a new order of the concepts; its last incomplete batch is dropped."""
        epoch, index = start
        n = self.batch_size
        while True:
            order = np.random.default_rng([self.seed, epoch]).permutation(len(self.concepts))
            while (index + 1) * n <= len(order):
                rng = np.random.default_rng([self.seed, epoch, index])
                which = order[index * n : (index + 1) * n]
                rows = self.rows[which, rng.integers(self.rows.shape[1], size=n)]
                caption = np.searchsorted(self.caption_shares[:-1], rng.random(n), side="right")
                index += 1
                mine = self.part.rows(n)
                images = self.images[torch.from_numpy(rows[mine])]
                tokens = self.tokens[which[mine], caption[mine]]
                yield Batch(images, tokens, Position(epoch, index))
            epoch, index = epoch + 1, 0


class StreamedBatches:
    """Endless batches of distinct captions from tar files of any size, decoded one batch ahead."""

    def __init__(
        self,
        shards: list[str],
        tokenize: Tokenize,
        batch_size: int,
        size: int,
        seed: int,
        part: Part = WHOLE,
    ):
        """batch_size: of all ranks. size: of the decoded images.

        Raises `CannotStart` if a batch can't be filled.
        """
        self.shards, self.tokenize, self.size = shards, tokenize, size
        self.batch_size, self.seed, self.part = batch_size, seed, part
        if next(self._groups(Position()), None) is None:
            raise CannotStart(f"{as_asked(batch_size, part)}: the data has fewer distinct captions")

    def _groups(self, start: Position) -> Iterator[tuple[list[Sample], Position]]:
        """Undecoded batches; each epoch shuffles shards and samples anew and drops its last few."""
        epoch, read = start
        while True:
            rng = random.Random(f"{self.seed}-{epoch}")
            shards = rng.sample(self.shards, len(self.shards))
            group: dict[str, Sample] = {}  # by caption
            full_batches = read > 0
            for number, sample in enumerate(read_samples(shards, shuffle=rng), start=1):
                if number <= read:  # a resumed run
                    continue
                group.setdefault(sample.caption, sample)
                if len(group) == self.batch_size:
                    yield list(group.values()), Position(epoch, number)
                    group, full_batches = {}, True
            if not full_batches:
                return
            epoch, read = epoch + 1, 0

    def batches(self, start: Position) -> Iterator[Batch]:
        """Like `EmojiBatches.batches`, as far as a shuffle buffer can shuffle."""
        with ThreadPoolExecutor(os.cpu_count()) as pool:

            def finish(images: list[Any], samples: list[Sample], after: Position) -> Batch:
                decoded = torch.from_numpy(np.stack([image.result() for image in images]))
                return Batch(decoded, self.tokenize([s.caption for s in samples]), after)

            waiting = None
            for samples, after in self._groups(start):
                samples = samples[self.part.rows(self.batch_size)]
                images = [pool.submit(decode, sample.image, self.size) for sample in samples]
                if waiting is not None:
                    yield finish(*waiting)
                waiting = (images, samples, after)


def find_shards(data: Sequence[str]) -> list[str]:
    """--data as the user gave it (tar files, brace patterns, folders) -> tar files that exist."""
    shards = []
    for pattern in data:
        if Path(pattern).is_dir():
            found = sorted(str(path) for path in Path(pattern).glob("*.tar*"))
            if not found:
                raise CannotStart(f"--data: no tar file in {pattern}")
            shards += found
        else:
            shards += list(braceexpand(pattern))
    for shard in shards:
        if not Path(shard).is_file():
            raise CannotStart(f"--data: no such shard: {shard}")
        if next(read_samples([shard]), None) is None:
            raise CannotStart(f"--data: {shard} holds no image with a caption")
    return shards
