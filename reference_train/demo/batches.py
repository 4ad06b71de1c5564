"""Training batches, and the augmentation of their images.

A batch has N *distinct* concepts of split `train`, each in one of the training styles. The same
concept in a second style would be a false negative of the contrastive loss. A batch depends on the
seed and the step only.
"""

import random
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..data.emoji import NAME_TEMPLATES, SUBGROUP_TEMPLATES, TRAIN_STYLES, Concept, EmojiSet

# A caption is a name in a template, a name and its subgroup, a subgroup alone, or keywords. These
# are the shares of the four kinds, in the order of `training_captions`.
CAPTION_SHARES = (0.50, 0.25, 0.15, 0.10)
KEYWORD_CAPTIONS = 4  # of each concept, each with up to three keywords in a random order


def training_captions(concept: Concept) -> list[list[str]]:
    """All training captions of a concept: a list for each share in `CAPTION_SHARES`."""
    rng = random.Random(concept.code)
    keywords = concept.keywords or (concept.name,)
    return [
        [template.format(concept.name) for template in NAME_TEMPLATES],
        [f"{concept.name}, a kind of {concept.subgroup}"],
        [template.format(concept.subgroup) for template in SUBGROUP_TEMPLATES],
        [", ".join(rng.sample(keywords, min(3, len(keywords)))) for _ in range(KEYWORD_CAPTIONS)],
    ]


class EmojiBatches:
    """Batches of distinct concepts. Each concept is in a random style and has a random caption."""

    def __init__(
        self, emoji: EmojiSet, tokenize: Callable[[list[str]], Tensor], batch_size: int, seed: int
    ):
        self.images, image_concepts, _ = emoji.drawings(TRAIN_STYLES, emoji.in_split("train"))
        indices: dict[int, list[int]] = {}  # concept -> indices of its images
        for index, concept in enumerate(image_concepts.tolist()):
            indices.setdefault(concept, []).append(index)
        concepts = sorted(indices)
        # (concepts, styles), indices into `images`. If a concept is missing in a style, an image of
        # the concept in another style takes its place.
        num_styles = len(TRAIN_STYLES)
        self.image_indices = np.array([(indices[i] * num_styles)[:num_styles] for i in concepts])
        captions = [training_captions(emoji.concepts[i]) for i in concepts]
        tokens = tokenize([text for kinds in captions for kind in kinds for text in kind])
        self.tokens = tokens.view(len(concepts), -1, tokens.shape[1])  # (concepts, captions, L)
        counts = [len(kind) for kind in captions[0]]
        self.shares = np.repeat(np.divide(CAPTION_SHARES, counts), counts)
        self.batch_size, self.seed = batch_size, seed

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """The batch of a step: images (N, 3, 64, 64) uint8 and tokens (N, L).

        Each epoch has a new order of the concepts, and drops its last incomplete batch.
        """
        n, (num_concepts, num_styles) = self.batch_size, self.image_indices.shape
        epoch, index = divmod(step, num_concepts // n)
        order = np.random.default_rng([self.seed, epoch]).permutation(num_concepts)
        concepts = order[index * n : (index + 1) * n]
        rng = np.random.default_rng([self.seed, epoch, index])
        indices = self.image_indices[concepts, rng.integers(num_styles, size=n)]
        captions = rng.choice(len(self.shares), n, p=self.shares)
        return self.images[torch.from_numpy(indices)], self.tokens[concepts, captions]


def augment(images: Tensor, size: int, rng: np.random.Generator) -> Tensor:
    """images: (n, 3, S, S) uint8 -> (n, 3, size, size) float in [0, 1], moved and tinted a little.

    Each image is resampled once by an affine map (rotation, scale, shear, shift). Its colours are
    mapped once, too (contrast, saturation, tint, brightness). Images are never flipped, because
    some names say left or right. The new border is white.
    """
    n = len(images)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.from_numpy(rng.uniform(low, high, (n, *shape)).astype(np.float32))

    angle, zoom, shear = uniform(-0.2, 0.2), uniform(-0.16, 0.16).exp(), uniform(-0.1, 0.1)
    cos, sin = zoom * angle.cos(), zoom * angle.sin()
    turn = torch.stack([cos, shear * cos - sin, sin, shear * sin + cos], dim=-1).view(n, 2, 2)
    theta = torch.cat([turn, uniform(-0.1, 0.1, 2, 1)], dim=-1).to(images.device)  # (N, 2, 3)
    grid = F.affine_grid(theta, [n, 3, size, size], align_corners=False)
    # grid_sample pads with 0, so white has to be 0 here.
    ink = images.float().mul_(-1 / 255).add_(1)
    ink = F.grid_sample(ink, grid, mode="bilinear", padding_mode="zeros", align_corners=False)

    saturation, tint = uniform(0.5, 1.3, 1, 1), uniform(0.85, 1.15, 3, 1)
    grey = torch.tensor([0.299, 0.587, 0.114]).expand(3, 3)
    mix = uniform(0.8, 1.2, 1, 1) * tint * (saturation * torch.eye(3) + (1 - saturation) * grey)
    shift = uniform(-0.08, 0.08, 1, 1).expand(n, 3, 1)
    mix, shift = mix.to(images.device), shift.to(images.device)
    ink = torch.baddbmm(shift, mix, ink.view(n, 3, -1)).view(n, 3, size, size)
    return ink.neg_().add_(1).clamp_(0, 1)
