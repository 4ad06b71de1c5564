"""The terms by name."""

import pytest
import torch
from inputs import pairs

from cyclip_loss import CyclicPenalty, CyCLIPLoss, cyclip_loss, reference


@pytest.mark.parametrize("n", [5, 30])
def test_a_penalty_without_weight_has_a_gradient_of_zeros(n: int, impl: str, device) -> None:
    """At every N, as in the first step of a warm-up from 0."""
    for lambdas in ((0, 0), (0, 0.5)):
        image, text = (x.float().requires_grad_() for x in pairs(n, 6, device=device))
        terms = CyCLIPLoss(*lambdas, impl=impl)(image, text, 10.0, output_dict=True)
        terms["inmodal_cyclic_loss"].backward()
        assert not any(leaf.grad.any() for leaf in (image, text))
    CyclicPenalty(0, 0, impl=impl)(image, text).backward()
    assert not image.grad.any()


@pytest.mark.parametrize("weight", [None, 0, 0.7])
def test_the_inmodal_contrastive_term(weight: float | None, device: torch.device) -> None:
    image, text, *views = (*pairs(9, 6, device=device), *pairs(9, 6, seed=1, device=device))
    names = ("augmented_image_features", "augmented_text_features")
    options = dict(zip(names, views, strict=True)) | {"inmodal_contrastive_weight": weight}
    scale = torch.tensor(10.0, dtype=torch.float64, device=device)
    terms = cyclip_loss(image, text, scale, output_dict=True, **options)
    expected = reference.cyclip_loss(image, text, scale, **options)
    assert list(terms) == list(expected)
    for name, term in terms.items():
        torch.testing.assert_close(term, expected[name])
    clip = reference.contrastive_loss(image, text, scale)
    share = 0.5 if weight is None else 1.0
    torch.testing.assert_close(terms["contrastive_loss"], share * clip)
    torch.testing.assert_close(sum(terms.values()), cyclip_loss(image, text, scale, **options))
    assert "inmodal_contrastive_loss" not in cyclip_loss(image, text, scale, output_dict=True)
