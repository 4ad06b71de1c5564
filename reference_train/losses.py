"""The losses that are compared, one row each."""

from typing import NamedTuple


class Loss(NamedTuple):
    """How a loss is shown, which penalties it has, and what it computes from a second view."""

    title: str
    colour: str
    inmodal: bool
    crossmodal: bool
    views: str = ""  # "contrastive", "geometric", or without a second view of each pair ""


LOSSES = {
    "clip": Loss("CLIP", "#5b6b7b", False, False),
    "cyclip": Loss("CyCLIP", "#e4572e", True, True),
    "c-cyclip": Loss("C-CyCLIP", "#2a9d8f", False, True),
    "i-cyclip": Loss("I-CyCLIP", "#8e5ea2", True, False),
    "clip-views": Loss("CLIP + views", "#3a86c8", False, False, "contrastive"),
    "cyclip-views": Loss("CyCLIP + views", "#f29e4c", True, True, "contrastive"),
    "c-cyclip-views": Loss("C-CyCLIP + views", "#52b788", False, True, "contrastive"),
    "i-cyclip-views": Loss("I-CyCLIP + views", "#c08fd0", True, False, "contrastive"),
    "geometric": Loss("Geometric", "#d9a441", True, True, "geometric"),
}
