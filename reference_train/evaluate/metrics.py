"""The metrics of `evaluate`: `measure` computes every metric that applies to a dataset.

A new metric is a function of features here, called in `class_numbers`, `retrieval_numbers` or
`numbers`, and a title in `report.metrics_of`. Features are (n, D), float32, on any device. Their
rows have unit length, except for the linear probe. Queries are compared with the gallery in strips,
so that memory stays small.
"""

import base64
import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.optim import param_groups_weight_decay  # type: ignore[attr-defined]
from torch import Tensor, nn
from torch.nn import functional as F

from cyclip_loss.metrics import consistency_metrics

from .checkpoints import Clip
from .datasets import Dataset

STRIP = 1024  # queries that are compared with the gallery in one product
TOP = (1, 3, 5, 10)  # zero-shot: is the class among the k nearest?
SUPERCLASS_TOP = (1, 2, 3)
CONSISTENCY_NEIGHBOURS = (1, 3, 5, 10)
RECALL_AT = (1, 5, 10)
GALLERY = 50_000  # training images that may be neighbours, as in the paper for ImageNet
# Gaps, correlations, alignment and uniformity are computed on at most this many pairs, because the
# cost is quadratic.
PAIRS = 10_000
KEPT_PAIRS = 60  # pairs whose similarities are kept for a figure

Numbers = dict[str, float]


@dataclass
class Encoded:
    """The features of a dataset. n is the number of images that could be read.

    Features have unit length, except for the raw ones. Tasks are the keys of `Dataset.classes`.
    """

    data: Dataset  # of the n images
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
    clip: Clip, data: Dataset, linear_probe: bool = False, keep_similarities: bool = False
) -> dict[str, Any]:
    """All metrics of a dataset, as shares (not %). Images that cannot be read are left out.

    linear_probe: fit a linear probe on the whole train split, if there is one.
    keep_similarities: also return the similarities of up to `KEPT_PAIRS` pairs.

    Returns {"numbers": {metric: value},
             "groups": {group: {metric: value}},
             "images": the number of images that could be read,
             "similarities": {"matrices": str}, the result of `similarities`, if
                 `keep_similarities`,
             "unreadable": [an error message for each image that could not be read]}.
    """
    encoded = encode(clip, data)
    if data.train is not None:
        use_train_split(clip, encoded, linear_probe)
    elif data.groups and data.classes:
        use_other_groups(encoded)
    groups = {group: numbers(encoded, indices) for group, indices in encoded.group_indices.items()}
    all_images = torch.arange(len(encoded.image_features), device=clip.device)
    if data.groups:
        overall = mean_over_groups(groups, data.excluded_groups)
    else:
        overall = numbers(encoded, all_images) | encoded.probe
    measured: dict[str, Any] = {"numbers": overall, "groups": groups, "images": len(all_images)}
    if keep_similarities:
        first_group = next(iter(encoded.group_indices.values()), all_images)
        measured["similarities"] = {"matrices": kept_similarities(encoded, first_group)}
    return measured | {"unreadable": encoded.unreadable}


