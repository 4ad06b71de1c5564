"""The datasets of the demonstration: styles, concepts, or both, that training never saw.

Each metric is a mean over styles. Hyperparameters were tuned on other data, which no dataset here
contains: concepts of the validation split, and a fixed quarter of the training concepts.
"""

import hashlib

import torch

from ..data.emoji import (
    BLACK_AND_WHITE,
    NAME_TEMPLATES,
    SHIFT_STYLES,
    SUBGROUP_TEMPLATES,
    TRAIN_STYLES,
    Concept,
    EmojiSet,
)
from .datasets import Classes, Dataset, Images, number_words

# Name -> styles, and whether the concepts are held out.
DATASETS = {
    "trained concepts, new styles": (SHIFT_STYLES, False),
    "new concepts, trained styles": (TRAIN_STYLES, True),
    "new concepts, new styles": (SHIFT_STYLES, True),
    "trained concepts, black and white": (BLACK_AND_WHITE, False),
}


def open_dataset(emoji: EmojiSet, name: str) -> Dataset:
    """A dataset of `DATASETS`, with three tasks: names, subgroups and groups."""
    styles, held_out = DATASETS[name]
    concepts, trained = emoji.concepts, emoji.in_split("train")
    candidates = emoji.in_split("test") if held_out else trained
    shown = candidates if held_out else [i for i in trained if not is_for_tuning(concepts[i])]
    images, image_concepts, image_styles = emoji.drawings(styles, shown)
    train_images, train_image_concepts, _ = emoji.drawings(TRAIN_STYLES, trained)
    name_label = torch.full((len(concepts),), -1)  # concept -> label
    name_label[candidates] = torch.arange(len(candidates))
    names = [concepts[i].name for i in candidates]
    templates = list(dict.fromkeys(NAME_TEMPLATES))
    classes = {"": Classes(name_label[image_concepts], names, templates)}
    # No training image has the name of a held-out concept.
    train_labels = {} if held_out else {"": name_label[train_image_concepts]}
    for kind in ("subgroup", "group"):
        words = [getattr(concept, kind).replace("&", "and") for concept in concepts]
        names, label = number_words(words)  # concept -> label
        classes[kind] = Classes(label[image_concepts], names, list(SUBGROUP_TEMPLATES))
        train_labels[kind] = label[train_image_concepts]
    return Dataset(
        Images(images),
        classes,
        groups=image_styles,
        train=(Images(train_images), train_labels),
    )


def is_for_tuning(concept: Concept) -> bool:
    """Whether a training concept is in the quarter on which hyperparameters were tuned."""
    return hashlib.sha256(f"query {concept.code}".encode()).digest()[0] < 64
