"""The metrics, on features alone: no model, no data set.

Features are (n, D), float32, on any device; but for the linear probe their rows have unit length.
`nearest` and `ranks` go through the queries in strips.
"""

import math
from collections import Counter

import torch
from timm.optim import param_groups_weight_decay  # type: ignore[attr-defined]
from torch import Tensor, nn

STRIP = 1024  # rows at a time
KS = (1, 3, 5, 10)  # neighbours of the consistency score


def nearest(queries: Tensor, gallery: Tensor, k: int) -> Tensor:
    """The k rows of the gallery with the highest cosine, best first: (Q, min(k, G))."""
    k = min(k, len(gallery))
    return torch.cat([(rows @ gallery.T).topk(k).indices for rows in queries.split(STRIP)])


def coarse_and_fine(
    image: Tensor, prompts: Tensor, labels: Tensor, coarse: Tensor
) -> tuple[float, float]:
    """Two shares: superclass right; class right among those of the true superclass.

    As Goel et al. 2022, section 4.3: an image's superclass is that of its most similar class.

    labels: (n,) classes. coarse: (C,), the superclass of each class.
    """
    scores, truth = image @ prompts.T, coarse[labels]
    of_coarse = coarse[scores.argmax(dim=1)] == truth
    of_fine = scores.masked_fill(coarse != truth[:, None], -torch.inf).argmax(dim=1) == labels
    return of_coarse.float().mean().item(), of_fine.float().mean().item()


def ranks(queries: Tensor, gallery: Tensor, pairs: Tensor) -> Tensor:
    """How many wrong candidates score at least as high as the best right one: (Q,), 0 is a hit.

    So an exact tie counts against the model.

    queries: (Q, D). gallery: (G, D). pairs: (P, 2), rows of queries and gallery that belong
    together; every query is in at least one.
    """
    found = []
    for number, rows in enumerate(queries.split(STRIP)):
        scores = rows @ gallery.T
        query, right = pairs[pairs[:, 0] // STRIP == number].unbind(dim=1)
        is_right = torch.zeros_like(scores, dtype=torch.bool)
        is_right[query % STRIP, right] = True
        best = scores.masked_fill(~is_right, -torch.inf).amax(dim=1, keepdim=True)
        found.append(((scores >= best) & ~is_right).sum(dim=1))
    return torch.cat(found)


def retrieval(image: Tensor, text: Tensor, pairs: Tensor) -> dict[str, float]:
    """Recall at 1, 5 and 10, every image against all captions and every caption against all images.

    A query is a hit if any of its partners is among the first k. A text that captions several
    images is one candidate, right for each of them, and as a query counts once for each.

    image: (n, D). text: (m, D), distinct texts. pairs: (P, 2), rows of image and text.
    """
    of_image = ranks(image, text, pairs)
    of_text = ranks(text, image, pairs.flip(1))[pairs[:, 1]]
    both = {"image_to_text": of_image, "text_to_image": of_text}
    return {
        f"{way}_r{k}": (rank < k).float().mean().item()
        for way, rank in both.items()
        for k in (1, 5, 10)
    }


def majority(labels: list[int]) -> int:
    """The most frequent label; on a tie the last one goes, until there is none."""
    (first, votes), *others = Counter(labels).most_common(2)
    return majority(labels[:-1]) if others and others[0][1] == votes else first


def consistency(predicted: Tensor, neighbours: Tensor) -> dict[str, float]:
    """How often the zero-shot label is the majority label of the k nearest training images.

    Goel et al. 2022, section 4.2. On a tie the farthest image goes.

    predicted: (n,). neighbours: (n, up to 10), labels of training images, nearest first.
    """
    rows, numbers = neighbours.tolist(), {}
    for k in (k for k in KS if k <= neighbours.shape[1]):
        votes = torch.tensor([majority(row[:k]) for row in rows])
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
        for rows in order.split(128):
            loss = nn.functional.cross_entropy(layer(features[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        right = layer(test_features).argmax(dim=1) == test_labels
    return float(right.float().mean())


def wilson(share: float, count: float) -> tuple[float, float]:
    """The 95% interval of a share of `count` trials (Wilson 1927)."""
    z2 = 1.96**2
    centre = share + z2 / (2 * count)
    half = math.sqrt(z2 * (share * (1 - share) / count + z2 / (4 * count**2)))
    return (centre - half) / (1 + z2 / count), (centre + half) / (1 + z2 / count)


def chance_of_any(right: float, candidates: float, k: int) -> float:
    """How likely one of `right` of the candidates is among k of them, drawn at random."""
    missed = 1.0
    for drawn in range(k):
        missed *= max(0.0, candidates - right - drawn) / max(1.0, candidates - drawn)
    return 1 - missed
