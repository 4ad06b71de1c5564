"""The metrics of `evaluate`: `measure` computes every metric that applies to a dataset.

A new metric is a function of features here, called in `class_numbers`, `retrieval_numbers` or
`numbers`. The table shows it by its name (`report.metric` knows accuracies, `report.PLAIN_ENDINGS`
what is not shown in %). Evaluations that are resumed do not get it. Features are (n, D), float32,
on the CPU. Their rows have unit length, except for the linear probe. Queries are compared with the
gallery in strips, so that memory stays small.
"""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.sparse import csr_array
from timm.optim import param_groups_weight_decay  # type: ignore[attr-defined]
from torch import Tensor, nn
from torch.nn import functional as F

from cyclip_loss.metrics import consistency_metrics

from .checkpoints import Clip
from .datasets import Dataset, Images
from .one_index import STRIP, Matches, Means, one_index_numbers

TOP = (1, 3, 5, 10)  # zero-shot: is the class among the k nearest?
SUPERCLASS_TOP = {"": 1, "_top2": 2, "_top3": 3}  # the end of a metric's name -> k
CONSISTENCY_NEIGHBOURS = (1, 3, 5, 10)
RECALL_AT = (1, 5, 10)
GALLERY = 50_000  # training images that may be neighbours, as in the paper for ImageNet
# Gaps, correlations, alignment and uniformity are computed on at most this many pairs, because the
# cost is quadratic.
PAIRS = 10_000
MEANS_OF = 4096  # training pairs

Numbers = dict[str, float]


@dataclass
class Encoded:
    """The features of a dataset of n images.

    Features have unit length, except for the raw ones. Tasks are the keys of `Dataset.classes`.
    """

    data: Dataset
    raw_image_features: Tensor  # (n, D), not normalised
    image_features: Tensor  # (n, D)
    class_features: dict[str, Tensor]  # (C, D) by task
    text_features: Tensor  # (m, D), of distinct captions, or of class names
    is_right: Matches  # (n, m), whether a text belongs to an image
    means: Means  # of training pairs
    neighbour_labels: dict[str, Tensor] = field(default_factory=dict)  # (n, up to 10) by task


def measure(clip: Clip, data: Dataset, linear_probe: bool = False) -> dict[str, Any]:
    """All metrics of a dataset, as shares (not %). Raises `Unusable` if an image can't be read.

    linear_probe: fit a linear probe on the whole train split, if there is one, and no groups.

    Returns {"numbers": {metric: value}, "groups": {group: {metric: value}}}.
    """
    encoded, probe = encode(clip, data), Numbers()
    if data.train is not None:
        probe = use_train_split(clip, encoded, linear_probe and not data.groups)
    styles = data.groups or []
    groups = {
        style: numbers(encoded, torch.tensor([x == style for x in styles]).nonzero()[:, 0])
        for style in dict.fromkeys(styles)
    }
    if groups:  # the mean of each metric that all groups have
        overall = pd.DataFrame(groups).T.dropna(axis="columns").mean().to_dict()
    else:
        overall = numbers(encoded, torch.arange(len(data.images))) | probe
    return {"numbers": overall, "groups": groups}


def feature_means(clip: Clip, images: Images, captions: list[str]) -> tuple[Tensor, Tensor] | None:
    """The means of the image and the text features of up to 4,096 pairs; None without pairs."""
    if not captions:
        return None
    indices = sample_indices(len(captions), MEANS_OF)
    image_features = F.normalize(clip.encode_images(images, indices), dim=-1)
    text_features = clip.encode_texts([captions[i] for i in indices.tolist()])
    return image_features.mean(dim=0), text_features.mean(dim=0)


