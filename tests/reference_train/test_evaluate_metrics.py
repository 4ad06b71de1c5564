"""The numbers of `evaluate`, compared with plain loops."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks.measure import allocated_peak
from reference_train.evaluate import metrics
from reference_train.evaluate.datasets import Classes, Dataset, Images

CPU = torch.device("cpu")


def recalls(scores, is_right):
    """The ranks are counted for each query. In a tie, wrong candidates come first."""
    found = {}
    for name, x, right in (
        ("image_to_text", scores, is_right),
        ("text_to_image", scores.T, is_right.T),
    ):
        ranks = [
            int(((row >= row[own].max()) & ~own).sum())
            for row, own in zip(x, right, strict=True)
            # A text counts once for each of its images.
            for _ in range(int(own.sum()) if name == "text_to_image" else 1)
        ]
        found |= {f"{name}_r{k}": np.less(ranks, k).mean() for k in (1, 5, 10)}
    return found


def measure(images, data, texts, **options):
    """`metrics.measure` of a model that gives these features of images and of texts."""
    clip = SimpleNamespace(
        device=CPU,
        encode_classes=lambda names, _: torch.stack([texts[name] for name in names]),
        encode_texts=lambda captions: torch.stack([texts[text] for text in captions]),
        encode_images=lambda shown, indices: images[indices],
    )
    return metrics.measure(clip, data, **options)


@pytest.mark.parametrize(
    "groups", [{"": range(40)}, {"a": range(0, 40, 2), "b": range(1, 40, 2)}], ids=len
)
def test_retrieval_with_several_and_shared_captions_agrees_with_loops(groups, monkeypatch):
    """With all images, and in each of two groups with only its images and their captions."""
    monkeypatch.setattr(metrics, "STRIP", 7)
    monkeypatch.setattr(nn.functional, "normalize", lambda x, dim: x)
    captions = [[f"own {i} {j}" for j in range(i % 3 + 1)] for i in range(40)]
    for own in captions[::4]:
        own.append("of several")
    # Features with few different values have many equal products, so that there are ties.
    images = torch.randint(-1, 2, (40, 3)).float()
    texts = {text: torch.randint(-1, 2, (3,)).float() for own in captions for text in own}
    data = Dataset(Images(torch.zeros(40, 3, 1, 1)), captions=captions)
    if len(groups) > 1:
        data.groups = [*"ab" * 20]
    measured = measure(images, data, texts)
    for group, chosen in groups.items():
        own = [captions[i] for i in chosen]
        shown = list(dict.fromkeys(text for x in own for text in x))
        scores = images[list(chosen)] @ torch.stack([texts[text] for text in shown]).T
        expected = recalls(scores, torch.tensor([[text in x for text in shown] for x in own]))
        numbers = measured["groups"].get(group, measured["numbers"])
        assert {name: numbers[name] for name in expected} == pytest.approx(expected)


def test_no_matrix_of_all_images_and_texts_is_made(monkeypatch):
    """A byte for each pair would take 16 MB."""
    monkeypatch.setattr(metrics, "STRIP", 50)
    monkeypatch.setattr(metrics, "PAIRS", 50)
    texts = {str(i): torch.randn(2) for i in range(4000)}
    data = Dataset(Images(torch.zeros(4000, 3, 1, 1)), captions=[[text] for text in texts])
    images = torch.randn(4000, 2)
    assert allocated_peak(CPU, lambda: measure(images, data, texts)) < 4e6


def test_a_tie_of_neighbours_drops_the_farthest():
    neighbours = torch.tensor([[5, 6, 6], [1, 2, 3], [4, 4, 7]])
    # The majorities of three are 6, 1 (1 2 3 is a tie, and so is 1 2) and 4.
    numbers = metrics.consistency(torch.tensor([6, 1, 7]), neighbours)
    assert numbers == pytest.approx({"consistency_1": 1 / 3, "consistency_3": 2 / 3})


def test_coarse_and_fine_accuracy_are_those_counted_by_hand():
    """A superclass scores as its best class."""
    superclass = torch.tensor([0, 7, 0, 7, 2])  # numbers with a gap; the last has one class
    # Of the superclasses the right one is the first, the third and the second. Of its own classes
    # the right one is the second, the second and the only one.
    scores = torch.tensor(
        [[0.9, 0.8, 0.1, 0.7, 0.0], [0.5, 0.2, 0.4, 0.1, 0.9], [0.5, 0.6, 0.1, 0.1, 0.55]]
    )
    given = scores, torch.eye(5), torch.tensor([2, 3, 4])
    found = metrics.coarse_and_fine(*given, superclass)
    expected = {"coarse": 1 / 3, "coarse_top2": 2 / 3, "coarse_top3": 1}
    expected |= {"fine": 1 / 3, "fine_top2": 1, "fine_top3": 1}
    assert found == pytest.approx(expected)
    one = metrics.coarse_and_fine(*given, superclass * 0)
    assert (one["coarse"], one["coarse_top3"]) == (1, 1)  # there is no other superclass


def test_the_linear_probe_has_the_accuracy_of_the_authors_recipe():
    """It was compared with their code: 32 epochs of AdamW along a cosine, without normalising."""
    features, test = torch.randn(300, 6), torch.randn(4000, 6)
    labels = (features[:, :4] + torch.randn(300, 4)).argmax(dim=1)
    found = metrics.fit_linear_probe(features, labels, test, test[:, :4].argmax(dim=1), 4)
    assert found == pytest.approx(2799 / 4000, abs=3e-4)


def test_a_metric_that_a_style_or_a_task_lacks_is_left_out():
    pictures, texts = torch.nn.functional.normalize(torch.randn(2, 7, 5), dim=-1)
    names = torch.tensor([3, 0, 1, 0, 2, 3, 4])
    classes = {"": Classes(names, [*"uvwxyz"], ["{}"]), "group": Classes(0 * names, ["g"], ["{}"])}
    train = Images(pictures), {"group": names}
    data = Dataset(Images(pictures), classes, groups=[*"aaaaabb"], train=train)
    features = dict(zip("uvwxyzg", texts, strict=True))
    found = measure(pictures, data, features, linear_probe=True)
    # Style b has two pairs, which are too few for a correlation.
    assert "inmodal_correlation" not in found["numbers"]
    tops = {name for name in found["numbers"] if "top" in name}
    assert tops == {"top1", "top3", "top5", "group_top1"}
    assert {"text_to_image_r1"} == {name for name in found["numbers"] if name.endswith("_r1")}
