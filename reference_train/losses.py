"""The losses that are compared, and their titles and colours in tables and pictures."""

from typing import NamedTuple

PENALTY_WEIGHT = 0.25  # of each penalty that a loss has: λ in the paper, section 4.1
# For SigLIP's loss 0.25 is too much: results/siglip/README.md has a table. This is with a reference
# batch size of 128.
SIGLIP_PENALTY_WEIGHT = 1 / 32


class Loss(NamedTuple):
    """A loss: CLIP's or SigLIP's contrastive term, and what is added to it."""

    title: str
    colour: str
    inmodal: bool = False  # whether it has the in-modal penalty
    crossmodal: bool = False  # whether it has the cross-modal penalty
    views: str = ""  # the term that compares two views: "contrastive" or "geometric"; "": one view
    siglip: bool = False  # whether the contrastive term is SigLIP's; such a loss has one view


LOSSES = {
    "clip": Loss("CLIP", "#5b6b7b"),
    "cyclip": Loss("CyCLIP", "#e4572e", inmodal=True, crossmodal=True),
    "c-cyclip": Loss("C-CyCLIP", "#2a9d8f", crossmodal=True),
    "i-cyclip": Loss("I-CyCLIP", "#8e5ea2", inmodal=True),
    "clip-views": Loss("CLIP + views", "#3a86c8", views="contrastive"),
    "cyclip-views": Loss(
        "CyCLIP + views", "#f29e4c", inmodal=True, crossmodal=True, views="contrastive"
    ),
    "c-cyclip-views": Loss("C-CyCLIP + views", "#52b788", crossmodal=True, views="contrastive"),
    "i-cyclip-views": Loss("I-CyCLIP + views", "#c08fd0", inmodal=True, views="contrastive"),
    "geometric": Loss("Geometric", "#d9a441", inmodal=True, crossmodal=True, views="geometric"),
    "siglip": Loss("SigLIP", "#7d5a3c", siglip=True),
    "cysiglip": Loss("CySigLIP", "#c44569", inmodal=True, crossmodal=True, siglip=True),
    "c-cysiglip": Loss("C-CySigLIP", "#1b7f79", crossmodal=True, siglip=True),
}
