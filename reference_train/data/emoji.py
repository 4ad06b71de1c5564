"""The emoji that ship in `emoji/`: about 1,600 concepts, each drawn in several styles."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import CannotStart
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
    images: dict[str, Tensor]  # style -> (n, 3, 64, 64) uint8
    concept: dict[str, Tensor]  # style -> (n,) which concept each image draws

    def in_split(self, split: str) -> list[int]:
        """The concepts of a split, as indices."""
        return [i for i, concept in enumerate(self.concepts) if concept.split == split]


def read_emoji(folder: Path = EMOJI_FOLDER) -> EmojiSet:
    """Decodes all styles of a folder of emoji shards; raises `CannotStart` if one is not whole."""
    emoji = EmojiSet([], {}, {})
    index: dict[str, int] = {}
    for style in ALL_STYLES:
        images, rows = [], []
        for sample in read_samples([str(folder / f"{style}.tar.xz")]):
            info = sample.info
            code = info["concept"]
            if code not in index:
                index[code] = len(emoji.concepts)
                emoji.concepts.append(
                    Concept(
                        code,
                        sample.caption,
                        tuple(info["keywords"]),
                        info["group"],
                        info["subgroup"].replace("-", " "),
                        info["split"],
                    )
                )
            images.append(decode(sample.image, SIZE))
            rows.append(index[code])
        if not images:
            raise CannotStart(f"{folder}/{style}.tar.xz holds no image with a caption")
        emoji.images[style] = torch.from_numpy(np.stack(images))
        emoji.concept[style] = torch.tensor(rows)
    return emoji


def fingerprint(folder: Path = EMOJI_FOLDER) -> str:
    """A name for exactly these shards: a model may have trained on what others hold out."""
    digest = hashlib.sha256()
    for style in ALL_STYLES:
        digest.update((folder / f"{style}.tar.xz").read_bytes())
    return f"emoji-{digest.hexdigest()[:12]}"
