"""What the models are asked, about drawing styles, concepts, and both, that training never saw.

The questions are those of `reference_train.evaluate.measure`: which name (of all trained concepts,
or of the held-out ones), which image for a name, which subgroup and group, the consistency score
with the training images as neighbours, and gaps, alignment and uniformity of the pairs (image,
name). A number is the mean over styles. Nothing is fitted.

Settings are chosen on the split `validation`. Held-out concepts are split in the data; of the
trained concepts, whose images in new styles are asked about, a fixed quarter serves the validation
and the others the test.
"""

import hashlib

import torch
from torch import Tensor

from ..data.emoji import SHIFT_STYLES, STRESS_STYLES, TRAIN_STYLES, Concept, EmojiSet
from ..evaluate.datasets import Classes, DataSet, Pixels
from .batches import NAME_TEMPLATES, SUBGROUP_TEMPLATES

SITUATIONS = {
    "trained concepts, new styles": (SHIFT_STYLES, False),
    "new concepts, trained styles": (TRAIN_STYLES, True),
    "new concepts, new styles": (SHIFT_STYLES, True),
    "trained concepts, drawn black": (STRESS_STYLES, False),
}  # name -> (styles, held-out concepts?)


def for_validation(concept: Concept) -> bool:
    """Whether a trained concept is asked about in the validation (a quarter) or in the test."""
    return hashlib.sha256(f"query {concept.code}".encode()).digest()[0] < 64


def asked(emoji: EmojiSet, split: str, held_out: bool) -> list[int]:
    """The concepts that are asked about, as indices."""
    if held_out:
        return emoji.in_split(split)
    trained = emoji.in_split("train")
    return [i for i in trained if for_validation(emoji.concepts[i]) == (split == "validation")]


def drawings(
    emoji: EmojiSet, styles: tuple[str, ...], concepts: list[int]
) -> tuple[Pixels, Tensor, list[str]]:
    """All images of some concepts in some styles, and of each its concept and its style."""
    of = torch.tensor(concepts)
    rows = {style: torch.isin(emoji.concept[style], of) for style in styles}
    return (
        Pixels(torch.cat([emoji.images[style][kept] for style, kept in rows.items()])),
        torch.cat([emoji.concept[style][kept] for style, kept in rows.items()]),
        [style for style, kept in rows.items() for _ in range(int(kept.sum()))],
    )


def situation(emoji: EmojiSet, split: str, name: str) -> DataSet:
    """A situation as a data set."""
    styles, held_out = SITUATIONS[name]
    trained, queries = emoji.in_split("train"), asked(emoji, split, held_out)
    candidates = queries if held_out else trained
    images, concept, groups = drawings(emoji, styles, queries)
    known_images, known, _ = drawings(emoji, TRAIN_STYLES, trained)
    place = torch.full((len(emoji.concepts),), -1)
    place[candidates] = torch.arange(len(candidates))
    # question -> the label of every concept, the labels' names, templates
    questions: dict[str, tuple[Tensor, list[str], tuple[str, ...]]] = {
        "": (place, [emoji.concepts[i].name for i in candidates], NAME_TEMPLATES)
    }
    for kind in ("subgroup", "group"):
        of_concepts = [getattr(c, kind).replace("&", "and") for c in emoji.concepts]
        names = sorted(set(of_concepts))
        labels = torch.tensor([names.index(word) for word in of_concepts])
        questions[kind] = (labels, names, SUBGROUP_TEMPLATES)
    return DataSet(
        images,
        {
            question: Classes(label[concept], names, list(dict.fromkeys(templates)))
            for question, (label, names, templates) in questions.items()
        },
        groups=groups,
        # a held-out name is no neighbour's name
        train=(
            known_images,
            {q: label[known] for q, (label, *_) in questions.items() if q or not held_out},
        ),
        across_groups=True,
        names_find_images=True,
    )


def validation_pairs(emoji: EmojiSet) -> DataSet:
    """Held-out validation concepts and their names, for watching a run."""
    images, concept, groups = drawings(emoji, TRAIN_STYLES, emoji.in_split("validation"))
    names = [[emoji.concepts[i].name] for i in concept.tolist()]
    return DataSet(images, captions=names, groups=groups, across_groups=True)
