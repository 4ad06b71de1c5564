"""The loss with all options: terms and gradients against the definition in float64."""

from functools import reduce

import pytest
import torch
from accuracy import check_loss
from conftest import needs_triton
from hypothesis import example, given, settings
from hypothesis import strategies as st
from inputs import DTYPES, Case, cases, pairs

from cyclip_loss import CyclicPenalty, CyCLIPLoss, cyclip_loss, reference

FULL = {"views": True, "output_dict": True, "upstream": (3.0, -0.5, 2.0), "lambdas": (0.25, 0.5)}
IMAGE, TEXT, TOWERS = frozenset(["image"]), frozenset(["text"]), frozenset(["image", "text"])
WIDE = torch.float64
SAME_ROWS = {"image_layout": "expanded", "text_layout": "expanded", "anti_aligned": True}
# Always tested: one row; a partial strip; frozen towers in large and small batches; unaligned rows;
# a large D, with which errors in a kernel grow.
HARD = [
    Case(1, 1, WIDE),
    Case(65, 10, strip_rows=32, **FULL),
    Case(65, 33, logit_scale=100.0, distance=0.003, anti_aligned=True, strip_rows=32),
    Case(64, 1, logit_scale=100.0, strip_rows=7),
    # All logits are -100: exp(l - 100) would underflow, and its log be -inf.
    Case(65, 33, logit_scale=100.0, distance=0.003, **SAME_ROWS),
    # P_cross is 0; without the clamps, both engines' would be negative.
    Case(80, 24, torch.bfloat16, norm=2.5, output_dict=True, seed=8, **SAME_ROWS),
    *(
        Case(n, d, WIDE, frozen=frozen, lambdas=lambdas, strip_rows=7)
        for n, d in ((30, 6), (10, 30))
        for frozen, lambdas in ((IMAGE, (0.5, 0.25)), (TEXT, (0.25, 0.5)), (TOWERS, (0.0, 0.0)))
    ),
    Case(80, 24, torch.bfloat16, distinct_ids=6, strip_rows=7),  # several blocks of G
    Case(80, 1, torch.float16, strip_rows=7),  # sums over blocks that overflow in 16 bits
    Case(80, 32, torch.bfloat16, image_layout="8 bytes off", lambdas=(0.5, 0.125)),
    Case(80, 64, torch.float16, text_layout="rows 8 elements wider", lambdas=(0.5, 0.125)),
    Case(70, 768, torch.bfloat16, distance=0.3, logit_scale=30.0),
    Case(70, 768, distance=0.003, logit_scale=5.0),
    Case(10, 30, WIDE, reference_batch_size=16, **(FULL | {"views": False})),
]


def with_hard_cases(test):
    return reduce(lambda found, case: example(case=case)(found), HARD, test)


@settings(max_examples=150)
@given(case=cases())
@with_hard_cases
def test_eager(case: Case, device: torch.device) -> None:
    check_loss(case, "eager", device)


@needs_triton
@settings(max_examples=60)
@given(case=cases(dtype=st.sampled_from(DTYPES[1:])))
@with_hard_cases
def test_triton(case: Case, device: torch.device) -> None:
    check_loss(case, "triton", device)


@pytest.mark.parametrize("n", [5, 30])
def test_a_penalty_without_weight_has_a_gradient_of_zeros(n: int, impl: str, device) -> None:
    """In large and small batches; as in the first step of a warm-up from 0."""
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
