"""Computes every metric that applies to a data set, for one model."""

import base64
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from cyclip_loss.metrics import consistency_metrics

from . import metrics
from .checkpoints import Clip
from .datasets import DataSet

GALLERY = 50_000  # training images the neighbours come from, as many as the paper's for ImageNet
PAIRS = 10_000  # of gaps, alignment and uniformity, whose cost grows with the square
PAIRS_PICTURED = 60  # pairs whose similarities are kept for a picture

Numbers = dict[str, float]


@dataclass
class Encoded:
    """A data set as a model encodes it. n is the number of images that could be read.

    Features have unit length, except for the raw ones. Questions are those of `DataSet.classes`.
    """

    data: DataSet  # of the n images
    raw_image_features: Tensor  # (n, D), not normalised
    image_features: Tensor  # (n, D)
    class_features: dict[str, Tensor]  # (C, D) by question
    labels: dict[str, Tensor]  # (n,) by question
    ranked_classes: dict[str, Tensor]  # (n, up to 10) by question, the nearest class first
    group_rows: dict[str, Tensor]  # the images of each group, ascending
    text_features: Tensor  # (m, D), of distinct captions, or of class names
    pairs: Tensor  # (P, 2), which image has which text, ordered by image
    unreadable: list[str]  # what is wrong with each picture that is left out
    neighbour_labels: dict[str, Tensor] = field(default_factory=dict)  # (n, up to 10), by question
    probe: Numbers = field(default_factory=dict)

    def first_texts(self) -> Tensor:
        """The first text of each image: (n,)."""
        images = torch.arange(len(self.image_features), device=self.pairs.device)
        return self.pairs[torch.searchsorted(self.pairs[:, 0].contiguous(), images), 1]


def measure(
    clip: Clip, data: DataSet, linear_probe: bool = False, pictured: bool = False
) -> dict[str, Any]:
    """All numbers of a data set, as shares (not %). Pictures that cannot be read are left out.

    linear_probe: fit a linear probe on all of the train split, if there is one.
    pictured: keep the similarities of some pairs.

    Returns {"numbers": {metric: value}, "groups": {group: {metric: value}}, "images": how many,
             "similarities": those of `PAIRS_PICTURED` pairs, if `pictured`; see `similarities`,
             "unreadable": [what is wrong with each picture that is left out]}.
    """
    encoded = encode(clip, data)
    if data.train is not None:
        use_train_split(clip, encoded, linear_probe)
    elif data.across_groups and data.classes:
        use_other_groups(encoded)
    groups = {group: numbers(encoded, rows) for group, rows in encoded.group_rows.items()}
    everything = torch.arange(len(encoded.image_features), device=clip.device)
    if data.across_groups:
        overall = mean_over_groups(groups, data.excluded_groups)
    else:
        overall = numbers(encoded, everything) | encoded.probe
    measured: dict[str, Any] = {"numbers": overall, "groups": groups, "images": len(everything)}
    if pictured:
        rows = next(iter(encoded.group_rows.values()), everything)
        measured["similarities"] = pictured_similarities(encoded, rows)
    return measured | {"unreadable": encoded.unreadable}


def encode(clip: Clip, data: DataSet) -> Encoded:
    """Encodes the images, the class names and the captions of a data set."""
    device, numbers_of_images = clip.device, torch.arange(len(data.images))
    raw, readable, unreadable = clip.encode_images(data.images, numbers_of_images, "test")
    data, raw = data.select(readable), raw.to(device)
    image_features = F.normalize(raw, dim=-1)
    class_features = {
        question: clip.encode_classes(classes.names, classes.templates).to(device)
        for question, classes in data.classes.items()
    }
    ranked_classes = {
        question: metrics.nearest(image_features, features, max(metrics.TOP))
        for question, features in class_features.items()
    }
    if data.captions is not None:
        texts, pairs = distinct_texts(data.captions)
        text_features = clip.encode_texts(texts).to(device)
    else:  # class names take the place of captions
        question, classes = next(iter(data.classes.items()))
        text_features = class_features[question]
        pairs = torch.stack((torch.arange(len(raw)), classes.labels), dim=1)
    return Encoded(
        data=data,
        raw_image_features=raw,
        image_features=image_features,
        class_features=class_features,
        labels={question: c.labels.to(device) for question, c in data.classes.items()},
        ranked_classes=ranked_classes,
        group_rows=rows_by_group(data.groups or [], device),
        text_features=text_features,
        pairs=pairs.to(device),
        unreadable=unreadable,
    )


