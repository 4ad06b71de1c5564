"""Mixed galleries, compared with loops; neighbours and heads of made-up features."""

from statistics import fmean, pstdev

import numpy as np
import pytest
import torch
from scipy.sparse import csr_array
from torch.nn.functional import normalize

from reference_train.evaluate import interchange


def test_mixed_galleries_agree_with_loops(monkeypatch):
    monkeypatch.setattr(interchange, "STRIP", 7)
    monkeypatch.setattr(interchange, "NEIGHBOURS", 3)
    images, texts = (normalize(torch.randn(n, 4), dim=-1) for n in (40, 45))
    # Image i has texts i and i + 1. The last four belong to no image, so they are in no gallery.
    is_right = (torch.eye(40, 45) + torch.eye(40, 45).roll(1, dims=1)).bool()
    matches = csr_array(is_right.numpy())
    means = tuple(torch.randn(2, 4) / 2)
    found = interchange.gallery_numbers(images, texts, matches, means)
    steps = {"": (1, 1), "_tenth_of_texts": (1, 10), "_tenth_of_images": (10, 1)}
    for kind, (image_step, text_step) in steps.items():
        hits, num_texts = [], 0
        for query in is_right[:, :41:text_step].any(dim=1).nonzero()[:, 0].tolist():
            gallery = [(images[i], -1) for i in range(0, 40, image_step) if i != query]
            gallery += [(texts[i], i) for i in range(0, 41, text_step)]
            gallery.sort(key=lambda row: -float(images[query] @ row[0]))
            shown = [i for _, i in gallery[:3] if i >= 0]
            hits.append(bool(is_right[query, shown].any()))
            num_texts += len(shown)
        assert found[f"mixed_r10{kind}"] == pytest.approx(sum(hits) / len(hits))
        assert found[f"mixed_text_share{kind}"] == pytest.approx(num_texts / 3 / len(hits))
    gallery_means = images.mean(dim=0), texts[:41].mean(dim=0)
    for ending, pair in (("_without_means", means), ("_without_gallery_means", gallery_means)):
        less = (normalize(x - y, dim=-1) for x, y in zip((images, texts), pair, strict=True))
        expected = interchange.gallery_numbers(*less, matches, None)
        assert found["mixed_r10" + ending] == pytest.approx(expected["mixed_r10"])


def test_one_index_agrees_with_loops(monkeypatch):
    """Image and text queries, by cosine and by scores standardised by modality."""
    monkeypatch.setattr(interchange, "STRIP", 7)
    monkeypatch.setattr(interchange, "NEIGHBOURS", 3)
    images = normalize(torch.randn(40, 4), dim=-1)
    texts = normalize(torch.randn(25, 4) + 1, dim=-1)
    # Two images of each of 19 texts, two images without a text, six texts without an image.
    is_right = torch.zeros(40, 25).bool()
    is_right[torch.arange(38), torch.arange(38) % 19] = True
    matches = csr_array(is_right.numpy())
    means = tuple(torch.randn(2, 4) / 2)
    found = interchange.one_index_numbers(images, texts, matches, means)
    assert found["mixed_r10"] == pytest.approx(
        interchange.gallery_numbers(images, texts, matches, None)["mixed_r10"]
    )
    for ending, (of_images, of_texts) in (("", (0, 0)), ("_without_means", means)):
        x, y = normalize(images - of_images, dim=-1), normalize(texts - of_texts, dim=-1)
        shown = [j for j in range(25) if is_right[:, j].any()]
        towers = {"image": (x, range(40)), "text": (y, shown)}
        for name, own, other in (("mixed", "image", "text"), ("mixed_text_query", "text", "image")):
            for standardized in (False, True):
                hits = []
                for query in towers[own][1]:
                    right = is_right[query] if own == "image" else is_right[:, query]
                    if not right.any():
                        continue
                    answers = []
                    for kind, (features, rows) in towers.items():
                        kept = [row for row in rows if (kind, row) != (own, query)]
                        scores = [float(towers[own][0][query] @ features[row]) for row in kept]
                        if standardized:
                            centre, spread = fmean(scores), pstdev(scores)
                            scores = [(score - centre) / spread for score in scores]
                        answers += zip(scores, [kind] * len(kept), kept, strict=True)
                    best = sorted(answers, reverse=True)[:3]
                    hits.append(any(kind == other and right[row] for _, kind, row in best))
                key = f"{name}_r10{'_standardized' * standardized}{ending}"
                assert found[key] == pytest.approx(fmean(hits)), key


def test_shared_neighbours_are_those_by_hand(monkeypatch):
    monkeypatch.setattr(interchange, "NEIGHBOURS", 1)
    # On an arc the nearest of the images are 1, 0, 1 and 2, and of the texts 1, 2, 1 and 2.
    angles = torch.tensor([[0.0, 1, 3, 7], [0, 5, 6, 8]]) / 10
    images, texts = torch.stack([angles.cos(), angles.sin()], dim=2)
    own = csr_array(np.eye(4, dtype=bool))
    found = interchange.numbers(images, texts, own, None, [*"abcd"], None)
    assert found["shared_neighbours"] == 0.75


def test_heads_see_no_title_twice_and_cross_modalities_without_the_means():
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


def test_a_head_is_judged_by_the_labels_that_it_saw():
    """It is fitted on e, f and g. If these have one label, there is no head."""
    titles = [*"abcdefgh"] * 20
    for label_of_g, has_heads in (1, True), (0, False):
        classes = {**dict.fromkeys("abcdefgh", 0), "a": 2, "g": label_of_g}
        labels = torch.tensor([classes[title] for title in titles])
        images = normalize(torch.eye(3)[labels] + torch.randn(160, 3) / 32, dim=-1)
        found = interchange.label_numbers(images, images, labels, titles)
        assert found.get("head_image_image") == (1 if has_heads else None)
