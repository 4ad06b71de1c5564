"""The emoji that ship with the repository, as a data set."""

import torch

from ..data import emoji
from .datasets import PICTURE_TEMPLATES, Classes, DataSet, Images


def open_emoji() -> DataSet:
    """All emoji in all styles. There are two tasks: their names, and their subgroups.

    The superclass of a name is its subgroup. The names are also the captions. Means do
    not include black-and-white drawings.
    """
    shipped = emoji.read_emoji()
    images, concept, styles = shipped.drawings(emoji.ALL_STYLES, range(len(shipped.concepts)))
    subgroups = sorted({concept.subgroup for concept in shipped.concepts})
    subgroup = torch.tensor([subgroups.index(concept.subgroup) for concept in shipped.concepts])
    names = [concept.name for concept in shipped.concepts]
    return DataSet(
        Images(images),
        {
            "": Classes(concept, names, PICTURE_TEMPLATES, subgroup),
            "subgroup": Classes(subgroup[concept], subgroups, PICTURE_TEMPLATES),
        },
        captions=[[names[i]] for i in concept.tolist()],
        groups=styles,
        across_groups=True,
        excluded_groups=frozenset(emoji.STRESS_STYLES),
    )