def rows_by_group(groups: list[str], device: torch.device) -> dict[str, Tensor]:
    """The images of each group, ascending, in the order in which groups first occur."""
    rows: dict[str, list[int]] = {}
    for row, group in enumerate(groups):
        rows.setdefault(group, []).append(row)
    return {group: torch.tensor(found, device=device) for group, found in rows.items()}


def use_train_split(clip: Clip, encoded: Encoded, linear_probe: bool) -> None:
    """Encodes the train split: labels of the nearest images, and the linear probe if asked for.

    Neighbours come from at most `GALLERY` training images. The probe is fitted on all of them.
    """
    assert encoded.data.train is not None
    images, labels = encoded.data.train
    gallery = sample_rows(len(images), GALLERY)
    wanted = torch.arange(len(images)) if linear_probe else gallery
    features, readable, unreadable = clip.encode_images(images, wanted, "train")
    features = features.to(clip.device)
    labels = {question: label[readable].to(clip.device) for question, label in labels.items()}
    encoded.unreadable += unreadable
    if linear_probe:
        encoded.probe["linear_probe"] = metrics.linear_probe(
            features,
            labels[""],
            encoded.raw_image_features,
            encoded.labels[""],
            len(encoded.data.classes[""].names),
        )
    in_gallery = torch.isin(readable, gallery).to(clip.device)
    nearest = metrics.nearest(
        encoded.image_features,
        F.normalize(features[in_gallery], dim=-1),
        max(metrics.CONSISTENCY_NEIGHBOURS),
    )
    for question, label in labels.items():
        encoded.neighbour_labels[question] = label[in_gallery][nearest]


def use_other_groups(encoded: Encoded) -> None:
    """Takes the neighbours of an image from the other groups."""
    nearest = neighbours_across(
        encoded.image_features, encoded.group_rows, encoded.data.excluded_groups
    )
    for question, labels in encoded.labels.items():
        encoded.neighbour_labels[question] = labels[nearest]


def neighbours_across(
    image_features: Tensor, group_rows: dict[str, Tensor], excluded: frozenset[str]
) -> Tensor:
    """The nearest images of other groups that are not excluded: (n, up to 10) rows.

    group_rows: the rows of each group.
    """
    others = {
        group: torch.cat([r for g, r in group_rows.items() if g != group and g not in excluded])
        for group in group_rows
    }
    k = min(max(metrics.CONSISTENCY_NEIGHBOURS), *(len(rows) for rows in others.values()))
    found = torch.empty(len(image_features), k, dtype=torch.long, device=image_features.device)
    for group, rows in group_rows.items():
        gallery = others[group]
        nearest = metrics.nearest(image_features[rows], image_features[gallery], k)
        found[rows] = gallery[nearest]
    return found


def numbers(encoded: Encoded, rows: Tensor) -> Numbers:
    """The numbers of some images. rows: (m,), ascending."""
    found: Numbers = {}
    for question in encoded.data.classes:
        prefix = f"{question}_" if question else ""
        answers = class_numbers(encoded, question, rows)
        found |= {f"{prefix}{name}": value for name, value in answers.items()}
    found |= retrieval_numbers(encoded, rows)
    sampled = rows[sample_rows(len(rows), PAIRS).to(rows.device)]
    texts = encoded.first_texts()[sampled]
    return found | geometry(encoded.image_features[sampled], encoded.text_features[texts])


def class_numbers(encoded: Encoded, question: str, rows: Tensor) -> Numbers:
    """Zero-shot accuracy, superclasses and consistency scores of some images for one question."""
    classes = encoded.data.classes[question]
    ranked, labels = encoded.ranked_classes[question][rows], encoded.labels[question][rows]
    found = metrics.zero_shot(ranked, labels, len(classes.names))
    if classes.superclass is not None:
        found |= metrics.coarse_and_fine(
            encoded.image_features[rows],
            encoded.class_features[question],
            labels,
            classes.superclass.to(labels.device),
        )
    if question in encoded.neighbour_labels:
        found |= metrics.consistency(ranked[:, 0], encoded.neighbour_labels[question][rows])
    return found


