"""Exactly which collectives run, in which order, and how many bytes each of them has."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from accuracy import evaluate
from inputs import FEATURES, loss_dtype
from pool import Collectives
from rank_cases import RankCase, step

N, D = 4, 6


def traffic(rank, world_size, case):
    """Of the second of two steps: the collectives, and the elements of the largest result.

    The lambdas change between the steps, as in a schedule, which needs no new comparison.
    """
    inmodal, crossmodal = case.lambdas
    step(rank, world_size, replace(case, lambdas=(inmodal / 2, crossmodal / 2)))
    given = case.rank_arguments(rank)
    with Collectives() as recorder:
        evaluate(case, given, case.impl, **case.options)
    return recorder.found, recorder.largest


def sends(times, size):
    return [("send", size), ("recv_", size)] * times


@pytest.mark.parametrize(("world_size", "dtype"), [(3, torch.float64), (2, torch.bfloat16)])
@pytest.mark.parametrize("output_dict", [False, True])
@pytest.mark.parametrize("lambdas", [(0.25, 0.25), (0.5, 0.125), (0.0, 0.0)])
def test_a_step_sends_exactly_these_collectives(world_size, dtype, lambdas, output_dict, ranks):
    """`docs/distributed.md` says what is sent. C is, if the penalties are computed apart."""
    loss_bytes, total_rows, block = loss_dtype(dtype).itemsize, world_size * N, N * D
    matrices = 3 if output_dict or lambdas[0] != lambdas[1] else 2
    add, gather = "all_reduce sum", "all_gather_into_tensor"
    penalties = [(add, loss_bytes * (matrices * D * D + 1))] if any(lambdas) else []
    text, column_bytes = (gather, total_rows * D * dtype.itemsize), loss_bytes * total_rows
    lse, loss_sum = [("all_reduce max", column_bytes), (add, column_bytes)], (add, loss_bytes)
    forward = [text, *penalties, *lse, loss_sum]
    lse_gather, text_grad = (
        [loss_sum, (gather, column_bytes)],
        ("reduce_scatter_tensor", column_bytes * D),
    )
    blocks = sends(world_size - 1, block * dtype.itemsize)
    ring = [*blocks, *sends(world_size, 8 * N), *penalties, loss_sum]  # sums in float64
    ring += [loss_sum, *blocks, *sends(world_size - 1, loss_bytes * N)]  # backward
    ring += sends(world_size, loss_bytes * block)
    case = RankCase(
        d=D, dtype=dtype, rows_per_rank=(N,) * world_size, lambdas=lambdas, output_dict=output_dict
    )

    def sent(**changes):
        """By each rank."""
        found, *others = (x for x, _ in ranks.run(world_size, traffic, replace(case, **changes)))
        assert others == [found] * (world_size - 1)
        return found

    assert sent() == [*forward, *lse_gather, text_grad]
    for found, largest in ranks.run(world_size, traffic, replace(case, dist_impl="ring")):
        assert Counter(found) == Counter(ring)  # in any order
        # O(n D) memory: nothing grows with the number of ranks.
        assert largest == max(block, matrices * D * D + 1 if penalties else 0)
    # Without a gradient of the texts, backward sends only log-sum-exps.
    assert sent(frozen=frozenset(FEATURES[1:])) == [*forward, *lse_gather]
    # With uneven rows, every step compares first, and blocks are padded to the longest.
    found = sent(rows_per_rank=(N, *[1] * (world_size - 1)), uneven=True)
    comparison = (gather, world_size * 4 * 8)  # a hash and three counts
    assert (found[:2], found[-1]) == ([comparison, text], text_grad)
    # The penalties alone, with any numbers of rows: one all-reduce, and nothing in backward.
    alone = {"rows_per_rank": tuple(range(world_size)), "function": "penalties"}
    assert sent(**alone) == penalties
    means = [(add, loss_bytes * (2 * D + 1))] if penalties else []
    assert sent(**alone, centered=True) == [*means, *penalties]
    assert sent(function="log-sum-exps") == [text, *lse, *lse_gather, text_grad]
    assert sent(function="one way") == [text, text_grad]