def encode(clip: Clip, data: Dataset) -> Encoded:
    """Encodes the images, the class names and the captions of a dataset."""
    device, all_images = clip.device, torch.arange(len(data.images))
    raw, readable, unreadable = clip.encode_images(data.images, all_images, "test")
    data, raw = data.select(readable), raw.to(device)
    image_features = F.normalize(raw, dim=-1)
    class_features = {
        task: clip.encode_classes(classes.names, classes.templates).to(device)
        for task, classes in data.classes.items()
    }
    ranked_classes = {
        task: nearest(image_features, features, max(TOP))
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
        encoded.probe["linear_probe"] = fit_linear_probe(
            features,
            labels[""],
            encoded.raw_image_features,
            encoded.labels[""],
            len(encoded.data.classes[""].names),
        )
    in_gallery = torch.isin(readable, gallery).to(clip.device)
    neighbours = nearest(
        encoded.image_features,
        F.normalize(features[in_gallery], dim=-1),
        max(CONSISTENCY_NEIGHBOURS),
    )
    for task, label in labels.items():
        encoded.neighbour_labels[task] = label[in_gallery][neighbours]


def use_other_groups(encoded: Encoded) -> None:
    """Adds the labels of neighbours: the nearest images in other groups that are not excluded."""
    groups, excluded = encoded.group_indices, encoded.data.excluded_groups
    galleries = {
        group: torch.cat([x for other, x in groups.items() if other not in {group, *excluded}])
        for group in groups
    }
    k = min(max(CONSISTENCY_NEIGHBOURS), *map(len, galleries.values()))
    neighbours = encoded.pairs.new_empty(len(encoded.image_features), k)
    for group, indices in groups.items():
        gallery = galleries[group]
        found = nearest(encoded.image_features[indices], encoded.image_features[gallery], k)
        neighbours[indices] = gallery[found]
    for task, labels in encoded.labels.items():
        encoded.neighbour_labels[task] = labels[neighbours]


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
    found = zero_shot(ranked, labels, len(classes.names))
    if classes.superclass is not None:
        found |= coarse_and_fine(
            encoded.image_features[indices],
            encoded.class_features[task],
            labels,
            classes.superclass.to(labels.device),
        )
    if task in encoded.neighbour_labels:
        neighbours = encoded.neighbour_labels[task][indices]
        found |= consistency(ranked[:, 0], neighbours)
    return found


def retrieval_numbers(encoded: Encoded, indices: Tensor) -> Numbers:
    """Recall among these images and their texts.

    Without captions, recall is computed only if `across_groups`, and only from class names to
    images. The other direction would be zero-shot accuracy.
    """
    if encoded.data.captions is None and not encoded.data.groups:
        return {}
    pairs, texts = select_pairs(indices, encoded.pairs)
    image_features, text_features = encoded.image_features[indices], encoded.text_features[texts]
    recall = retrieval(image_features, text_features, pairs)
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


def kept_similarities(encoded: Encoded, indices: Tensor) -> str:
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


def similarities(image_features: Tensor, text_features: Tensor) -> str:
    """The similarities of n pairs, (n, D) each, for a figure.

    Base64 of (3, n, n) int8: 127 times I_i · I_j, T_i · T_j and I_i · T_j.
    """
    pairs = (
        (image_features, image_features),
        (text_features, text_features),
        (image_features, text_features),
    )
    products = torch.stack([rows @ columns.T for rows, columns in pairs])
    rounded = (127 * products).round().to(torch.int8).cpu().numpy()
    return base64.b64encode(rounded.tobytes()).decode()


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


def nearest(queries: Tensor, gallery: Tensor, k: int) -> Tensor:
    """The indices of the k gallery rows with the highest cosine, best first: (Q, min(k, G))."""
    k = min(k, len(gallery))
    return torch.cat([(strip @ gallery.T).topk(k).indices for strip in queries.split(STRIP)])


def hit_rate(ranked: Tensor, truth: Tensor, k: int) -> float:
    """The share of queries whose true answer is among the first k answers.

    ranked: (n, at least k), best first. truth: (n,).
    """
    return (ranked[:, :k] == truth[:, None]).any(dim=1).float().mean().item()


def zero_shot(ranked: Tensor, labels: Tensor, num_classes: int) -> dict[str, float]:
    """Top-k accuracy for k = 1, and for k = 3, 5 and 10 if there are more than k classes.

    ranked: (n, up to 10), the nearest classes, best first. labels: (n,).
    """
    ks = [k for k in TOP if k == 1 or k < num_classes]
    return {f"top{k}": hit_rate(ranked, labels, k) for k in ks}


def top(name: str, k: int) -> str:
    """The name of a metric for the best k answers; for k = 1, the name alone."""
    return name if k == 1 else f"{name}_top{k}"


def coarse_and_fine(
    image_features: Tensor, class_features: Tensor, labels: Tensor, superclass: Tensor
) -> dict[str, float]:
    """Coarse and fine accuracy: Goel et al. 2022, section 4.3 (k = 1) and supplement (k = 2, 3).

    coarse: is the true superclass among the best k? A superclass has the score of its best class.
    fine: is the true class among the best k classes of the true superclass?

    labels: (n,) classes. superclass: (C,), the superclass of each class.
    """
    groups, group = superclass.unique(return_inverse=True)
    max_k = max(SUPERCLASS_TOP)
    coarse, fine = [], []
    for features, truth in zip(
        image_features.split(STRIP), group[labels].split(STRIP), strict=True
    ):
        scores = features @ class_features.T
        superclass_scores = scores.new_full((len(scores), len(groups)), -torch.inf)
        superclass_scores.scatter_reduce_(1, group.expand_as(scores), scores, "amax")
        coarse.append(superclass_scores.topk(min(max_k, len(groups))).indices)
        siblings = scores.masked_fill(group != truth[:, None], -torch.inf)
        fine.append(siblings.topk(min(max_k, len(group))).indices)
    answers = {"coarse": (torch.cat(coarse), group[labels]), "fine": (torch.cat(fine), labels)}
    return {
        top(name, k): hit_rate(ranked, truth, k)
        for name, (ranked, truth) in answers.items()
        for k in SUPERCLASS_TOP
    }


def ranks(queries: Tensor, gallery: Tensor, pairs: Tensor) -> Tensor:
    """The rank of the best right candidate for each query: (Q,), 0 for the first rank.

    It is the number of wrong candidates with at least the same score, so an exact tie counts
    against the model.

    queries: (Q, D). gallery: (G, D). pairs: (P, 2), a query and a right candidate in each row, as
    indices. Every query is in at least one pair.
    """
    found = []
    for number, strip in enumerate(queries.split(STRIP)):
        scores = strip @ gallery.T
        query, right = pairs[pairs[:, 0] // STRIP == number].unbind(dim=1)
        is_right = torch.zeros_like(scores, dtype=torch.bool)
        is_right[query % STRIP, right] = True
        best = scores.masked_fill(~is_right, -torch.inf).amax(dim=1, keepdim=True)
        found.append(((scores >= best) & ~is_right).sum(dim=1))
    return torch.cat(found)


def retrieval(image_features: Tensor, text_features: Tensor, pairs: Tensor) -> dict[str, float]:
    """Recall at 1, 5 and 10 in both directions. Every query is compared with all candidates.

    A query is a hit if any of its right candidates is among the first k. A text that is the caption
    of several images is one candidate, and right for each of these images. As a query it counts
    once for each image.

    image_features: (n, D). text_features: (m, D), of distinct texts. pairs: (P, 2), an image and
    its text in each row, as indices.
    """
    image_ranks = ranks(image_features, text_features, pairs)
    text_ranks = ranks(text_features, image_features, pairs.flip(1))[pairs[:, 1]]
    return {
        f"{direction}_r{k}": (found < k).float().mean().item()
        for direction, found in (("image_to_text", image_ranks), ("text_to_image", text_ranks))
        for k in RECALL_AT
    }


def majority(labels: list[int]) -> int:
    """The most frequent label. While there is a tie, the last label is dropped."""
    (first, votes), *others = Counter(labels).most_common(2)
    return majority(labels[:-1]) if others and others[0][1] == votes else first


def consistency(predicted: Tensor, neighbours: Tensor) -> dict[str, float]:
    """How often the zero-shot label is the majority label of the k nearest training images.

    Goel et al. 2022, section 4.2. On a tie the farthest image is dropped.

    predicted: (n,). neighbours: (n, up to 10), labels of training images, nearest first.
    """
    labels, numbers = neighbours.tolist(), {}
    for k in (k for k in CONSISTENCY_NEIGHBOURS if k <= neighbours.shape[1]):
        votes = torch.tensor([majority(nearest_first[:k]) for nearest_first in labels])
        numbers[f"consistency_{k}"] = (votes == predicted.cpu()).float().mean().item()
    return numbers


def fit_linear_probe(
    features: Tensor, labels: Tensor, test_features: Tensor, test_labels: Tensor, classes: int
) -> float:
    """Test accuracy of a linear layer on frozen features, trained as the paper's authors do.

    AdamW for 32 epochs in batches of 128, learning rate 0.005 on a cosine to 0, weight decay 0.01
    (none on the bias); the features are not normalised, and the last epoch counts.

    features: (n, D), labels: (n,), of the training images.
    """
    epochs = 32
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer = nn.Linear(features.shape[1], classes).to(features.device)
    optimizer = torch.optim.AdamW(param_groups_weight_decay(layer, 0.01), lr=0.005)
    steps = epochs * -(-len(features) // 128)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(epochs):
        order = torch.randperm(len(features), generator=generator).to(features.device)
        for batch in order.split(128):
            loss = nn.functional.cross_entropy(layer(features[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        right = layer(test_features).argmax(dim=1) == test_labels
    return float(right.float().mean())
