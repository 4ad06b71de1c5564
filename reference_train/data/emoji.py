"""The emoji that ship in `emoji/`: about 1,600 concepts, each drawn in several styles."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .samples import decode, read_samples

EMOJI_FOLDER = Path(__file__).parents[1] / "emoji"
TRAIN_STYLES = ("noto", "twemoji", "fluent-emoji-flat")
SHIFT_STYLES = ("noto-v1", "openmoji", "fluent-emoji")  # never trained on
BLACK_AND_WHITE = ("fluent-emoji-high-contrast",)
ALL_STYLES = TRAIN_STYLES + SHIFT_STYLES + BLACK_AND_WHITE
SIZE = 64  # pixels
# Captions with a concept's name, or with its subgroup.
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
SUBGROUP_TEMPLATES = ("{}", "a kind of {}", "a drawing of {}", "an emoji of {}")


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
    image_concepts: Tensor  # (n,) int64, the concept of each image as an index into `concepts`
    image_styles: list[str]  # the style of each image

    def in_split(self, split: str) -> list[int]:
        """The concepts of a split, as indices into `concepts`."""
        return [i for i, concept in enumerate(self.concepts) if concept.split == split]

    def drawings(
        self, styles: Sequence[str], concepts: Sequence[int]
    ) -> tuple[Tensor, Tensor, list[str]]:
        """The images of these concepts in these styles, and the concept and style of each image."""
        has_style = torch.tensor([style in styles for style in self.image_styles])
        has_concept = torch.isin(self.image_concepts, torch.tensor(concepts))
        chosen = (has_style & has_concept).nonzero()[:, 0]
        chosen_styles = [self.image_styles[i] for i in chosen.tolist()]
        return self.images[chosen], self.image_concepts[chosen], chosen_styles


@cache  # each dataset and each checkpoint of `evaluate` asks for them
def read_emoji(folder: Path = EMOJI_FOLDER) -> EmojiSet:
    """Decodes a folder of emoji shards, one for each style, once in a process.

    Raises `UsageError` if a shard can't be read.
    """
    concepts: dict[Concept, int] = {}
    images, image_concepts, image_styles = [], [], []
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
            image_concepts.append(concepts.setdefault(concept, len(concepts)))
            images.append(decode(image, SIZE))
            image_styles.append(style)
    pixels = torch.from_numpy(np.stack(images))
    return EmojiSet(list(concepts), pixels, torch.tensor(image_concepts), image_styles)