def retrieval_numbers(encoded: Encoded, rows: Tensor) -> Numbers:
    """Recall among some images and their texts.

    Without captions it is only asked across groups, and only from class names to images: zero-shot
    accuracy is the other direction, and there an image has more names to choose from.
    """
    if encoded.data.captions is None and not encoded.data.across_groups:
        return {}
    pairs, texts = pairs_of(rows, encoded.pairs)
    recall = metrics.retrieval(encoded.image_features[rows], encoded.text_features[texts], pairs)
    if encoded.data.captions is None:
        return {name: value for name, value in recall.items() if name.startswith("text_to_image")}
    return recall


def mean_over_groups(groups: dict[str, Numbers], excluded: frozenset[str]) -> Numbers:
    """The mean of each number that all groups have."""
    included = [found for group, found in groups.items() if group not in excluded]
    names = [name for name in included[0] if all(name in found for found in included)]
    return {name: sum(found[name] for found in included) / len(included) for name in names}


def geometry(image_features: Tensor, text_features: Tensor) -> Numbers:
    """`consistency_metrics` of (n, D) pairs, without the numbers that are undefined.

    One image has no uniformity, and two pairs have no correlations.
    """
    found = consistency_metrics(image_features, text_features)
    return {name: float(value) for name, value in found.items() if math.isfinite(value)}


def pictured_similarities(encoded: Encoded, rows: Tensor) -> dict[str, Any]:
    """The similarities of up to `PAIRS_PICTURED` of some images, which have different texts.

    Pairs are ordered by the label of the last question, which is the coarsest.
    """
    texts = encoded.first_texts()
    first_row = {int(texts[row]): row for row in rows.flip(0).tolist()}  # of each text
    distinct = torch.tensor(sorted(first_row.values()))
    chosen = distinct[sample_rows(len(distinct), PAIRS_PICTURED)].to(texts.device)
    for labels in encoded.labels.values():
        chosen = chosen[labels[chosen].argsort(stable=True)]
    return similarities(encoded.image_features[chosen], encoded.text_features[texts[chosen]])


def similarities(image_features: Tensor, text_features: Tensor) -> dict[str, Any]:
    """What a picture shows of some pairs.

    image_features, text_features: (n, D), rows of unit length.

    Returns {"numbers": those of `geometry`,
             "matrices": base64 of (3, n, n) int8: 127 times I_i . I_j, T_i . T_j, I_i . T_j}.
    """
    products = torch.stack(
        (
            image_features @ image_features.T,
            text_features @ text_features.T,
            image_features @ text_features.T,
        )
    )
    rounded = (127 * products).round().to(torch.int8).cpu().numpy()
    matrices = base64.b64encode(rounded.tobytes()).decode()
    return {"numbers": geometry(image_features, text_features), "matrices": matrices}


def sample_rows(rows: int, most: int) -> Tensor:
    """At most `most` of `rows` numbers in order, the same in every run: (min(rows, most),)."""
    drawn = torch.randperm(rows, generator=torch.Generator().manual_seed(0))
    return drawn[:most].sort().values


def distinct_texts(captions: list[list[str]]) -> tuple[list[str], Tensor]:
    """The distinct texts, and the pairs (image, text): (P, 2), an image's first caption first."""
    number: dict[str, int] = {}
    pairs = [
        (image, number.setdefault(text, len(number)))
        for image, texts in enumerate(captions)
        for text in dict.fromkeys(texts)
    ]
    return list(number), torch.tensor(pairs, dtype=torch.long).view(-1, 2)


def pairs_of(rows: Tensor, pairs: Tensor) -> tuple[Tensor, Tensor]:
    """The pairs of some images, and the texts that they have.

    In the pairs, images and texts are numbered anew, from 0.

    rows: (m,), ascending. pairs: (P, 2). Returns (Q, 2) pairs, and (t,) texts in the old numbers.
    """
    image, text = pairs[torch.isin(pairs[:, 0], rows)].unbind(dim=1)
    texts, text = text.unique(return_inverse=True)
    return torch.stack((torch.searchsorted(rows, image.contiguous()), text), dim=1), texts
