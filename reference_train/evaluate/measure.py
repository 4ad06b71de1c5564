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

GALLERY = 50_000  # training images that may be neighbours, as in the paper for ImageNet
# Gaps, correlations, alignment and uniformity are computed on at most this many pairs, because the
# cost is quadratic.
PAIRS = 10_000
KEPT_PAIRS = 60  # pairs whose similarities are kept for a picture

Numbers = dict[str, float]


@dataclass
class Encoded:
    """The features of a data set. n is the number of images that could be read.

    Features have unit length, except for the raw ones. Tasks are the keys of `DataSet.classes`.
    """

    data: DataSet  # of the n images
    raw_image_features: Tensor  # (n, D), not normalised
    image_features: Tensor  # (n, D)
    class_features: dict[str, Tensor]  # (C, D) by task
    labels: dict[str, Tensor]  # (n,) by task
    ranked_classes: dict[str, Tensor]  # (n, up to 10) by task, the nearest class first
    group_indices: dict[str, Tensor]  # the images of each group, ascending
    text_features: Tensor  # (m, D), of distinct captions, or of class names
    pairs: Tensor  # (P, 2), the indices of an image and its text in each row, ordered by image
    unreadable: list[str]  # an error message for each image that could not be read
    neighbour_labels: dict[str, Tensor] = field(default_factory=dict)  # (n, up to 10) by task
    probe: Numbers = field(default_factory=dict)

    def first_texts(self) -> Tensor:
        """The first text of each image: (n,)."""
        images = torch.arange(len(self.image_features), device=self.pairs.device)
        return self.pairs[torch.searchsorted(self.pairs[:, 0].contiguous(), images), 1]


def measure(
    clip: Clip, data: DataSet, linear_probe: bool = False, keep_similarities: bool = False
) -> dict[str, Any]:
    """All metrics of a data set, as shares (not %). Images that cannot be read are left out.

    linear_probe: fit a linear probe on the whole train split, if there is one.
    keep_similarities: also return the similarities of up to `KEPT_PAIRS` pairs.

    Returns {"numbers": {metric: value},
             "groups": {group: {metric: value}},
             "images": the number of images that could be read,
             "similarities": the result of `similarities`, if `keep_similarities`,
             "unreadable": [an error message for each image that could not be read]}.
    """
    encoded = encode(clip, data)
    if data.train is not None:
        use_train_split(clip, encoded, linear_probe)
    elif data.across_groups and data.classes:
        use_other_groups(encoded)
    groups = {group: numbers(encoded, indices) for group, indices in encoded.group_indices.items()}
    all_images = torch.arange(len(encoded.image_features), device=clip.device)
    if data.across_groups:
        overall = mean_over_groups(groups, data.excluded_groups)
    else:
        overall = numbers(encoded, all_images) | encoded.probe
    measured: dict[str, Any] = {"numbers": overall, "groups": groups, "images": len(all_images)}
    if keep_similarities:
        first_group = next(iter(encoded.group_indices.values()), all_images)
        measured["similarities"] = kept_similarities(encoded, first_group)
    return measured | {"unreadable": encoded.unreadable}


def encode(clip: Clip, data: DataSet) -> Encoded:
    """Encodes the images, the class names and the captions of a data set."""
    device, all_images = clip.device, torch.arange(len(data.images))
    raw, readable, unreadable = clip.encode_images(data.images, all_images, "test")
    data, raw = data.select(readable), raw.to(device)
    image_features = F.normalize(raw, dim=-1)
    class_features = {
        task: clip.encode_classes(classes.names, classes.templates).to(device)
        for task, classes in data.classes.items()
    }
    ranked_classes = {
        task: metrics.nearest(image_features, features, max(metrics.TOP))
        for task, features in class_features.items()
    }
    if data.captions is not None:
        texts, pairs = distinct_texts(data.captions)
        text_features = clip.encode_texts(texts).to(device)
    else:  # class names take the place of captions
        task, classes = next(iter(data.classes.items()))
        text_features = class_features[task]
        pairs = torch.stack((torch.arange(len(raw)), classes.labels), dim=1)
    return Encoded(
        data=data,
        raw_image_features=raw,
        image_features=image_features,
        class_features=class_features,
        labels={task: classes.labels.to(device) for task, classes in data.classes.items()},
        ranked_classes=ranked_classes,
        group_indices=indices_by_group(data.groups or [], device),
        text_features=text_features,
        pairs=pairs.to(device),
        unreadable=unreadable,
    )


