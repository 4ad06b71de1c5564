"""NaN and infinity come out as NaN, in whatever term and wherever they stand."""

import pytest
import torch
from accuracy import eps_of
from inputs import pairs

from cyclip_loss import CyCLIPLoss, cyclic_penalty, cyclip_loss, reference

BAD_VALUES = [torch.nan, torch.inf, -torch.inf]
EXACT = {
    "contrastive": lambda i, t: reference.contrastive_loss(i, t, 10.0),
    "inmodal": lambda i, t: 0.25 * reference.inmodal_cyclic_penalty(i, t),
    "crossmodal": lambda i, t: 0.25 * reference.crossmodal_cyclic_penalty(i, t),
    "both penalties": lambda i, t: EXACT["inmodal"](i, t) + EXACT["crossmodal"](i, t),
    "all, summed": lambda i, t: EXACT["contrastive"](i, t) + EXACT["both penalties"](i, t),
    "own view of the images": lambda i, t: exact_one_way(i, t),
}
TERMS = {
    "contrastive": lambda i, t, impl: cyclip_loss(
        i, t, 10.0, lambda_inmodal=0, lambda_crossmodal=0, impl=impl
    ),
    "inmodal": lambda i, t, impl: cyclic_penalty(i, t, 0.25, 0.0, impl=impl),
    "crossmodal": lambda i, t, impl: cyclic_penalty(i, t, 0.0, 0.25, impl=impl),
    "both penalties": lambda i, t, impl: cyclic_penalty(i, t, 0.25, 0.25, impl=impl),
    "all, summed": lambda i, t, impl: cyclip_loss(i, t, 10.0, impl=impl),
    "own view of the images": lambda i, t, impl: contrastive_one_way(i, t, impl),
}


def contrastive_one_way(image, text, impl):
    """The first only as an augmented view, which meets the logits' rows but not their columns."""
    good = torch.ones_like(image)
    return cyclip_loss(
        good,
        good,
        10.0,
        lambda_inmodal=0,
        lambda_crossmodal=0,
        augmented_image_features=image,
        augmented_text_features=text,
        impl=impl,
    )


def exact_one_way(image, text):
    good = torch.ones_like(image)
    return reference.cyclip_loss(good, good, 10.0, 0.0, 0.0, image, text)["contrastive_loss"]


@pytest.mark.parametrize("bad", BAD_VALUES, ids=str)
@pytest.mark.parametrize("term", TERMS)
@pytest.mark.parametrize("sign", [1, -1, None], ids=["positive", "negative", "mixed"])
@pytest.mark.parametrize(("n", "d"), [(6, 2), (3, 4), (1, 1), (1, 3)])
def test_nan_and_infinity_come_out_as_nan(
    impl, n, d, sign, term, bad, small_strips, device
) -> None:
    """Wherever one stands, in either tower, and whatever the sign of what it is multiplied with."""
    image, text = (features.float() for features in pairs(n, d, device=device))
    if sign is not None:
        image, text = image.abs(), sign * text.abs()
    for which in (0, 1):
        for row in {0, n - 1}:
            for column in {0, d - 1}:
                features = [image.clone(), text.clone()]
                features[which][row, column] = bad
                loss = TERMS[term](*features, impl)
                assert loss.isnan(), f"{loss} with {bad} in {which} at {row, column}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("term", TERMS)
def test_overflow_is_not_a_plausible_number(
    impl: str, term: str, dtype: torch.dtype, device: torch.device
) -> None:
    """Features whose products leave the range of the accumulation type."""
    image, text = (features.to(dtype) for features in pairs(8, 3, norm=1e4, device=device))
    loss = TERMS[term](image, text, impl)  # large, but inside the range
    exact = EXACT[term](image.double(), text.double())
    eps = eps_of(impl, dtype)
    rel = 16 * max(eps.logits, eps.penalties)
    assert loss.double().item() == pytest.approx(exact.item(), rel=rel)
    if dtype != torch.float16:
        image, text = image * 1e16, text * 1e16
        loss = TERMS[term](image, text, impl)
        exact = EXACT[term](image.double(), text.double())
        if exact < torch.finfo(torch.float32).max:
            assert loss.double().item() == pytest.approx(exact.item(), rel=rel)
        else:
            assert loss.isnan()


def test_nan_in_one_term_of_the_dict(impl: str, device: torch.device) -> None:
    """Also where a weight of 0 leaves the penalties out: the contrastive term has it."""
    image, text = pairs(6, 2, device=device)
    image[0, 0] = torch.nan
    terms = CyCLIPLoss(0.0, 0.0, impl=impl)(image, text, 10.0, output_dict=True)
    assert terms["contrastive_loss"].isnan()
    terms = CyCLIPLoss(0.1, 0.1, impl=impl)(image, text, 10.0, output_dict=True)
    assert all(term.isnan() for term in terms.values())


def test_nan_logit_scale(impl: str, device: torch.device) -> None:
    image, text = pairs(6, 2, device=device)
    assert CyCLIPLoss(impl=impl)(image, text, float("nan")).isnan()
