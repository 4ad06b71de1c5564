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
# Always tested. A large D is among them, as errors of a kernel grow with it.
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
    Case(30, 6, WIDE, distinct_ids=6, same_ids="positives", negatives=(50, 1), frozen=IMAGE),
    Case(300, 5),  # more than one group of row tiles
    # G of a text that all images are near, summed over images, overflows in 16 bits.
    Case(40, 3, torch.float16, logit_scale=100.0, image_layout="expanded"),
    Case(80, 1, torch.float16, strip_rows=7),  # the same over several blocks
    # Pairs far worse than their negatives: 1e-9 is missing from the loss if log(1 + exp(21)) is 21.
    *(Case(n, 12, WIDE, logit_scale=16.0, distance=0.003, anti_aligned=True) for n in (9, 30)),
    # Close pairs, whose penalties, loss and G are small differences of large numbers.
    Case(96, 40, logit_scale=16.0, distance=0.003, output_dict=True),
    Case(60, 60, logit_scale=16.0, distance=0.003, output_dict=True),
    # Rows of the features further apart in one than in the other.
    Case(80, 64, text_layout="every other row", lambdas=(0.5, 0.125)),
    Case(80, 32, torch.bfloat16, image_layout="8 bytes off", lambdas=(0.5, 0.125)),
    Case(80, 64, torch.float16, text_layout="rows 8 elements wider", lambdas=(0.5, 0.125)),
    Case(70, 768, torch.bfloat16, distance=0.3, logit_scale=30.0),
    Case(70, 768, distance=0.003, logit_scale=5.0, strip_rows=32, output_dict=True),
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
    torch.testing.assert_close(terms, expected)
    torch.testing.assert_close(sum(terms.values()), cyclip_loss(image, text, scale, **options))
    assert "inmodal_contrastive_loss" not in cyclip_loss(image, text, scale, output_dict=True)
