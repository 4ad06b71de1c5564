"""Mixed galleries, compared with loops; neighbours and heads of made-up features."""

from itertools import product
from statistics import fmean, pstdev

import numpy as np
import pytest
import torch
from scipy.sparse import csr_array
from torch.nn.functional import normalize

from reference_train.evaluate import interchange

STEPS = {"": (1, 1), "_tenth_of_texts": (1, 10), "_tenth_of_images": (10, 1)}


def test_one_index_agrees_with_loops(monkeypatch):
    """Image and text queries, by cosine and by scores standardised by modality."""
    monkeypatch.setattr(interchange, "STRIP", 7)
    images = normalize(torch.randn(40, 4), dim=-1)
    texts = normalize(torch.randn(45, 4) + 1, dim=-1)
    # Image i has texts i and i + 1, but the last two have none. Five texts belong to no image.
    is_right = (torch.eye(40, 45) + torch.eye(40, 45).roll(1, dims=1)).bool()
    is_right[38:] = False
    shown = [i for i in range(45) if is_right[:, i].any()]
    means = tuple(torch.randn(2, 4) / 2)
    found = interchange.one_index_numbers(images, texts, csr_array(is_right.numpy()), means)
    subtracted = {
        "": (0, 0),
        "_without_means": means,
        "_without_gallery_means": (images.mean(dim=0), texts[shown].mean(dim=0)),
    }
    for (ending, less), (kind, steps), own in product(subtracted.items(), STEPS.items(), (0, 1)):
        towers = [normalize(x - y, dim=-1) for x, y in zip((images, texts), less, strict=True)]
        index = [range(40)[:: steps[0]], shown[:: steps[1]]]
        right = is_right.T if own else is_right
        for standardized in (False, True):
            hits, num_texts = [], 0
            for query in (range(40), shown)[own]:
                if not right[query, index[1 - own]].any():
                    continue
                answers = []
                for tower in (0, 1):
                    kept = [row for row in index[tower] if (tower, row) != (own, query)]
                    scores = [float(towers[own][query] @ towers[tower][row]) for row in kept]
                    if standardized:
                        centre, spread = fmean(scores), pstdev(scores)
                        scores = [(score - centre) / spread for score in scores]
                    answers += zip(scores, [tower] * len(kept), kept, strict=True)
                best = sorted(answers, reverse=True)[:10]
                hits.append(any(tower != own and right[query, row] for _, tower, row in best))
                num_texts += sum(tower for _, tower, _ in best)
            name = f"{kind}{'_standardized' * standardized}{ending}"
            key = f"mixed{'_text_query' * own}_r10{name}"
            assert (key in found) == (not kind or not (own or standardized))
            if key in found:
                assert found[key] == pytest.approx(fmean(hits)), key
            if key in found and not (own or standardized):
                assert found[f"mixed_text_share{name}"] == pytest.approx(num_texts / 10 / len(hits))


def test_shared_neighbours_are_those_by_hand(monkeypatch):
    monkeypatch.setattr(interchange, "NEIGHBOURS", 1)
    # On an arc the nearest of the images are 1, 0, 1 and 2, and of the texts 1, 2, 1 and 2.
    angles = torch.tensor([[0.0, 1, 3, 7], [0, 5, 6, 8]]) / 10
    images, texts = torch.stack([angles.cos(), angles.sin()], dim=2)
    own = csr_array(np.eye(4, dtype=bool))
    found = interchange.numbers(images, texts, own, None, [*"abcd"], None)
    assert found["shared_neighbours"] == 0.75


def test_heads_and_clusters_need_20_images_of_a_class():
    for count in 39, 40:
        x, own = normalize(torch.randn(count, 3), dim=-1), csr_array(np.eye(count, dtype=bool))
        found = interchange.numbers(x, x, own, None, None, torch.arange(count) % 2)
        assert ("v_measure_mixed" in found) == (count == 40)


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