def indices_by_group(groups: list[str], device: torch.device) -> dict[str, Tensor]:
    """The images of each group, ascending. groups: the group of each image."""
    indices: dict[str, list[int]] = {}
    for i, group in enumerate(groups):
        indices.setdefault(group, []).append(i)
    return {group: torch.tensor(members, device=device) for group, members in indices.items()}


def use_train_split(clip: Clip, encoded: Encoded, linear_probe: bool) -> None:
    """Encodes the train split. Adds the labels of neighbours and the accuracy of a linear probe.

    Neighbours come from at most `GALLERY` training images. If `linear_probe`, a probe is fitted on
    all training images.
    """
    assert encoded.data.train is not None
    images, labels = encoded.data.train
    gallery = sample_indices(len(images), GALLERY)
    wanted = torch.arange(len(images)) if linear_probe else gallery
    features, readable, unreadable = clip.encode_images(images, wanted, "train")
    features = features.to(clip.device)
    labels = {task: label[readable].to(clip.device) for task, label in labels.items()}
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
    for task, label in labels.items():
        encoded.neighbour_labels[task] = label[in_gallery][nearest]


def use_other_groups(encoded: Encoded) -> None:
    """Adds the labels of neighbours. The neighbours of an image come from the other groups."""
    nearest = neighbours_across(
        encoded.image_features, encoded.group_indices, encoded.data.excluded_groups
    )
    for task, labels in encoded.labels.items():
        encoded.neighbour_labels[task] = labels[nearest]


def neighbours_across(
    image_features: Tensor, group_indices: dict[str, Tensor], excluded: frozenset[str]
) -> Tensor:
    """The nearest images of each image in other groups that are not excluded: (n, up to 10).

    group_indices: the images of each group.
    """
    galleries = {
        group: torch.cat(
            [
                indices
                for other, indices in group_indices.items()
                if other != group and other not in excluded
            ]
        )
        for group in group_indices
    }
    k = min(max(metrics.CONSISTENCY_NEIGHBOURS), *map(len, galleries.values()))
    neighbours = torch.empty(len(image_features), k, dtype=torch.long, device=image_features.device)
    for group, indices in group_indices.items():
        gallery = galleries[group]
        nearest = metrics.nearest(image_features[indices], image_features[gallery], k)
        neighbours[indices] = gallery[nearest]
    return neighbours


def numbers(encoded: Encoded, indices: Tensor) -> Numbers:
    """All metrics of these images, except the linear probe. indices: (m,), ascending."""
    found: Numbers = {}
    for task in encoded.data.classes:
        prefix = f"{task}_" if task else ""
        task_numbers = class_numbers(encoded, task, indices)
        found |= {f"{prefix}{name}": value for name, value in task_numbers.items()}
    found |= retrieval_numbers(encoded, indices)
    sampled = indices[sample_indices(len(indices), PAIRS).to(indices.device)]
    texts = encoded.first_texts()[sampled]
    return found | geometry(encoded.image_features[sampled], encoded.text_features[texts])


def class_numbers(encoded: Encoded, task: str, indices: Tensor) -> Numbers:
    """Zero-shot and superclass accuracy, and consistency scores, of these images in one task."""
    classes = encoded.data.classes[task]
    ranked = encoded.ranked_classes[task][indices]
    labels = encoded.labels[task][indices]
    found = metrics.zero_shot(ranked, labels, len(classes.names))
    if classes.superclass is not None:
        found |= metrics.coarse_and_fine(
            encoded.image_features[indices],
            encoded.class_features[task],
            labels,
            classes.superclass.to(labels.device),
        )
    if task in encoded.neighbour_labels:
        neighbours = encoded.neighbour_labels[task][indices]
        found |= metrics.consistency(ranked[:, 0], neighbours)
    return found