def encode(clip: Clip, data: Dataset) -> Encoded:
    """Encodes the images, the class names and the captions of a dataset."""
    raw = clip.encode_images(data.images, torch.arange(len(data.images)))
    class_features = {
        task: clip.encode_classes(classes.names, classes.templates)
        for task, classes in data.classes.items()
    }
    if data.captions is not None:
        texts = list(dict.fromkeys(text for own in data.captions for text in own))
        text_features = clip.encode_texts(texts)
        index = {text: i for i, text in enumerate(texts)}
        right = [[*{index[text] for text in own}] for own in data.captions]
    else:  # class names take the place of captions
        task, classes = next(iter(data.classes.items()))
        text_features = class_features[task]
        right = [[label] for label in classes.labels.tolist()]
    images = np.repeat(np.arange(len(right)), [*map(len, right)])
    pairs = images, np.concatenate(right)
    return Encoded(
        data=data,
        raw_image_features=raw,
        image_features=F.normalize(raw, dim=-1),
        class_features=class_features,
        text_features=text_features,
        is_right=csr_array((np.ones(len(images), bool), pairs), (len(raw), len(text_features))),
        means=clip.means,
    )


def use_train_split(clip: Clip, encoded: Encoded, linear_probe: bool) -> Numbers:
    """Encodes the train split, and adds the labels of neighbours.

    Neighbours come from at most `GALLERY` training images. If `linear_probe`, a probe is fitted on
    all training images. Returns its accuracy.
    """
    assert encoded.data.train is not None
    images, labels = encoded.data.train
    gallery = sample_indices(len(images), GALLERY)
    wanted = torch.arange(len(images)) if linear_probe else gallery
    features = clip.encode_images(images, wanted)
    probe = Numbers()
    if linear_probe:
        classes = encoded.data.classes[""]
        probe["linear_probe"] = fit_linear_probe(
            features,
            labels[""],
            encoded.raw_image_features,
            classes.labels,
            len(classes.names),
        )
        features = features[gallery]
    features = F.normalize(features, dim=-1)
    neighbours = nearest(encoded.image_features, features, max(CONSISTENCY_NEIGHBOURS))
    for task, label in labels.items():
        encoded.neighbour_labels[task] = label[gallery][neighbours]
    return probe


def numbers(encoded: Encoded, indices: Tensor) -> Numbers:
    """All metrics of these images, except the linear probe. indices: (m,), ascending."""
    found: Numbers = {}
    for task in encoded.data.classes:
        prefix = f"{task}_" if task else ""
        task_numbers = class_numbers(encoded, task, indices)
        found |= {f"{prefix}{name}": value for name, value in task_numbers.items()}
    found |= retrieval_numbers(encoded, indices)
    sampled = indices[sample_indices(len(indices), PAIRS)]
    is_right = encoded.is_right[sampled.numpy()]
    texts = encoded.text_features[own_texts(is_right)]
    geometry = consistency_metrics(encoded.image_features[sampled], texts)
    found |= one_index_numbers(
        encoded.image_features[sampled], encoded.text_features, is_right, encoded.means
    )
    # One pair has no uniformity, and two pairs have no correlations.
    return found | {name: float(x) for name, x in geometry.items() if x.isfinite()}


def class_numbers(encoded: Encoded, task: str, indices: Tensor) -> Numbers:
    """Zero-shot and superclass accuracy, and consistency scores, of these images in one task."""
    classes = encoded.data.classes[task]
    labels = classes.labels[indices]
    features = encoded.image_features[indices], encoded.class_features[task]
    ranked = nearest(*features, max(TOP))
    # Top-k is 1 if there are no more than k classes.
    ks = [k for k in TOP if k == 1 or k < len(classes.names)]
    found = {f"top{k}": hit_rate(ranked, labels, k) for k in ks}
    if classes.superclass is not None:
        found |= coarse_and_fine(*features, labels, classes.superclass)
    if task in encoded.neighbour_labels:
        neighbours = encoded.neighbour_labels[task][indices]
        found |= consistency(ranked[:, 0], neighbours)
    return found


def retrieval_numbers(encoded: Encoded, indices: Tensor) -> Numbers:
    """Recall among these images and their texts.

    Without captions, recall is computed only if there are groups, and only from class names to
    images. The other direction would be zero-shot accuracy.
    """
    if encoded.data.captions is None and not encoded.data.groups:
        return {}
    is_right = encoded.is_right[indices.numpy()]
    texts = is_right.sum(axis=0).nonzero()[0]
    recall = retrieval(
        encoded.image_features[indices], encoded.text_features[texts], is_right[:, texts]
    )
    if encoded.data.captions is None:
        return {name: value for name, value in recall.items() if name.startswith("text_to_image")}
    return recall


