"""The losses that are compared, and their titles in tables and pictures."""

from typing import NamedTuple

PENALTY_WEIGHT = 0.25  # of each penalty that a loss has: λ in the paper, section 4.1
# For SigLIP's loss 0.25 is too much: results/siglip/README.md has a table. This is with a reference
# batch size of 128.
SIGLIP_PENALTY_WEIGHT = 1 / 32


class Loss(NamedTuple):
    """A loss: CLIP's or SigLIP's contrastive term, and what is added to it."""

    title: str
    inmodal: bool = False  # whether it has the in-modal penalty
    crossmodal: bool = False  # whether it has the cross-modal penalty
    siglip: bool = False  # whether the contrastive term is SigLIP's


WITH_CLIPS_TERM = {
    "clip": Loss("CLIP"),
    "cyclip": Loss("CyCLIP", inmodal=True, crossmodal=True),
    "c-cyclip": Loss("C-CyCLIP", crossmodal=True),
    "i-cyclip": Loss("I-CyCLIP", inmodal=True),
}
LOSSES = {
    **WITH_CLIPS_TERM,
    "siglip": Loss("SigLIP", siglip=True),
    "cysiglip": Loss("CySigLIP", inmodal=True, crossmodal=True, siglip=True),
    "c-cysiglip": Loss("C-CySigLIP", crossmodal=True, siglip=True),
}
