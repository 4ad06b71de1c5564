"""Training batches: what they hold, and how pictures are augmented.

A batch has N *distinct* concepts of split `train`, each in one of the training styles: the same
emoji in another style would be a false negative of the contrastive loss. A batch depends on the
seed and the step alone, so a resumed run sees what an uninterrupted one would have seen.
"""

import random
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..data.emoji import TRAIN_STYLES, Concept, EmojiSet

# Half of the captions are a name in a template, a quarter are a name and its kind, 15% are the kind
# alone, and 10% are keywords (CAPTION_SHARES, in the order of `captions_of`).
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
KEYWORD_CAPTIONS = 4  # drawn once for each concept: up to three keywords, in random order
CAPTION_SHARES = (0.50, 0.25, 0.15, 0.10)


def captions_of(concept: Concept) -> list[list[str]]:
    """All captions training may show for a concept: one list for each of `CAPTION_SHARES`."""
    rng = random.Random(concept.code)
    keywords = concept.keywords or (concept.name,)
    return [
        [template.format(concept.name) for template in NAME_TEMPLATES],
        [f"{concept.name}, a kind of {concept.subgroup}"],
        [template.format(concept.subgroup) for template in SUBGROUP_TEMPLATES],
        [", ".join(rng.sample(keywords, min(3, len(keywords)))) for _ in range(KEYWORD_CAPTIONS)],
    ]


class EmojiBatches:
    """Batches of distinct training concepts: a random training style and two captions of each."""

    def __init__(
        self, emoji: EmojiSet, tokenize: Callable[[list[str]], Tensor], batch_size: int, seed: int
    ):
        # rows: (concepts, styles), indices into `images`. If a style lacks a concept, the row of
        # another style stands in its place.
        self.images, owners, _ = emoji.drawings(TRAIN_STYLES, emoji.in_split("train"))
        rows: dict[int, list[int]] = {}
        for row, concept in enumerate(owners.tolist()):
            rows.setdefault(concept, []).append(row)
        concepts = sorted(rows)
        styles = len(TRAIN_STYLES)
        self.rows = np.array([(rows[i] * styles)[:styles] for i in concepts])
        # tokens: (concepts, captions, L). Every caption is tokenised once, here.
        captions = [captions_of(emoji.concepts[i]) for i in concepts]
        flat = [text for kinds in captions for kind in kinds for text in kind]
        tokens = tokenize(flat)
        self.tokens = tokens.view(len(concepts), -1, tokens.shape[1])
        counts = [len(kind) for kind in captions[0]]
        shares = [[share / n] * n for share, n in zip(CAPTION_SHARES, counts, strict=True)]
        self.caption_shares = np.cumsum(np.concatenate(shares))
        self.batch_size, self.seed = batch_size, seed

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """The batch of a step: images (N, 3, 64, 64) uint8 and tokens (2, N, L).

        The second caption, for losses of two views, may equal the first. Each epoch is a new order
        of the concepts; its last incomplete batch is dropped.
        """
        n = self.batch_size
        epoch, index = divmod(step, len(self.rows) // n)
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.rows))
        concepts = order[index * n : (index + 1) * n]
        rng = np.random.default_rng([self.seed, epoch, index])
        rows = self.rows[concepts, rng.integers(self.rows.shape[1], size=n)]
        captions = np.searchsorted(self.caption_shares[:-1], rng.random((2, n)), side="right")
        return self.images[torch.from_numpy(rows)], self.tokens[concepts, captions]


def augment(images: Tensor, size: int, rng: np.random.Generator) -> Tensor:
    """images: (n, 3, S, S) uint8 -> (n, 3, size, size) float in [0, 1], moved and tinted a little.

    Each image gets one affine resampling (rotation, scale, shear, shift) and one affine map of its
    colours (contrast, saturation, tint, brightness). Images are never flipped, because names say
    left and right. The new border is white.
    """
    n = len(images)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.from_numpy(rng.uniform(low, high, (n, *shape)).astype(np.float32))

    angle, zoom, shear = uniform(-0.2, 0.2), uniform(-0.16, 0.16).exp(), uniform(-0.1, 0.1)
    cos, sin = zoom * angle.cos(), zoom * angle.sin()
    turn = torch.stack([cos, shear * cos - sin, sin, shear * sin + cos], dim=-1).view(n, 2, 2)
    theta = torch.cat([turn, uniform(-0.1, 0.1, 2, 1)], dim=-1).to(images.device)  # (N, 2, 3)
    grid = F.affine_grid(theta, [n, 3, size, size], align_corners=False)
    ink = images.float().mul_(-1 / 255).add_(1)  # white is 0: what grid_sample pads with
    ink = F.grid_sample(ink, grid, mode="bilinear", padding_mode="zeros", align_corners=False)

    saturation, tint = uniform(0.5, 1.3, 1, 1), uniform(0.85, 1.15, 3, 1)
    grey = torch.tensor([0.299, 0.587, 0.114]).expand(3, 3)
    mix = uniform(0.8, 1.2, 1, 1) * tint * (saturation * torch.eye(3) + (1 - saturation) * grey)
    shift = uniform(-0.08, 0.08, 1, 1).expand(n, 3, 1)
    mix, shift = mix.to(images.device), shift.to(images.device)
    ink = torch.baddbmm(shift, mix, ink.view(n, 3, -1)).view(n, 3, size, size)
    return ink.neg_().add_(1).clamp_(0, 1)
