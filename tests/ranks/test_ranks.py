"""Ranks compute the loss and gradients that one process computes for the whole batch."""

from contextlib import closing
from itertools import product

import pytest
import torch
from hypothesis import given
from inputs import FORMS, in_form
from pool import Ranks, own_device
from rank_cases import DIST_IMPLS, RankCase, check_ranks, rank_cases
from support import examples, needs_triton

from cyclip_loss import CyCLIPLoss

pytestmark = pytest.mark.nccl
EACH_FORM = pytest.mark.parametrize("form", FORMS, ids=str)


@EACH_FORM
@examples(0.4)
@given(case=rank_cases("eager"))
def test_eager_engine_is_accurate_across_ranks(case, form, ranks):
    check_ranks(in_form(case, *form), ranks)


@needs_triton
@EACH_FORM
@examples(1 / 15)
@given(case=rank_cases("triton"))
def test_kernels_are_accurate_across_ranks(case, form, ranks):
    check_ranks(in_form(case, *form), ranks)


@needs_triton
@pytest.mark.parametrize("function", ["cyclip", "siglip"])
def test_a_rank_without_rows_needs_no_kernel(function, ranks):
    options = {"impl": "triton", "dtype": torch.float32, "function": function, "uneven": True}
    check_ranks(RankCase(rows_per_rank=(0, 5), **options), ranks)


@pytest.mark.gpu
def test_two_ranks_that_share_a_gpu_are_accurate(impl):
    """Over gloo, whose collectives accept GPU tensors; NCCL needs a GPU for each rank."""
    with closing(Ranks("gloo", "cuda:0")) as sharing:
        for dtype, n in product((torch.float32, torch.bfloat16), (130, 150)):
            options = {"dtype": dtype, "impl": impl, "lambdas": (0.5, 0.125), "uneven": n < 150}
            check_ranks(RankCase(d=40, rows_per_rank=(n, 150), **options), sharing)
        with pytest.raises(AssertionError, match="needs nccl, not gloo"):
            check_ranks(RankCase(dist_impl="ring"), sharing)


def with_a_bad_value(rank, world_size, bad, dist_impl):
    """The terms, with a bad value in one of the features of one rank at a time."""
    terms = []
    for tower, bad_rank in product((0, 1), range(world_size)):
        features = [torch.eye(4, device=own_device()).roll(rank, 0) for _ in range(2)]
        if rank == bad_rank:
            features[tower][1, 2] = bad
        terms += CyCLIPLoss(dist_impl=dist_impl)(*features, 10.0, output_dict=True).values()
    return terms


@DIST_IMPLS
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_a_bad_value_on_one_rank_gives_no_finite_loss_on_any(dist_impl, bad, ranks):
    for terms in ranks.run(3, with_a_bad_value, bad, dist_impl):
        assert not torch.stack(terms).isfinite().any(), terms
