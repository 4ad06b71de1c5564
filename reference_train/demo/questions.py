"""What the models are asked, about drawing styles, concepts, and both, that training never saw.

A number is the mean over styles. Settings were chosen on a validation split: held-out concepts are
split in the data; of trained ones, which are asked about in new styles, a fixed quarter was in it.
"""

import hashlib

import torch

from ..data.emoji import SHIFT_STYLES, STRESS_STYLES, TRAIN_STYLES, EmojiSet
from ..evaluate.datasets import Classes, DataSet, Images
from .batches import NAME_TEMPLATES, SUBGROUP_TEMPLATES

SITUATIONS = {
    "trained concepts, new styles": (SHIFT_STYLES, False),
    "new concepts, trained styles": (TRAIN_STYLES, True),
    "new concepts, new styles": (SHIFT_STYLES, True),
    "trained concepts, drawn black": (STRESS_STYLES, False),
}  # name -> (styles, held-out concepts?)


def situation(emoji: EmojiSet, name: str) -> DataSet:
    """A situation as a data set."""
    styles, held_out = SITUATIONS[name]
    concepts, trained = emoji.concepts, emoji.in_split("train")
    asked = candidates = emoji.in_split("test") if held_out else trained
    if not held_out:
        digests = [hashlib.sha256(f"query {concept.code}".encode()) for concept in concepts]
        asked = [i for i in trained if digests[i].digest()[0] >= 64]
    images, drawn, groups = emoji.drawings(styles, asked)
    known_images, known, _ = emoji.drawings(TRAIN_STYLES, trained)
    place = torch.full((len(concepts),), -1)
    place[candidates] = torch.arange(len(candidates))
    names = [concepts[i].name for i in candidates]
    classes = {"": Classes(place[drawn], names, list(dict.fromkeys(NAME_TEMPLATES)))}
    labels = {} if held_out else {"": place[known]}  # a held-out name is no neighbour's name
    for kind in ("subgroup", "group"):
        of_concepts = [getattr(c, kind).replace("&", "and") for c in concepts]
        names = sorted(set(of_concepts))
        label = torch.tensor([names.index(word) for word in of_concepts])
        classes[kind] = Classes(label[drawn], names, list(SUBGROUP_TEMPLATES))
        labels[kind] = label[known]
    train = Images(known_images), labels
    return DataSet(Images(images), classes, groups=groups, train=train, across_groups=True)
