"""The losses that are compared, one row each."""

from typing import NamedTuple


class Loss(NamedTuple):
    """How a loss is shown, and which of the two penalties it has."""

    title: str
    colour: str
    inmodal: bool
    crossmodal: bool


LOSSES = {
    "clip": Loss("CLIP", "#5b6b7b", False, False),
    "cyclip": Loss("CyCLIP", "#e4572e", True, True),
    "c-cyclip": Loss("C-CyCLIP", "#2a9d8f", False, True),
    "i-cyclip": Loss("I-CyCLIP", "#8e5ea2", True, False),
}
