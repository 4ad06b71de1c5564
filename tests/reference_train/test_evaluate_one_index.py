"""One index of images and texts, compared with loops."""

from itertools import product

import pytest
import torch
from scipy.sparse import csr_array
from torch.nn.functional import normalize

from reference_train.evaluate import one_index


def test_one_index_agrees_with_loops(monkeypatch):
    """Image and text queries, by cosine and by scores standardised by modality."""
    monkeypatch.setattr(one_index, "STRIP", 7)
    # Rows 0 to 39 are images, and the others texts. Image i has the texts 40 + i and 41 + i. Four
    # texts belong to no image.
    rows, is_right = torch.arange(85), torch.zeros(85, 85).bool()
    is_right[rows[:40], rows[40:80]] = is_right[rows[:40], rows[41:81]] = True
    matches, is_right = csr_array(is_right[:40, 40:].numpy()), is_right | is_right.T
    is_text = rows >= 40
    in_index = ~is_text | is_right.any(dim=1)
    images, texts = normalize(torch.randn(85, 4) + is_text[:, None], dim=-1).split([40, 45])
    means = tuple(torch.randn(2, 4) / 2)
    found = one_index.one_index_numbers(images, texts, matches, means)
    assert len(found) == 8
    for (ending, less), of_text, standardized in product(
        {"": (0, 0), "_without_means": means}.items(), (False, True), (False, True)
    ):
        x = torch.cat(
            [normalize(y - z, dim=-1) for y, z in zip((images, texts), less, strict=True)]
        )
        hits = []
        for query in (in_index & (is_text == of_text)).nonzero()[:, 0]:
            others, scores = in_index & (rows != query), x @ x[query]
            for side in (others & is_text, others & ~is_text) if standardized else ():
                scores[side] -= scores[side].mean()
                scores[side] /= scores[side].std(correction=0)
            best = scores.where(others, -torch.inf).topk(10).indices
            hits.append(is_right[query, best].any())
        key = f"mixed{'_text_query' * of_text}_r10{'_standardized' * standardized}{ending}"
        assert found[key] == pytest.approx(torch.stack(hits).float().mean().item()), key
