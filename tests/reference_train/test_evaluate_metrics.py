"""The metrics of `reference_train evaluate`, against the plain way to compute each."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from reference_train.evaluate import metrics
from reference_train.evaluate.measure import distinct_texts, neighbours_across, pairs_of


def coarse_features(rows: int, seed: int) -> Tensor:
    """Features with many equal products, to see what becomes of ties."""
    return torch.randint(-1, 2, (rows, 3), generator=torch.Generator().manual_seed(seed)).float()


def plain_recall(image: Tensor, captions: list[list[str]], feature: dict[str, Tensor]):
    """Every query ranks every candidate, in loops; a wrong one that scores the same is before."""

    def rank(candidates: Sequence[tuple[float, bool]]) -> int:
        best = max(score for score, right in candidates if right)
        return sum(score >= best for score, right in candidates if not right)

    pairs = zip(image, captions, strict=True)
    scored = [[(float(x @ f), t in own) for t, f in feature.items()] for x, own in pairs]
    of_texts = [of for of in zip(*scored, strict=True) for _, own in of if own]  # of each image
    ranks = {"image_to_text": [*map(rank, scored)], "text_to_image": [*map(rank, of_texts)]}
    return {f"{w}_r{k}": np.less(found, k).mean() for w, found in ranks.items() for k in (1, 5, 10)}


@pytest.mark.parametrize("some", [40, 11])
def test_retrieval_with_several_and_shared_captions(some: int, monkeypatch: pytest.MonkeyPatch):
    """Among all images, and among some, which then have their captions alone."""
    monkeypatch.setattr(metrics, "STRIP", 7)
    captions = [[f"own {i} {j}" for j in range(i % 3 + 1)] for i in range(40)]
    for i in range(0, 40, 4):
        captions[i].append("of several")
    texts, pairs = distinct_texts(captions)
    image, text = coarse_features(40, 0), coarse_features(len(texts), 100)
    rows = torch.randperm(40)[:some].sort().values
    kept, which = pairs_of(rows, pairs)
    theirs = [captions[i] for i in rows.tolist()]
    feature = {t: f for t, f in zip(texts, text, strict=True) if any(t in c for c in theirs)}
    expected = plain_recall(image[rows], theirs, feature)
    assert metrics.retrieval(image[rows], text[which], kept) == pytest.approx(expected)


def test_consistency_score_by_hand():
    neighbours = torch.tensor([[5, 6, 6], [1, 2, 3], [4, 4, 7]])
    # of three: 6; 1 2 3 is a tie, 1 2 is one, so 1; 4
    numbers = metrics.consistency(torch.tensor([6, 1, 7]), neighbours)
    assert numbers == pytest.approx({"consistency_1": 1 / 3, "consistency_3": 2 / 3})
    assert metrics.majority([2, 1, 1, 3, 2, 3]) == 1  # the farthest goes, until there is no tie


def test_superclass_and_class_within_it():
    generator = torch.Generator().manual_seed(0)
    image, prompts = torch.randn(60, 4, generator=generator), torch.randn(9, 4, generator=generator)
    labels = torch.randint(0, 9, (60,), generator=generator)
    coarse = [0, 1, 2, 0, 1, 2, 0, 1, 3]  # the last superclass has one class
    of_coarse = of_fine = 0
    for row, label in zip((image @ prompts.T).tolist(), labels.tolist(), strict=True):
        best_of = [max(row[c] for c in range(9) if coarse[c] == kind) for kind in range(4)]
        of_coarse += best_of.index(max(best_of)) == coarse[label]
        siblings = [c for c in range(9) if coarse[c] == coarse[label]]
        of_fine += max(siblings, key=row.__getitem__) == label
    found = metrics.coarse_and_fine(image, prompts, labels, torch.tensor(coarse))
    assert found == pytest.approx((of_coarse / 60, of_fine / 60))


def test_neighbours_across_groups_are_of_other_groups_and_not_apart():
    names = ["a", "b", "c", "line"] * 5
    groups = {name: torch.arange(i, 20, 4) for i, name in enumerate(names[:4])}
    image = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
    near = neighbours_across(image, groups, frozenset({"line"}))
    for row, found in enumerate(near.tolist()):
        allowed = [i for i in range(20) if names[i] not in (names[row], "line")]
        expected = sorted(allowed, key=lambda i: -float(image[row] @ image[i]))[: len(found)]
        assert found == expected


def test_wilson_as_published():
    assert metrics.wilson(0.5, 100) == pytest.approx((0.4038, 0.5962), abs=5e-5)
    assert metrics.wilson(0.0, 10) == pytest.approx((0, 0.2775), abs=5e-5)


def test_linear_probe_is_the_recipe_of_the_papers_authors():
    """Their cosine of the learning rate in closed form: it falls from 0.005 to 0 in 32 epochs."""
    generator = torch.Generator().manual_seed(1)
    features, test = torch.randn(300, 6, generator=generator), torch.randn(4000, 6)
    labels = (features[:, :4] + torch.randn(300, 4, generator=generator)).argmax(dim=1)
    torch.manual_seed(0)
    layer = nn.Linear(6, 4)
    decays = [{"params": [layer.bias], "weight_decay": 0}, {"params": [layer.weight]}]
    optimizer = torch.optim.AdamW(decays, weight_decay=0.01)
    orders = torch.Generator().manual_seed(0)
    batches = [b for _ in range(32) for b in torch.randperm(300, generator=orders).split(128)]
    for step, rows in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = 0.0025 * (1 + math.cos(math.pi * step / len(batches)))
        optimizer.zero_grad()
        nn.functional.cross_entropy(layer(features[rows]), labels[rows]).backward()
        optimizer.step()
    # right for each of the test's images, or for all but a few where it is nearly undecided
    assert metrics.linear_probe(features, labels, test, layer(test).argmax(dim=1), 4) > 0.9996
