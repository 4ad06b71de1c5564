"""The losses that are compared, and how pictures show them."""

from typing import NamedTuple


class Loss(NamedTuple):
    """A loss: its name and colour in pictures, its penalties, and what it does with views."""

    title: str
    colour: str
    inmodal: bool
    crossmodal: bool
    views: str = ""  # the term of the second views: "contrastive" or "geometric"; "": no views


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
