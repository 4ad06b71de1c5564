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
STRESS_STYLES = ("fluent-emoji-high-contrast",)  # black and white: outside every mean
ALL_STYLES = TRAIN_STYLES + SHIFT_STYLES + STRESS_STYLES
SIZE = 64  # pixels


class Concept(NamedTuple):
    """What an emoji depicts, whatever the style."""

    code: str  # Unicode code points: "1F600"
    name: str
    keywords: tuple[str, ...]
    group: str
    subgroup: str
    split: str  # train, validation or test


@dataclass
class EmojiSet:
    """All styles, in memory."""

    concepts: list[Concept]
    images: Tensor  # (n, 3, 64, 64) uint8
    concept: Tensor  # (n,) which concept each image draws
    styles: list[str]  # of each image

    def in_split(self, split: str) -> list[int]:
        """The concepts of a split, as indices."""
        return [i for i, concept in enumerate(self.concepts) if concept.split == split]

    def drawings(
        self, styles: Sequence[str], concepts: Sequence[int]
    ) -> tuple[Tensor, Tensor, list[str]]:
        """All images of some concepts in some styles; of each its concept, and its style."""
        of_styles = torch.tensor([style in styles for style in self.styles])
        rows = (of_styles & torch.isin(self.concept, torch.tensor(concepts))).nonzero()[:, 0]
        return self.images[rows], self.concept[rows], [self.styles[row] for row in rows.tolist()]


def read_emoji(folder: Path = EMOJI_FOLDER) -> EmojiSet:
    """Decodes all styles of a folder of emoji shards; raises `CannotStart` if one is not whole."""
    concepts: dict[Concept, int] = {}
    images, drawn, styles = [], [], []
    for style in ALL_STYLES:
        for _, image, name, info in read_samples([str(folder / f"{style}.tar.xz")]):
            kind, split = info["subgroup"].replace("-", " "), info["split"]
            keywords = tuple(info["keywords"])
            concept = Concept(info["concept"], name, keywords, info["group"], kind, split)
            drawn.append(concepts.setdefault(concept, len(concepts)))
            images.append(decode(image, SIZE))
            styles.append(style)
    pixels = torch.from_numpy(np.stack(images))
    return EmojiSet(list(concepts), pixels, torch.tensor(drawn), styles)
