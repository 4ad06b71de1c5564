"""What a training batch is, and what it never holds.

A batch is N *distinct* concepts of split `train`, each in one of the training styles: the same
emoji in another style would be a false negative of the contrastive loss. A batch depends on the
seed and the step alone, so a resumed run sees what an uninterrupted one would have seen.
"""

import random
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ..data.emoji import TRAIN_STYLES, Concept, EmojiSet
from ..errors import CannotStart

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


class EmojiBatches:
    """Batches of distinct training concepts, a random training style and caption each."""

    def __init__(
        self,
        emoji: EmojiSet,
        tokenize: Callable[[list[str]], Tensor],
        batch_size: int,
        seed: int,
    ):
        """Raises `CannotStart` if there are too few concepts for a batch."""
        # (concepts, styles) -> row of `images`; a style that lacks a concept repeats another's row
        self.images = torch.cat([emoji.images[style] for style in TRAIN_STYLES])
        owners = torch.cat([emoji.concept[style] for style in TRAIN_STYLES]).tolist()
        rows: dict[int, list[int]] = {}
        for row, concept in enumerate(owners):
            rows.setdefault(concept, []).append(row)
        concepts = [i for i in emoji.in_split("train") if i in rows]
        if len(concepts) < batch_size:
            raise CannotStart(
                f"--batch-size {batch_size} is more than the {len(concepts)} distinct concepts "
                "to train on"
            )
        styles = len(TRAIN_STYLES)
        self.rows = np.array([(rows[i] * styles)[:styles] for i in concepts])
        # (concepts, captions, L): every caption is tokenised once, here
        captions = [captions_of(emoji.concepts[i]) for i in concepts]
        flat = [text for kinds in captions for kind in kinds for text in kind]
        tokens = tokenize(flat)
        self.tokens = tokens.view(len(concepts), -1, tokens.shape[1])
        counts = [len(kind) for kind in captions[0]]
        shares = [[share / n] * n for share, n in zip(CAPTION_SHARES, counts, strict=True)]
        self.caption_shares = np.cumsum(np.concatenate(shares))
        self.batch_size, self.seed = batch_size, seed

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """The batch of a step: images (N, 3, 64, 64) uint8 and tokens (N, L).

        Each epoch is a new order of the concepts; its last incomplete batch is dropped.
        """
        n = self.batch_size
        epoch, index = divmod(step, len(self.rows) // n)
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.rows))
        which = order[index * n : (index + 1) * n]
        rng = np.random.default_rng([self.seed, epoch, index])
        rows = self.rows[which, rng.integers(self.rows.shape[1], size=n)]
        caption = np.searchsorted(self.caption_shares[:-1], rng.random(n), side="right")
        return self.images[torch.from_numpy(rows)], self.tokens[which, caption]
