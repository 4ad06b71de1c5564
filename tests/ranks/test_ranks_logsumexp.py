"""`contrastive_logsumexp` across ranks: results and gradients of the whole batch."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from inputs import loss_dtype, pairs
from pool import RankError, Ranks, own_device
from torch import Tensor

from cyclip_loss import contrastive_logsumexp, reference

pytestmark = pytest.mark.nccl
D, SCALE, DISTINCT_IDS = 5, 8.0, 4


def whole_batch(rows: tuple[int, ...], negatives: tuple[int, ...], dtype: torch.dtype) -> Any:
    """Image, text and negative features of all ranks, and ids."""
    image, text = pairs(sum(rows), D, 0.5, device="cpu")
    negative = pairs(sum(negatives), D, seed=1, device="cpu")[0]
    ids = torch.arange(sum(rows), device="cpu") * 7 % DISTINCT_IDS
    return image.to(dtype), text.to(dtype), negative.to(dtype), ids


def total(results: Any, weights: Tensor) -> Tensor:
    """The sum over pairs of a loss in which each pair has its weight; some weights are 0."""
    row, column, pair = results
    loss = (weights * F.softplus(row - pair)).sum()
    return loss if column is None else loss + (weights * (column - pair)).sum()


def weights_of(n: int, dtype: torch.dtype) -> Tensor:
    return torch.arange(n, dtype=loss_dtype(dtype), device="cpu") % 3


def step(
    rank: int,
    world_size: int,
    rows: tuple[int, ...],
    negatives: tuple[int, ...],
    dtype: torch.dtype,
    options: dict[str, Any],
    is_compiled: bool = False,
) -> tuple[Any, list[Tensor]]:
    """This rank's results, and the gradients of its features and of the logit scale."""
    image, text, negative, ids = whole_batch(rows, negatives, dtype)
    device = own_device()
    own = (image.split(rows)[rank], text.split(rows)[rank], negative.split(negatives)[rank])
    leaves = [x.to(device).requires_grad_() for x in own]
    scale = torch.tensor(SCALE, dtype=loss_dtype(dtype), device=device, requires_grad=True)
    own_ids = ids.split(rows)[rank].to(device)
    weights = weights_of(sum(rows), dtype).split(rows)[rank].to(device)

    def compute(image: Tensor, text: Tensor, negative: Tensor, scale: Tensor) -> Any:
        given = {"ids": own_ids, "negative_text_features": negative if negatives else None}
        return contrastive_logsumexp(image, text, scale, **given, **options)

    function = torch.compile(compute, backend="aot_eager", fullgraph=True) if is_compiled else None
    results = (function or compute)(*leaves, scale)
    loss = total(results, weights) * world_size / sum(rows)
    used = [*leaves[: 3 if negatives else 2], scale]
    return tuple(results), list(torch.autograd.grad(loss, used))


def check_against_one_process(
    ranks: Ranks,
    rows: tuple[int, ...],
    negatives: tuple[int, ...] = (),
    dtype: torch.dtype = torch.float64,
    is_compiled: bool = False,
    **options: Any,
) -> None:
    padded = negatives or (0,) * len(rows)
    answers = ranks.run(len(rows), step, rows, padded, dtype, options, is_compiled)

    image, text, negative, ids = whole_batch(rows, padded, dtype)
    scale = torch.tensor(SCALE, dtype=torch.float64, device="cpu")
    leaves = [x.double().requires_grad_() for x in (image, text, negative, scale)]
    row, column, pair = reference.contrastive_logsumexp(
        leaves[0], leaves[1], leaves[3], ids, leaves[2]
    )
    exact = (row, None if options.get("one_way") else column, pair)
    loss = total(exact, weights_of(sum(rows), torch.float64)) / sum(rows)
    expected = torch.autograd.grad(loss, leaves)

    tolerance = 1e-10 if dtype == torch.float64 else 2e-5
    close = {"rtol": tolerance, "atol": tolerance}
    for index, vector in enumerate(exact):
        parts = [results[index] for results, _ in answers]
        if vector is None:
            assert all(part is None for part in parts)
        else:
            torch.testing.assert_close(torch.cat(parts).double(), vector, **close)
    # Averaged over ranks, as DDP does, the gradients are those of one process.
    for index, gradient in enumerate(expected):
        parts = [grads[index].double() for _, grads in answers]
        found = torch.stack(parts).sum(dim=0) if index == 3 else torch.cat(parts)
        torch.testing.assert_close(found / len(rows), gradient, **close)


@pytest.mark.parametrize("one_way", [False, True])
@pytest.mark.parametrize("dist_impl", ["gather", "ring"])
@pytest.mark.parametrize("rows", [(4, 4), (3, 3, 3), (2, 2, 2, 2)], ids=str)
def test_ranks_together_give_the_results_of_one_process(
    rows: tuple[int, ...], dist_impl: str, one_way: bool, ranks: Ranks
) -> None:
    negatives = (2,) * len(rows)
    check_against_one_process(ranks, rows, negatives, dist_impl=dist_impl, one_way=one_way)


@pytest.mark.parametrize("dist_impl", ["gather", "ring"])
@pytest.mark.parametrize("rows", [(5, 2), (4, 0, 3), (1, 1, 0)], ids=str)
def test_uneven_and_empty_ranks_give_the_results_of_one_process(
    rows: tuple[int, ...], dist_impl: str, ranks: Ranks
) -> None:
    negatives = tuple(range(len(rows)))  # none on the first rank
    check_against_one_process(ranks, rows, negatives, dist_impl=dist_impl, uneven=True)


@pytest.mark.parametrize("dist_impl", ["gather", "ring"])
def test_each_engine_gives_the_results_of_one_process(impl: str, dist_impl: str, ranks) -> None:
    options = {"dist_impl": dist_impl, "impl": impl}
    check_against_one_process(ranks, (20, 20), (3, 3), torch.float32, **options)


@pytest.mark.parametrize("dist_impl", ["gather", "ring"])
def test_compiled_ranks_give_the_results_of_one_process(dist_impl: str, ranks: Ranks) -> None:
    check_against_one_process(ranks, (4, 4), (2, 2), is_compiled=True, dist_impl=dist_impl)


def differing_directions(rank: int, world_size: int) -> None:
    features = pairs(4, D, device=own_device())
    contrastive_logsumexp(*features, one_way=rank == 0)


def test_ranks_that_differ_in_one_way_are_an_error(ranks: Ranks) -> None:
    with pytest.raises(RankError, match="one_way must be the same on every rank"):
        ranks.run(2, differing_directions)
