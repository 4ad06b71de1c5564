"""Which metrics a data set has, and their numbers for one model."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Subset

from cyclip_loss.metrics import consistency_metrics

from . import metrics
from .checkpoints import Clip
from .datasets import DataSet, sample_rows

NEIGHBOURS_FROM = 50_000  # training images the neighbours come from, as the paper's for ImageNet
PAIRS = 10_000  # of gaps, alignment and uniformity, which take O(pairs^2)

Numbers = dict[str, float]


def measure(clip: Clip, data: DataSet, linear_probe: bool = False) -> dict[str, Any]:
    """All numbers of a data set, as shares (not %). Pictures that can't be read are left out.

    linear_probe: fit one, where there is a train split, on all of it.

    Returns {"numbers": {metric: value}, "groups": {group: {metric: value}}, "images": how many,
             "unreadable": [what is wrong with each picture that is left out]}.
    """
    device = clip.device
    raw, unreadable = clip.encode_images(data.images, "test")
    data = data.only(readable(len(data.images), unreadable))
    raw = raw.to(device)
    image = F.normalize(raw, dim=-1)
    prompts = {
        question: clip.encode_classes(classes.names, classes.templates).to(device)
        for question, classes in data.classes.items()
    }
    labels = {question: classes.labels.to(device) for question, classes in data.classes.items()}
    predicted = {q: metrics.nearest(image, p, 5) for q, p in prompts.items()}
    neighbours: dict[str, Tensor] = {}  # labels of the nearest images, (n, k)
    probe: Numbers = {}
    if data.train is not None:
        train_images, train_labels = data.train
        # the linear probe takes all of them, the neighbours some
        rows = sample_rows(len(train_images), NEIGHBOURS_FROM)
        encoded = torch.arange(len(train_images)) if linear_probe else rows
        subset: Any = Subset(train_images, encoded.tolist())  # type: ignore[arg-type]
        features, broken = clip.encode_images(subset, "train")
        unreadable |= {len(data.images) + row: why for row, why in broken.items()}
        encoded = encoded[readable(len(encoded), broken)]
        features = features.to(device)
        train_labels = {q: label[encoded].to(device) for q, label in train_labels.items()}
        if linear_probe:
            probe["linear_probe"] = metrics.linear_probe(
                features, train_labels[""], raw, labels[""], len(data.classes[""].names)
            )
        gallery = torch.isin(encoded, rows).to(device)
        known = F.normalize(features[gallery], dim=-1)
        near = metrics.nearest(image, known, max(metrics.KS))
        neighbours = {q: label[gallery][near] for q, label in train_labels.items()}
    elif data.across_groups and labels:
        near = neighbours_across(image, data)
        neighbours = {question: label[near] for question, label in labels.items()}
    texts, pairs = distinct_texts(data.captions or [])
    text = clip.encode_texts(texts).to(device) if texts else None
    if data.names_find_images:
        text = prompts[""]
        pairs = torch.stack((torch.arange(len(image)), labels[""].cpu()), dim=1)
    pairs = pairs.to(device)

    def numbers_of(rows: Tensor) -> Numbers:
        """rows: (m,), of some of the images."""
        x, numbers = image[rows], {}
        for question, classes in data.classes.items():
            start = f"{question}_" if question else ""
            label, found = labels[question][rows], predicted[question][rows]
            hits = found == label[:, None]
            numbers[f"{start}top1"] = share(hits[:, 0])
            if len(classes.names) > 5:
                numbers[f"{start}top5"] = share(hits.any(dim=1))
            if classes.coarse is not None:
                both = metrics.coarse_and_fine(
                    x, prompts[question], label, classes.coarse.to(device)
                )
                numbers |= dict(zip((f"{start}coarse", f"{start}fine"), both, strict=True))
            if question in neighbours:
                scores = metrics.consistency(found[:, 0], neighbours[question][rows])
                numbers |= {start + name: value for name, value in scores.items()}
        if text is not None:
            kept, texts_of_rows = pairs_of(rows, pairs)
            ways = metrics.retrieval(x, text[texts_of_rows], kept)
            # of names, the other way is top-1, which has more of them to choose from
            numbers |= {
                name: value
                for name, value in ways.items()
                if not (data.names_find_images and name.startswith("image"))
            }
            partner = text[texts_of_rows[first_partner(kept)]]
        else:
            question = next(iter(data.classes))
            partner = prompts[question][labels[question][rows]]
        some = sample_rows(len(rows), PAIRS).to(device)
        geometry = consistency_metrics(x[some], partner[some])
        geometry_numbers = {name: value.item() for name, value in geometry.items()}
        # the uniformity of one image is no number
        return numbers | {name: v for name, v in geometry_numbers.items() if math.isfinite(v)}

    groups = {
        group: numbers_of(rows.to(device)) for group, rows in rows_of_groups(data.groups).items()
    }
    if data.across_groups:
        numbers = mean([n for group, n in groups.items() if group not in data.apart])
    else:
        numbers = numbers_of(torch.arange(len(image), device=device)) | probe
    left_out = {"images": len(image), "unreadable": list(unreadable.values())}
    return {"numbers": numbers, "groups": groups, **left_out}


def readable(count: int, unreadable: dict[int, str]) -> Tensor:
    """The rows of `count` that could be read."""
    return torch.tensor([row for row in range(count) if row not in unreadable])


def neighbours_across(image: Tensor, data: DataSet) -> Tensor:
    """For each image the nearest ones of other groups, but of those apart: (n, up to 10) rows."""
    groups = {group: rows.to(image.device) for group, rows in rows_of_groups(data.groups).items()}
    others = {
        group: torch.cat([r for g, r in groups.items() if g != group and g not in data.apart])
        for group in groups
    }
    k = min(max(metrics.KS), *(len(rows) for rows in others.values()))
    near = torch.empty(len(image), k, dtype=torch.long, device=image.device)
    for group, mine in groups.items():
        gallery = others[group]
        near[mine] = gallery[metrics.nearest(image[mine], image[gallery], k)]
    return near


def rows_of_groups(groups: list[str] | None) -> dict[str, Tensor]:
    """The rows of each group."""
    rows: dict[str, list[int]] = {}
    for row, group in enumerate(groups or []):
        rows.setdefault(group, []).append(row)
    return {group: torch.tensor(members) for group, members in rows.items()}


def distinct_texts(captions: list[list[str]]) -> tuple[list[str], Tensor]:
    """The distinct texts, and the pairs (image, text), an image's first caption first: (P, 2)."""
    index: dict[str, int] = {}
    pairs = [
        (row, index.setdefault(text, len(index)))
        for row, texts in enumerate(captions)
        for text in dict.fromkeys(texts)
    ]
    return list(index), torch.tensor(pairs, dtype=torch.long).view(-1, 2)


def pairs_of(rows: Tensor, pairs: Tensor) -> tuple[Tensor, Tensor]:
    """The pairs of some images, in the numbers of these images and of the texts that they have.

    Returns (Q, 2) pairs and (m,) which texts these are.
    """
    place = rows.new_full((int(pairs[:, 0].max()) + 1,), -1)
    place[rows] = torch.arange(len(rows), device=rows.device)
    image = place[pairs[:, 0]]
    texts, text = pairs[image >= 0, 1].unique(return_inverse=True)
    return torch.stack((image[image >= 0], text), dim=1), texts


def first_partner(pairs: Tensor) -> Tensor:
    """The text of each image's first pair: (n,)."""
    order = pairs[:, 0].argsort(stable=True)
    image, text = pairs[order].unbind(dim=1)
    starts = torch.ones_like(image, dtype=torch.bool)
    starts[1:] = image[1:] != image[:-1]
    return text[starts]


def mean(several: list[Numbers]) -> Numbers:
    """The plain mean of each number."""
    return {name: sum(n[name] for n in several) / len(several) for name in several[0]}


def share(right: Tensor) -> float:
    """The share that is right."""
    return right.float().mean().item()
