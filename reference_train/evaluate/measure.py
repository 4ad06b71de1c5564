"""Which metrics a data set has, and their numbers for one model."""

import base64
import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from cyclip_loss.metrics import consistency_metrics

from . import metrics
from .checkpoints import Clip
from .datasets import DataSet

NEIGHBOURS_FROM = 50_000  # training images the neighbours come from, as the paper's for ImageNet
PAIRS = 10_000  # of gaps, alignment and uniformity, which take O(pairs^2)
PAIRS_PICTURED = 60  # pairs whose similarities are kept for a picture

Numbers = dict[str, float]


def measure(
    clip: Clip, data: DataSet, linear_probe: bool = False, pictured: bool = False
) -> dict[str, Any]:
    """All numbers of a data set, as shares (not %). Pictures that can't be read are left out.

    linear_probe: fit one, where there is a train split, on all of it. pictured: keep similarities.

    Returns {"numbers": {metric: value}, "groups": {group: {metric: value}}, "images": how many,
             "unreadable": [what is wrong with each picture that is left out],
             "similarities": if `pictured`, of `PAIRS_PICTURED` pairs, by `similarities`}.
    """
    device = clip.device
    raw, read, unreadable = clip.encode_images(data.images, torch.arange(len(data.images)), "test")
    data, raw = data.only(read), raw.to(device)
    image = F.normalize(raw, dim=-1)
    prompts, labels, predicted = {}, {}, {}
    for question, classes in data.classes.items():
        prompts[question] = clip.encode_classes(classes.names, classes.templates).to(device)
        labels[question] = classes.labels.to(device)
        predicted[question] = metrics.nearest(image, prompts[question], 5)
    groups: dict[str, Tensor] = {}  # the rows of each
    for group in dict.fromkeys(data.groups or []):
        rows = [row for row, of in enumerate(data.groups or []) if of == group]
        groups[group] = torch.tensor(rows, device=device)
    neighbours: dict[str, Tensor] = {}  # labels of the nearest images, (n, k)
    probe: Numbers = {}
    if data.train is not None:
        images, of_images = data.train
        # the linear probe takes all of them, the neighbours some
        some = sample_rows(len(images), NEIGHBOURS_FROM)
        wanted = torch.arange(len(images)) if linear_probe else some
        features, read, broken = clip.encode_images(images, wanted, "train")
        unreadable, features = unreadable + broken, features.to(device)
        of_images = {q: label[read].to(device) for q, label in of_images.items()}
        if linear_probe:
            probe["linear_probe"] = metrics.linear_probe(
                features, of_images[""], raw, labels[""], len(data.classes[""].names)
            )
        gallery = torch.isin(read, some).to(device)
        known = F.normalize(features[gallery], dim=-1)
        near = metrics.nearest(image, known, max(metrics.KS))
        neighbours = {q: label[gallery][near] for q, label in of_images.items()}
    elif data.across_groups and labels:
        near = neighbours_across(image, groups, data.apart)
        neighbours = {question: label[near] for question, label in labels.items()}
    if data.captions is not None:
        texts, pairs = distinct_texts(data.captions)
        text = clip.encode_texts(texts).to(device)
    else:  # the names of the classes
        question, classes = next(iter(data.classes.items()))
        text = prompts[question]
        pairs = torch.stack((torch.arange(len(image)), classes.labels), dim=1)
    pairs = pairs.to(device)
    everything = torch.arange(len(image), device=device)
    first = pairs[torch.searchsorted(pairs[:, 0].contiguous(), everything), 1]  # of an image, (n,)

    def numbers_of(rows: Tensor) -> Numbers:
        """rows: (m,), of some of the images, ascending."""
        x, numbers = image[rows], {}
        for question, classes in data.classes.items():
            start = f"{question}_" if question else ""
            label, found = labels[question][rows], predicted[question][rows]
            hits = (found == label[:, None]).float()
            numbers[f"{start}top1"] = hits[:, 0].mean().item()
            if len(classes.names) > 5:
                numbers[f"{start}top5"] = hits.sum(dim=1).mean().item()
            if classes.coarse is not None:
                coarse = classes.coarse.to(device)
                both = metrics.coarse_and_fine(x, prompts[question], label, coarse)
                numbers |= dict(zip((f"{start}coarse", f"{start}fine"), both, strict=True))
            if question in neighbours:
                scores = metrics.consistency(found[:, 0], neighbours[question][rows])
                numbers |= {start + name: value for name, value in scores.items()}
        if data.captions is not None or data.across_groups:
            kept, used = pairs_of(rows, pairs)
            ways = metrics.retrieval(x, text[used], kept)
            if data.captions is None:  # top-1 has more names to choose from
                ways = {name: n for name, n in ways.items() if name.startswith("text")}
            numbers |= ways
        some = sample_rows(len(x), PAIRS).to(device)
        return numbers | geometry(x[some], text[first[rows[some]]])

    of_groups = {group: numbers_of(rows) for group, rows in groups.items()}
    if data.across_groups:
        several = [found for group, found in of_groups.items() if group not in data.apart]
        names = [name for name in several[0] if all(name in found for found in several)]
        numbers = {name: sum(n[name] for n in several) / len(several) for name in names}
    else:
        numbers = numbers_of(everything) | probe
    measured: dict[str, Any] = {"numbers": numbers, "groups": of_groups, "images": len(image)}
    if pictured:
        shown = pictured_rows(next(iter(groups.values()), everything), first, labels)
        measured["similarities"] = similarities(image[shown], text[first[shown]])
    return measured | {"unreadable": unreadable}