def retrieval_numbers(encoded: Encoded, indices: Tensor) -> Numbers:
    """Recall among these images and their texts.

    Without captions, recall is computed only if `across_groups`, and only from class names to
    images. The other direction would be zero-shot accuracy.
    """
    if encoded.data.captions is None and not encoded.data.across_groups:
        return {}
    pairs, texts = select_pairs(indices, encoded.pairs)
    image_features, text_features = encoded.image_features[indices], encoded.text_features[texts]
    recall = metrics.retrieval(image_features, text_features, pairs)
    if encoded.data.captions is None:
        return {name: value for name, value in recall.items() if name.startswith("text_to_image")}
    return recall


def mean_over_groups(groups: dict[str, Numbers], excluded: frozenset[str]) -> Numbers:
    """The mean of each metric that all groups have, without the excluded groups."""
    included = [found for group, found in groups.items() if group not in excluded]
    names = [name for name in included[0] if all(name in found for found in included)]
    return {name: sum(found[name] for found in included) / len(included) for name in names}


def geometry(image_features: Tensor, text_features: Tensor) -> Numbers:
    """`consistency_metrics` of n pairs, (n, D) each, without metrics that are not defined.

    One pair has no uniformity, and two pairs have no correlations.
    """
    found = consistency_metrics(image_features, text_features)
    return {name: float(value) for name, value in found.items() if math.isfinite(value)}


def kept_similarities(encoded: Encoded, indices: Tensor) -> dict[str, Any]:
    """The similarities of up to `KEPT_PAIRS` of these images, all with different texts.

    The pairs are sorted by their labels in the last task, which is the coarsest.
    """
    texts = encoded.first_texts()
    first_image = {int(texts[i]): i for i in indices.flip(0).tolist()}  # text -> its first image
    distinct = torch.tensor(sorted(first_image.values()))
    chosen = distinct[sample_indices(len(distinct), KEPT_PAIRS)].to(texts.device)
    for labels in encoded.labels.values():  # the last sort decides
        chosen = chosen[labels[chosen].argsort(stable=True)]
    return similarities(encoded.image_features[chosen], encoded.text_features[texts[chosen]])


def similarities(image_features: Tensor, text_features: Tensor) -> dict[str, Any]:
    """The similarities of n pairs, and the metrics of the same pairs, for a picture.

    image_features, text_features: (n, D), rows of unit length.

    Returns {"numbers": the result of `geometry`,
             "matrices": base64 of (3, n, n) int8, 127 times I_i · I_j, T_i · T_j and I_i · T_j}.
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


def sample_indices(count: int, limit: int) -> Tensor:
    """Up to `limit` random indices below `count`, ascending. They are the same in every run."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    return order[:limit].sort().values


def distinct_texts(captions: list[list[str]]) -> tuple[list[str], Tensor]:
    """The distinct texts, and (P, 2) pairs: the indices of an image and its text in each row.

    Pairs are ordered by image. The captions of an image keep their order.
    """
    index: dict[str, int] = {}  # of each text
    pairs = [
        (image, index.setdefault(text, len(index)))
        for image, texts in enumerate(captions)
        for text in dict.fromkeys(texts)
    ]
    return list(index), torch.tensor(pairs, dtype=torch.long).view(-1, 2)


def select_pairs(indices: Tensor, pairs: Tensor) -> tuple[Tensor, Tensor]:
    """The pairs of these images only, and the indices of their texts.

    indices: (m,), of the images, ascending. pairs: (P, 2), of all images.

    Returns (Q, 2) pairs, as indices among the m images and among their t texts, and the indices
    (t,) of these texts among all texts.
    """
    image, text = pairs[torch.isin(pairs[:, 0], indices)].unbind(dim=1)
    texts, text = text.unique(return_inverse=True)
    return torch.stack((torch.searchsorted(indices, image.contiguous()), text), dim=1), texts
