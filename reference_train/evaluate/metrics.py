"""The metrics, on features alone: no model, no data set.

Features are (n, D), float32, on any device; but for the linear probe their rows have unit length.
What is n x m is computed in strips of rows.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

STRIP = 1024  # rows at a time
KS = (1, 3, 5, 10)  # neighbours of the consistency score


def strips(rows: int) -> Iterator[slice]:
    """Slices that together are all rows."""
    return (slice(start, start + STRIP) for start in range(0, rows, STRIP))


def nearest(queries: Tensor, gallery: Tensor, k: int) -> Tensor:
    """The k rows of the gallery with the highest cosine, best first: (Q, min(k, G)).

    Of images (Q, D) among the features of classes (G, D): the zero-shot labels.
    """
    k = min(k, len(gallery))
    found = [(queries[rows] @ gallery.T).topk(k).indices for rows in strips(len(queries))]
    return torch.cat(found)


def coarse_and_fine(
    image: Tensor, prompts: Tensor, labels: Tensor, coarse: Tensor
) -> tuple[float, float]:
    """Two shares: superclass right; class right among those of the true superclass.

    As Goel et al. 2022, section 4.3: an image's superclass is that of its most similar class.

    labels: (n,) classes. coarse: (C,), the superclass of each class.
    """
    right = image.new_zeros(2)
    for rows in strips(len(image)):
        scores = image[rows] @ prompts.T
        truth = coarse[labels[rows]]
        right[0] += (coarse[scores.argmax(dim=1)] == truth).sum()
        scores.masked_fill_(coarse != truth[:, None], -torch.inf)
        right[1] += (scores.argmax(dim=1) == labels[rows]).sum()
    of_coarse, of_fine = (right / len(image)).tolist()
    return of_coarse, of_fine


def ranks(queries: Tensor, gallery: Tensor, pairs: Tensor) -> Tensor:
    """How many wrong candidates score at least as high as the best right one: (Q,), 0 is a hit.

    So an exact tie counts against the model.

    queries: (Q, D). gallery: (G, D). pairs: (P, 2), rows of queries and gallery that belong
    together; every query is in at least one.
    """
    pairs = pairs[pairs[:, 0].argsort()]
    found = []
    for rows in strips(len(queries)):
        scores = queries[rows] @ gallery.T
        first, last = torch.searchsorted(
            pairs[:, 0].contiguous(), pairs.new_tensor([rows.start, rows.start + len(scores)])
        )
        query, right = pairs[first:last].unbind(dim=1)
        is_right = torch.zeros_like(scores, dtype=torch.bool)
        is_right[query - rows.start, right] = True
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
    of_text = ranks(text, image, pairs.flip(1))
    uses = torch.bincount(pairs[:, 1], minlength=len(text)).float()
    numbers = {}
    for k in (1, 5, 10):
        numbers[f"image_to_text_r{k}"] = (of_image < k).float().mean().item()
    for k in (1, 5, 10):
        numbers[f"text_to_image_r{k}"] = ((of_text < k) * uses).sum().div(uses.sum()).item()
    return numbers


def majority(labels: Tensor) -> Tensor:
    """The most frequent label of each row: (n,). On a tie the farthest goes, until there is none.

    labels: (n, k), of neighbours, nearest first.
    """
    same = labels[:, :, None] == labels[:, None, :]  # (n, k, k)
    winner = labels[:, 0].clone()
    open_rows = torch.ones(len(labels), dtype=torch.bool, device=labels.device)
    for k in range(labels.shape[1], 2, -1):
        votes = same[:, :k, :k].sum(dim=2)  # (n, k): how many share the label of neighbour j
        most, place = votes.max(dim=1)
        # as many neighbours have a label with the most votes as it has votes: no other label does
        clear = (votes == most[:, None]).sum(dim=1) == most
        settled = open_rows & clear
        winner[settled] = labels.gather(1, place[:, None])[settled, 0]
        open_rows &= ~clear
    return winner  # of two the nearest, whether they agree or not


def consistency(predicted: Tensor, neighbours: Tensor) -> dict[str, float]:
    """How often the zero-shot label is the majority label of the k nearest training images.

    Goel et al. 2022, section 4.2.

    predicted: (n,). neighbours: (n, up to 10), labels of training images, nearest first.
    """
    return {
        f"consistency_{k}": (majority(neighbours[:, :k]) == predicted).float().mean().item()
        for k in KS
        if k <= neighbours.shape[1]
    }


def linear_probe(
    features: Tensor, labels: Tensor, test_features: Tensor, test_labels: Tensor, classes: int
) -> float:
    """Test accuracy of a linear layer on frozen features, trained as the paper's authors do.

    AdamW for 32 epochs in batches of 128, learning rate 0.005 on a cosine to 0, weight decay 0.01
    (none on the bias); the features are not normalised, and the last epoch counts.

    features: (n, D), labels: (n,), of the training images.
    """
    epochs, batch_size = 32, 128
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(features.shape[1], classes)
    bound = features.shape[1] ** -0.5  # PyTorch's own, from a generator of ours
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.uniform_(-bound, bound, generator=generator)
    layer.to(features.device)
    weight: dict[str, Any] = {"params": [layer.weight], "weight_decay": 0.01}
    optimizer = torch.optim.AdamW([weight, {"params": [layer.bias], "weight_decay": 0.0}], lr=0.005)
    steps = epochs * -(-len(features) // batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(epochs):
        order = torch.randperm(len(features), generator=generator).to(features.device)
        for rows in order.split(batch_size):
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
    """How likely one of `right` of the candidates is among k of them that are drawn by lot."""
    missed = 1.0
    for drawn in range(k):
        missed *= max(0.0, candidates - right - drawn) / max(1.0, candidates - drawn)
    return 1 - missed
