"""The whole loss, in all its settings: terms and gradients against the definition in float64."""

from functools import reduce

import torch
from accuracy import check_loss
from conftest import needs_triton
from hypothesis import example, given, settings
from hypothesis import strategies as st
from inputs import DTYPES, Case, cases

FULL = {"views": True, "output_dict": True, "upstream": (3.0, -0.5, 2.0), "lambdas": (0.25, 0.5)}
IMAGE, TEXT, TOWERS = frozenset(["image"]), frozenset(["text"]), frozenset(["image", "text"])
WIDE = torch.float64
# Met for certain: one row, a rest of a strip, frozen towers in large batches and small ones; rows
# that no wide load can read but are not copied, and long ones, whose errors grow in a kernel.
HARD = [
    Case(1, 1, WIDE),
    Case(65, 10, strip_rows=32, **FULL),
    Case(65, 33, logit_scale=100.0, distance=0.003, anti_aligned=True, strip_rows=32),
    Case(64, 1, logit_scale=100.0, strip_rows=7),
    *(
        Case(n, d, WIDE, frozen=frozen, lambdas=lambdas, strip_rows=7)
        for n, d in ((30, 6), (10, 30))
        for frozen, lambdas in ((IMAGE, (0.5, 0.25)), (TEXT, (0.25, 0.5)), (TOWERS, (0.0, 0.0)))
    ),
    Case(80, 24, torch.bfloat16, distinct_ids=6, strip_rows=7),  # several blocks of G
    Case(80, 32, torch.bfloat16, image_layout="8 bytes off", lambdas=(0.5, 0.125)),
    Case(80, 64, torch.float16, text_layout="rows 8 elements wider", lambdas=(0.5, 0.125)),
    Case(70, 768, torch.bfloat16, distance=0.3, logit_scale=30.0),
    Case(70, 768, distance=0.003, logit_scale=5.0),
    Case(10, 30, WIDE, reference_batch_size=16, **(FULL | {"views": False})),
]


def with_hard_ones(test):
    return reduce(lambda found, case: example(case=case)(found), HARD, test)


@settings(max_examples=150)
@given(case=cases())
@with_hard_ones
def test_eager(case: Case, device: torch.device) -> None:
    check_loss(case, "eager", device)


@needs_triton
@settings(max_examples=60)
@given(case=cases(dtype=st.sampled_from(DTYPES[1:])))
@with_hard_ones
def test_triton(case: Case, device: torch.device) -> None:
    check_loss(case, "triton", device)
