"""Mixed galleries and shared neighbours, compared with loops; heads on made-up features."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from reference_train.evaluate import interchange


def nearest(query: Tensor, gallery: dict[str, Tensor]) -> list[str]:
    """The names of the three nearest."""
    return sorted(gallery, key=lambda name: -float(query @ gallery[name]))[:3]


def test_mixed_galleries_and_shared_neighbours_agree_with_loops(monkeypatch) -> None:
    monkeypatch.setattr(interchange, "STRIP", 7)
    monkeypatch.setattr(interchange, "NEIGHBOURS", 3)
    images, texts = normalize(torch.randn(40, 4), dim=-1), normalize(torch.randn(45, 4), dim=-1)
    # Image i has texts i and i + 1. The last four belong to no image, so they are in no gallery.
    is_right = (torch.eye(40, 45) + torch.eye(40, 45).roll(1, dims=1)).bool()
    own = texts[:40]
    means = {
        "": torch.zeros(2, 4),
        "_without_means": torch.randn(2, 4) / 2,
        "_without_gallery_means": torch.stack([images.mean(dim=0), texts[:41].mean(dim=0)]),
    }
    given = images, texts, is_right, tuple(means["_without_means"])
    found = interchange.numbers(*given, captions=["a"] * 40, labels=None)
    expected = {"modality_gap": float((images.mean(dim=0) - own.mean(dim=0)).norm())}
    steps = {"": (1, 1), "_tenth_of_texts": (1, 10), "_tenth_of_images": (10, 1)}
    for ending, (image_mean, text_mean) in means.items():
        x, y = normalize(images - image_mean, dim=-1), normalize(texts - text_mean, dim=-1)
        for kind, (image_step, text_step) in steps.items():
            hits, shares = [], []
            for query in is_right[:, :41:text_step].any(dim=1).nonzero()[:, 0].tolist():
                gallery = {f"image {i}": x[i] for i in range(0, 40, image_step) if i != query}
                gallery |= {f"text {i}": y[i] for i in range(0, 41, text_step)}
                names = [name.split() for name in nearest(x[query], gallery)]
                shown = [int(number) for what, number in names if what == "text"]
                hits.append(any(bool(is_right[query, i]) for i in shown))
                shares.append(len(shown) / 3)
            expected[f"mixed_r10{kind}{ending}"] = sum(hits) / len(hits)
            expected[f"mixed_text_share{kind}{ending}"] = sum(shares) / len(shares)
    shared = 0
    for query in range(40):
        others = [i for i in range(40) if i != query]
        tops = [nearest(z[query], {str(i): z[i] for i in others}) for z in (images, own)]
        shared += len(set(tops[0]) & set(tops[1]))
    assert found == pytest.approx(expected | {"shared_neighbours": shared / 120})


def test_heads_see_no_title_twice_and_cross_modalities_without_the_means() -> None:
    """Images and texts of a class differ by a shift. Of titles there are 60, with four images."""
    labels, titles = torch.arange(60).repeat(4) % 3, [str(i) for i in range(60)] * 4
    classes, shift = 4 * torch.eye(3, 32), torch.zeros(32)
    shift[:2] = torch.tensor([-4.0, 4])
    noise = torch.randn(2, 240, 32) / 4
    images, texts = normalize(classes[labels] + noise[0], dim=-1), classes[labels] + noise[1]
    found = interchange.label_numbers(images, normalize(texts + shift, dim=-1), labels, titles)
    assert found["head_image_text"] < 0.7
    assert found["head_image_text_without_means"] > 0.9
    assert found["head_image_image"] == found["v_measure_images"] == 1
    of_titles = normalize(torch.randn(60, 32), dim=-1).repeat(4, 1)  # they say nothing of the class
    for captions, low, high in ((None, 0.7, 1), (titles, 0, 0.5)):
        found = interchange.label_numbers(of_titles, of_titles, labels, captions)
        assert low < found["head_image_image"] < high
