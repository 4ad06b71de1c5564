"""What else one could use: each behind one signature, each stating what it does not compute.

    loss(image_features (N, D), text_features (N, D), logit_scale scalar) -> scalar

Features have rows of unit length.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from cyclip_loss import CyCLIPLoss, cyclic_penalty, reference

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
OURS = "CyCLIPLoss"
EAGER = "CyCLIPLoss, eager"
CONTRASTIVE_ONLY = "CyCLIPLoss(0, 0)"
PENALTIES_ONLY = "cyclic_penalty"
AUTHORS = "authors' formula"
COMPILED = "authors' formula, torch.compile"
DENSE_PENALTIES = "dense penalties"
OPEN_CLIP = "open_clip.ClipLoss, no penalties"
IDS, AUTHORS_IDS = "CyCLIPLoss, ids", "authors' formula, ids"
BESIDE = (OURS, AUTHORS, COMPILED, OPEN_CLIP)  # what a summary shows
PARTS = (CONTRASTIVE_ONLY, PENALTIES_ONLY, DENSE_PENALTIES, IDS, AUTHORS_IDS)
PENALTIES, TERM = "penalties", "contrastive term"  # what may be lacking


@dataclass(frozen=True)
class Competitor:
    """A way to compute the loss. `lacks`: what a user of it would not get."""

    name: str
    make: Callable[[], Loss]
    lacks: str = ""

    @cached_property
    def loss(self) -> Loss:
        """Raises what its package does where that is missing."""
        return self.make()


def authors_formula(
    image: Tensor, text: Tensor, scale: Tensor, ids: Tensor | None = None
) -> Tensor:
    """CyCLIP as its authors write it: three N x N products, penalties of logits, scale taken out.

    Goel et al. 2022, eq. 1 to 3, both weights 0.25. ids: a mask, which theirs does not have.
    """
    logits = scale * image @ text.T
    labels = torch.arange(len(image), device=image.device)
    masked = reference.without_same_ids(logits, ids)
    both = (cross_entropy(masked, labels) + cross_entropy(masked.T, labels)) / 2
    difference = scale * image @ image.T - scale * text @ text.T
    inmodal = difference.square().mean() / scale.square() * len(image)
    crossmodal = (logits - logits.T).square().mean() / scale.square() * len(image)
    return both + 0.25 * (inmodal + crossmodal)


def dense_penalties(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """Both penalties alone, by their definition."""
    inmodal = reference.inmodal_cyclic_penalty(image, text)
    return 0.25 * (inmodal + reference.crossmodal_cyclic_penalty(image, text))


def with_ids(loss: Callable[..., Tensor]) -> Loss:
    """A loss with ids that are all different: they cost what others do, and change no result."""
    return lambda image, text, scale: loss(
        image, text, scale, ids=torch.arange(len(image), device=image.device)
    )


# `dynamic`: one compilation for all sizes, each of which takes up to a quarter of a minute on two
# cores. Code for one size alone was no faster (N = 2,048, D = 512, on CPU).
COMPETITORS = (
    Competitor(OURS, CyCLIPLoss),
    Competitor(EAGER, lambda: CyCLIPLoss(impl="eager")),
    Competitor(CONTRASTIVE_ONLY, lambda: CyCLIPLoss(0, 0), PENALTIES),
    Competitor(PENALTIES_ONLY, lambda: lambda image, text, _: cyclic_penalty(image, text), TERM),
    Competitor(AUTHORS, lambda: authors_formula),
    Competitor(COMPILED, lambda: torch.compile(authors_formula, dynamic=True)),
    Competitor(DENSE_PENALTIES, lambda: dense_penalties, TERM),
    Competitor(OPEN_CLIP, lambda: import_module("open_clip").ClipLoss(), PENALTIES),
    Competitor(IDS, lambda: with_ids(CyCLIPLoss())),
    Competitor(AUTHORS_IDS, lambda: with_ids(authors_formula)),
)


def competitors(device: torch.device, *without: str) -> list[Competitor]:
    """All but those named. On CPU `EAGER` is `OURS`."""
    left_out = without if device.type == "cuda" else (*without, EAGER)
    return [competitor for competitor in COMPETITORS if competitor.name not in left_out]
