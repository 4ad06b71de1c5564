"""What else one could use: each behind one signature, each stating what it does not compute.

    loss(image_features (N, D), text_features (N, D), logit_scale scalar) -> scalar

Features have rows of unit length.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from cyclip_loss import CyCLIPLoss, cyclic_penalty, cyclip_loss, reference

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
OURS = "CyCLIPLoss"
EAGER = "CyCLIPLoss, eager"
PENALTIES_ONLY = "cyclic_penalty"
AUTHORS = "authors' formula"
COMPILED = "authors' formula, torch.compile"
DENSE_PENALTIES = "dense penalties"
OPEN_CLIP = "open_clip.ClipLoss, no penalties"
BESIDE = (OURS, AUTHORS, COMPILED, OPEN_CLIP)  # what a summary shows
LARGE = (*BESIDE, EAGER)  # what runs at every size
# What a loss may be given besides pairs, made of the text features. Each id occurs twice.
TEXTS = "N extra texts"
MORE: dict[str, Callable[[Tensor], dict[str, Any]]] = {
    "": lambda text: {},
    "ids": lambda text: {"ids": torch.arange(len(text), device=text.device) // 2},
    "positives": lambda text: {**MORE["ids"](text), "same_ids": "positives"},
    TEXTS: lambda text: {"negative_text_features": -text},
}
WITH_MORE = {more: (OURS, f"{OURS}, {more}", f"{AUTHORS}, {more}") for more in MORE if more}
PENALTIES, TERM = "penalties", "contrastive term"  # what may be lacking


@dataclass(frozen=True)
class Competitor:
    """A way to compute the loss. `lacks`: what a user of it would not get; `more`: of `MORE`."""

    name: str
    make: Callable[[], Callable[..., Tensor]]
    lacks: str = ""
    more: str = ""

    @cached_property
    def loss(self) -> Loss:
        """Raises what its package does where that is missing."""
        made, more = self.make(), MORE[self.more]
        return lambda image, text, scale: made(image, text, scale, **more(text))


def authors_formula(image: Tensor, text: Tensor, scale: Tensor, **more: Any) -> Tensor:
    """CyCLIP as its authors write it: three N x N products, penalties of logits, scale taken out.

    Goel et al. 2022, eq. 1 to 3, both weights 0.25. Theirs has nothing of `MORE`: ids are a mask,
    positives the targets as in TBPS-CLIP, extra texts further columns as in NegCLIP.
    """
    logits = scale * image @ text.T
    rows = columns = reference.without_same_ids(logits, more.get("ids"))
    targets = torch.arange(len(image), device=image.device)
    if "same_ids" in more:
        rows = columns = logits
        same = (more["ids"][:, None] == more["ids"]).to(logits)
        targets = same / same.sum(dim=1)
    if "negative_text_features" in more:
        rows = torch.cat((logits, scale * image @ more["negative_text_features"].T), dim=1)
    both = (cross_entropy(rows, targets) + cross_entropy(columns.T, targets)) / 2
    difference = scale * image @ image.T - scale * text @ text.T
    inmodal = difference.square().mean() / scale.square() * len(image)
    crossmodal = (logits - logits.T).square().mean() / scale.square() * len(image)
    return both + 0.25 * (inmodal + crossmodal)


def dense_penalties(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """Both penalties alone, by their definition."""
    inmodal = reference.inmodal_cyclic_penalty(image, text)
    return 0.25 * (inmodal + reference.crossmodal_cyclic_penalty(image, text))


# `dynamic`: one compilation for all sizes, each of which takes up to a quarter of a minute on two
# cores. Code for one size alone was no faster (N = 2,048, D = 512, on CPU).
COMPETITORS = (
    Competitor(OURS, CyCLIPLoss),
    Competitor(EAGER, lambda: CyCLIPLoss(impl="eager")),
    Competitor("CyCLIPLoss(0, 0)", lambda: CyCLIPLoss(0, 0), PENALTIES),
    Competitor(PENALTIES_ONLY, lambda: lambda image, text, _: cyclic_penalty(image, text), TERM),
    Competitor(AUTHORS, lambda: authors_formula),
    Competitor(COMPILED, lambda: torch.compile(authors_formula, dynamic=True)),
    Competitor(DENSE_PENALTIES, lambda: dense_penalties, TERM),
    Competitor(OPEN_CLIP, lambda: import_module("open_clip").ClipLoss(), PENALTIES),
    *(Competitor(f"{OURS}, {more}", lambda: cyclip_loss, more=more) for more in WITH_MORE),
    *(Competitor(f"{AUTHORS}, {more}", lambda: authors_formula, more=more) for more in WITH_MORE),
)


def competitors(device: torch.device, *without: str) -> list[Competitor]:
    """All but those named. On CPU `EAGER` is `OURS`."""
    left_out = without if device.type == "cuda" else (*without, EAGER)
    return [competitor for competitor in COMPETITORS if competitor.name not in left_out]
