"""The metrics of `evaluate`, computed from features.

Features are (n, D), float32, on any device. Their rows have unit length, except for the linear
probe. Queries are compared with the gallery in strips, so that memory stays small.
"""

import math
from collections import Counter

import torch
from timm.optim import param_groups_weight_decay  # type: ignore[attr-defined]
from torch import Tensor, nn

STRIP = 1024  # queries that are compared with the gallery in one product
TOP = (1, 3, 5, 10)  # zero-shot: is the class among the k nearest?
SUPERCLASS_TOP = (1, 2, 3)
CONSISTENCY_NEIGHBOURS = (1, 3, 5, 10)
RECALL_AT = (1, 5, 10)


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


def linear_probe(
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


def wilson(share: float, count: float) -> tuple[float, float]:
    """The 95% interval (Wilson 1927) of a share of `count` trials."""
    z2 = 1.96**2
    centre = share + z2 / (2 * count)
    half = math.sqrt(z2 * (share * (1 - share) / count + z2 / (4 * count**2)))
    return (centre - half) / (1 + z2 / count), (centre + half) / (1 + z2 / count)


def chance_of_any(right: float, candidates: float, k: int) -> float:
    """The probability that k random candidates include at least one of the `right` ones."""
    all_wrong = 1.0
    for i in range(k):
        all_wrong *= max(0.0, candidates - right - i) / max(1.0, candidates - i)
    return 1 - all_wrong
