"""The data sets of the demonstration: styles, concepts, or both, that training never saw.

A number is the mean over styles. Settings were chosen on other questions, which are left out here:
about the validation split of the held-out concepts, and about a fixed quarter of the trained
concepts in new styles.
"""

import hashlib

import torch

from ..data.emoji import SHIFT_STYLES, STRESS_STYLES, TRAIN_STYLES, Concept, EmojiSet
from ..evaluate.datasets import Classes, DataSet, Images
from .batches import NAME_TEMPLATES, SUBGROUP_TEMPLATES

SITUATIONS = {
    "trained concepts, new styles": (SHIFT_STYLES, False),
    "new concepts, trained styles": (TRAIN_STYLES, True),
    "new concepts, new styles": (SHIFT_STYLES, True),
    "trained concepts, drawn black": (STRESS_STYLES, False),
}  # name -> (styles, whether the concepts are held out)


def situation(emoji: EmojiSet, name: str) -> DataSet:
    """A situation as a data set."""
    styles, held_out = SITUATIONS[name]
    concepts, trained = emoji.concepts, emoji.in_split("train")
    candidates = emoji.in_split("test") if held_out else trained
    asked = candidates if held_out else [i for i in trained if not chose_settings(concepts[i])]
    images, concept_of_image, style_of_image = emoji.drawings(styles, asked)
    train_images, concept_of_train_image, _ = emoji.drawings(TRAIN_STYLES, trained)
    name_label = torch.full((len(concepts),), -1)
    name_label[candidates] = torch.arange(len(candidates))
    names = [concepts[i].name for i in candidates]
    templates = list(dict.fromkeys(NAME_TEMPLATES))
    classes = {"": Classes(name_label[concept_of_image], names, templates)}
    # No training image has the name of a held-out concept.
    train_labels = {} if held_out else {"": name_label[concept_of_train_image]}
    for kind in ("subgroup", "group"):
        kind_of_concept = [getattr(concept, kind).replace("&", "and") for concept in concepts]
        names = sorted(set(kind_of_concept))
        label = torch.tensor([names.index(word) for word in kind_of_concept])
        classes[kind] = Classes(label[concept_of_image], names, list(SUBGROUP_TEMPLATES))
        train_labels[kind] = label[concept_of_train_image]
    return DataSet(
        Images(images),
        classes,
        groups=style_of_image,
        train=(Images(train_images), train_labels),
        across_groups=True,
    )


def chose_settings(concept: Concept) -> bool:
    """Whether a trained concept is in the quarter on which settings were chosen."""
    return hashlib.sha256(f"query {concept.code}".encode()).digest()[0] < 64
