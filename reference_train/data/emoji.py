"""The emoji that ship in `emoji/`: about 1,600 concepts, each drawn in several styles."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .samples import decode, read_samples

EMOJI_FOLDER = Path(__file__).parents[1] / "emoji"
TRAIN_STYLES = ("noto", "twemoji", "fluent-emoji-flat")
SHIFT_STYLES = ("noto-v1", "openmoji", "fluent-emoji")  # never trained on
STRESS_STYLES = ("fluent-emoji-high-contrast",)  # black and white: in no mean
ALL_STYLES = TRAIN_STYLES + SHIFT_STYLES + STRESS_STYLES
SIZE = 64  # pixels


class Concept(NamedTuple):
    """What an emoji depicts, in any style."""

    code: str  # Unicode code points: "1F600"
    name: str
    keywords: tuple[str, ...]
    group: str
    subgroup: str
    split: str  # train, validation or test


@dataclass
class EmojiSet:
    """The emoji of all styles, in memory."""

    concepts: list[Concept]
    images: Tensor  # (n, 3, 64, 64) uint8
    concept: Tensor  # (n,) the concept of each image, an index into `concepts`
    styles: list[str]  # of each image

    def in_split(self, split: str) -> list[int]:
        """The concepts of a split, as indices."""
        return [i for i, concept in enumerate(self.concepts) if concept.split == split]

    def drawings(
        self, styles: Sequence[str], concepts: Sequence[int]
    ) -> tuple[Tensor, Tensor, list[str]]:
        """All images of some concepts in some styles, with the concept and style of each image."""
        has_style = torch.tensor([style in styles for style in self.styles])
        has_concept = torch.isin(self.concept, torch.tensor(concepts))
        chosen = (has_style & has_concept).nonzero()[:, 0]
        chosen_styles = [self.styles[i] for i in chosen.tolist()]
        return self.images[chosen], self.concept[chosen], chosen_styles


def read_emoji(folder: Path = EMOJI_FOLDER) -> EmojiSet:
    """Decodes a folder of emoji shards, one for each style.

    Raises `CannotStart` if a shard can't be read.
    """
    concepts: dict[Concept, int] = {}
    images, concept_of_image, styles = [], [], []
    for style in ALL_STYLES:
        for _, image, name, info in read_samples([str(folder / f"{style}.tar.xz")]):
            concept = Concept(
                code=info["concept"],
                name=name,
                keywords=tuple(info["keywords"]),
                group=info["group"],
                subgroup=info["subgroup"].replace("-", " "),
                split=info["split"],
            )
            concept_of_image.append(concepts.setdefault(concept, len(concepts)))
            images.append(decode(image, SIZE))
            styles.append(style)
    pixels = torch.from_numpy(np.stack(images))
    return EmojiSet(list(concepts), pixels, torch.tensor(concept_of_image), styles)