def geometry(image: Tensor, text: Tensor) -> Numbers:
    """`consistency_metrics` of (n, D) pairs, without those that are undefined.

    One image has no uniformity, and two pairs have no correlations.
    """
    found = consistency_metrics(image, text)
    return {name: float(value) for name, value in found.items() if math.isfinite(value)}


def pictured_rows(rows: Tensor, text: Tensor, labels: dict[str, Tensor]) -> Tensor:
    """Up to `PAIRS_PICTURED` of the rows, with different texts, ordered by the coarsest label.

    rows: (m,). text: (n,), which text each image has. labels: (n,) by question, coarsest last.
    """
    of_texts = {int(text[row]): row for row in rows.flip(0).tolist()}  # of each the first
    rows = torch.tensor(sorted(of_texts.values()))
    rows = rows[sample_rows(len(rows), PAIRS_PICTURED)].to(text.device)
    for label in labels.values():
        rows = rows[label[rows].argsort(stable=True)]
    return rows


def similarities(image: Tensor, text: Tensor) -> dict[str, Any]:
    """What a picture shows of some pairs.

    image, text: (n, D), rows of unit length.

    Returns {"numbers": those of `geometry`,
             "matrices": base64 of (3, n, n) int8: 127 times I_i . I_j, T_i . T_j, I_i . T_j}.
    """
    products = torch.stack((image @ image.T, text @ text.T, image @ text.T))
    rounded = (127 * products).round().to(torch.int8).cpu().numpy()
    matrices = base64.b64encode(rounded.tobytes()).decode()
    return {"numbers": geometry(image, text), "matrices": matrices}


def sample_rows(rows: int, most: int) -> Tensor:
    """At most `most` of `rows` numbers in order, the same in every run: (min(rows, most),)."""
    drawn = torch.randperm(rows, generator=torch.Generator().manual_seed(0))
    return drawn[:most].sort().values


def neighbours_across(image: Tensor, groups: dict[str, Tensor], apart: frozenset[str]) -> Tensor:
    """For each image the nearest ones of other groups, but of those apart: (n, up to 10) rows.

    groups: the rows of each.
    """
    others = {
        group: torch.cat([r for g, r in groups.items() if g != group and g not in apart])
        for group in groups
    }
    k = min(max(metrics.KS), *(len(rows) for rows in others.values()))
    near = torch.empty(len(image), k, dtype=torch.long, device=image.device)
    for group, mine in groups.items():
        gallery = others[group]
        near[mine] = gallery[metrics.nearest(image[mine], image[gallery], k)]
    return near


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

    rows: (m,), ascending, as the pairs' images. Returns (Q, 2) pairs and (t,) which texts.
    """
    image, text = pairs[torch.isin(pairs[:, 0], rows)].unbind(dim=1)
    used, text = text.unique(return_inverse=True)
    return torch.stack((torch.searchsorted(rows, image.contiguous()), text), dim=1), used
