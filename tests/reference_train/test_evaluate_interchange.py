"""Mixed galleries, compared with loops; neighbours and heads of made-up features."""

from itertools import product

import numpy as np
import pytest
import torch
from scipy.sparse import csr_array
from torch.nn.functional import normalize

from reference_train.evaluate import interchange


def test_one_index_agrees_with_loops(monkeypatch):
    """Image and text queries, by cosine and by scores standardised by modality."""
    monkeypatch.setattr(interchange, "STRIP", 7)
    # Rows 0 to 39 are images, and the others texts. Image i has the texts 40 + i and 41 + i, but
    # the last two images have none. Six texts belong to no image.
    rows, is_right = torch.arange(85), torch.zeros(85, 85).bool()
    is_right[rows[:38], rows[40:78]] = is_right[rows[:38], rows[41:79]] = True
    matches, is_right = csr_array(is_right[:40, 40:].numpy()), is_right | is_right.T
    is_text, is_tenth = rows >= 40, rows % 10 == 0
    in_index = ~is_text | is_right.any(dim=1)
    galleries = {
        "": in_index,
        "_tenth_of_texts": in_index & (~is_text | is_tenth),
        "_tenth_of_images": in_index & (is_text | is_tenth),
    }
    images, texts = normalize(torch.randn(85, 4) + is_text[:, None], dim=-1).split([40, 45])
    means = tuple(torch.randn(2, 4) / 2)
    subtracted = {
        "": (0, 0),
        "_without_means": means,
        "_without_gallery_means": (images.mean(dim=0), texts[in_index[40:]].mean(dim=0)),
    }
    found = interchange.one_index_numbers(images, texts, matches, means)
    for (ending, less), (kind, gallery), of_text, standardized in product(
        subtracted.items(), galleries.items(), (False, True), (False, True)
    ):
        name = f"{kind}{'_standardized' * standardized}{ending}"
        key = f"mixed{'_text_query' * of_text}_r10{name}"
        assert (key in found) == (not kind or not (of_text or standardized))
        if key not in found:
            continue
        x = torch.cat(
            [normalize(y - z, dim=-1) for y, z in zip((images, texts), less, strict=True)]
        )
        hits, shares = [], []
        for query in (in_index & (is_text == of_text)).nonzero()[:, 0]:
            others, scores = gallery & (rows != query), x @ x[query]
            if not is_right[query, gallery].any():
                continue
            for side in (others & is_text, others & ~is_text) if standardized else ():
                scores[side] -= scores[side].mean()
                scores[side] /= scores[side].std(correction=0)
            best = scores.where(others, -torch.inf).topk(10).indices
            hits.append(is_right[query, best].any())
            shares.append(is_text[best])
        assert found[key] == pytest.approx(torch.stack(hits).float().mean().item()), key
        if not (of_text or standardized):
            share = torch.cat(shares).float().mean().item()
            assert found[f"mixed_text_share{name}"] == pytest.approx(share)


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