def sample_indices(count: int, limit: int) -> Tensor:
    """Up to `limit` random indices below `count`, ascending. They are the same in every run."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    return order[:limit].sort().values


def own_texts(is_right: Matches) -> Tensor:
    """The index of one text of each image, its first in the order of the texts: (n,)."""
    ordered = is_right.sorted_indices()
    return torch.from_numpy(ordered.indices[ordered.indptr[:-1]]).long()


def nearest(queries: Tensor, gallery: Tensor, k: int) -> Tensor:
    """The indices of the k gallery rows with the highest cosine, best first: (Q, min(k, G))."""
    k = min(k, len(gallery))
    return torch.cat([(strip @ gallery.T).topk(k).indices for strip in queries.split(STRIP)])


def hit_rate(ranked: Tensor, truth: Tensor, k: int) -> float:
    """The share of queries whose true answer is among the first k answers.

    ranked: (n, at least k), best first. truth: (n,).
    """
    return (ranked[:, :k] == truth[:, None]).any(dim=1).float().mean().item()


def coarse_and_fine(
    image_features: Tensor, class_features: Tensor, labels: Tensor, superclass: Tensor
) -> dict[str, float]:
    """Coarse and fine accuracy: Goel et al. 2022, section 4.3 (k = 1) and supplement (k = 2, 3).

    coarse: is the true superclass among the best k? A superclass has the score of its best class.
    fine: is the true class among the best k classes of the true superclass?

    labels: (n,) classes. superclass: (C,), the superclass of each class.
    """
    groups, group = superclass.unique(return_inverse=True)
    max_k, truth = max(SUPERCLASS_TOP.values()), group[labels]
    scores = image_features @ class_features.T
    superclass_scores = scores.new_full((len(scores), len(groups)), -torch.inf)
    superclass_scores.scatter_reduce_(1, group.expand_as(scores), scores, "amax")
    siblings = scores.masked_fill_(group != truth[:, None], -torch.inf)
    answers = {"coarse": (superclass_scores, truth), "fine": (siblings, labels)}
    return {
        f"{name}{ending}": hit_rate(found.topk(min(max_k, found.shape[1])).indices, right, k)
        for name, (found, right) in answers.items()
        for ending, k in SUPERCLASS_TOP.items()
    }


def ranks(queries: Tensor, gallery: Tensor, is_right: Matches) -> Tensor:
    """The rank of the best right candidate for each query: (Q,), 0 for the first rank.

    It is the number of wrong candidates with at least the same score, so an exact tie counts
    against the model.

    queries: (Q, D). gallery: (G, D). is_right: (Q, G). Every query has a right candidate.
    """
    found = []
    for start in range(0, len(queries), STRIP):
        strip = slice(start, start + STRIP)
        scores, right = queries[strip] @ gallery.T, torch.from_numpy(is_right[strip].toarray())
        best = scores.masked_fill(~right, -torch.inf).amax(dim=1, keepdim=True)
        found.append(((scores >= best) & ~right).sum(dim=1))
    return torch.cat(found)


def retrieval(image_features: Tensor, text_features: Tensor, is_right: Matches) -> dict[str, float]:
    """Recall at 1, 5 and 10 in both directions. Every query is compared with all candidates.

    A query is a hit if any of its right candidates is among the first k. A text that is the caption
    of several images is one candidate, and right for each of these images. As a query it counts
    once for each image.

    image_features: (n, D). text_features: (m, D), of distinct texts. is_right: (n, m), whether a
    text belongs to an image.
    """
    image_ranks = ranks(image_features, text_features, is_right)
    text_ranks = ranks(text_features, image_features, is_right.T.tocsr())
    text_ranks = text_ranks.repeat_interleave(torch.from_numpy(is_right.sum(axis=0)))
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
        numbers[f"consistency_{k}"] = (votes == predicted).float().mean().item()
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
        layer = nn.Linear(features.shape[1], classes)
    optimizer = torch.optim.AdamW(param_groups_weight_decay(layer, 0.01), lr=0.005)
    steps = epochs * -(-len(features) // 128)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(epochs):
        order = torch.randperm(len(features), generator=generator)
        for batch in order.split(128):
            loss = nn.functional.cross_entropy(layer(features[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        right = layer(test_features).argmax(dim=1) == test_labels
    return float(right.float().mean())
