"""Across ranks: the loss and gradients of the whole batch, as one process computes them."""

import math
from dataclasses import replace
from itertools import product

import pytest
import torch
import torch.distributed as dist
from conftest import needs_triton
from hypothesis import given, settings
from hypothesis import strategies as st
from pool import Ranks, own_device
from rank_cases import RankCase, check_ranks, rank_cases, step
from torch import Tensor

from cyclip_loss import consistency_metrics, cyclip_loss

pytestmark = pytest.mark.nccl
WORLD_SIZES = pytest.mark.parametrize("world_size", [2, 3, 4])
DIST_IMPLS = pytest.mark.parametrize("dist_impl", ["gather", "ring"])
UNEVEN = pytest.mark.parametrize("uneven", [False, True])


@UNEVEN
@WORLD_SIZES
@settings(max_examples=40)
@given(data=st.data())
def test_eager(data: st.DataObject, world_size: int, uneven: bool, ranks: Ranks) -> None:
    check_ranks(data.draw(rank_cases(world_size, "eager", uneven)), ranks)


@pytest.mark.slow
@needs_triton
@UNEVEN
@WORLD_SIZES
@settings(max_examples=6)
@given(data=st.data())
def test_triton(data: st.DataObject, world_size: int, uneven: bool, ranks: Ranks) -> None:
    check_ranks(data.draw(rank_cases(world_size, "triton", uneven)), ranks)


@DIST_IMPLS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_both_engines(impl: str, dist_impl: str, dtype: torch.dtype, ranks: Ranks) -> None:
    """Even and uneven rows; repeating a step gives the same bits."""
    options = {"lambdas": (0.5, 0.25), "views": True, "reference_batch_size": 16}
    options |= {"distinct_ids": 4, "negatives": (8, 3)}
    case = RankCase(d=7, dtype=dtype, rows=(6, 6), impl=impl, dist_impl=dist_impl, **options)
    check_ranks(case, ranks)
    check_ranks(replace(case, rows=(5, 0), same_ids="positives", seed=1, uneven=True), ranks)
    case = replace(case, same_ids="positives")
    check_ranks(case, ranks)
    (terms, grads), _ = ranks.run(2, step, case)
    (same_terms, same_grads), _ = ranks.run(2, step, case)
    assert terms == same_terms
    assert all(torch.equal(grad, same_grads[name]) for name, grad in grads.items())


def with_a_bad_value(rank: int, world_size: int, bad: float, dist_impl: str) -> list[float]:
    """The terms, with a bad value in one of the features of one rank at a time."""
    losses = []
    for which, where in product((0, 1), range(world_size)):
        features = [torch.eye(4, device=own_device()).roll(rank, 0) for _ in range(2)]
        if rank == where:
            features[which][1, 2] = bad
        terms = cyclip_loss(*features, 10.0, output_dict=True, dist_impl=dist_impl)
        losses += [term.item() for term in terms.values()]
    return losses


@DIST_IMPLS
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_nan_on_one_rank_is_nan_on_all(dist_impl: str, bad: float, ranks: Ranks) -> None:
    for losses in ranks.run(3, with_a_bad_value, bad, dist_impl):
        assert all(map(math.isnan, losses)), losses


def measure(rank: int, world_size: int, case: RankCase) -> list[dict[str, Tensor]]:
    """The metrics of all ranks, by the default group and by a new group of all ranks."""
    image, text, _ = case.rank_inputs(rank)
    everyone = dist.new_group(list(range(world_size)))
    groups = ({"distributed": True}, {"process_group": everyone})
    return [consistency_metrics(image, text, **group) for group in groups]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [(4, 4), (4, 0, 7), (0, 1, 0)], ids=str)
def test_metrics_of_the_whole_batch(rows, dtype: torch.dtype, ranks: Ranks) -> None:
    case = RankCase(rows=rows, dtype=dtype)
    whole = consistency_metrics(*case.inputs("cpu")[:2])
    close = {"rtol": 1e-6, "atol": 1e-7, "equal_nan": True}
    for found in ranks.run(len(rows), measure, case):
        torch.testing.assert_close(found, [whole, whole], **close)
