"""`contrastive_logsumexp` across ranks: results and gradients of the whole batch."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from inputs import loss_dtype, pairs
from pool import RankError, Ranks, own_device
from test_ranks_traffic import Recorder, Traffic
from torch import Tensor

from cyclip_loss import CyCLIPLoss, contrastive_logsumexp, reference

pytestmark = pytest.mark.nccl
D, SCALE = 5, 8.0
NAMES = ("image", "text", "negative", "logit_scale")
DIST_IMPLS = pytest.mark.parametrize("dist_impl", ["gather", "ring"])


@dataclass
class LseRankCase:
    """One call on several ranks."""

    rows_per_rank: tuple[int, ...]
    negatives_per_rank: tuple[int, ...] | None = None  # numbers of extra negatives
    distinct_ids: int | None = None  # with 1, a row's only negatives are the extra ones
    one_way: bool = False
    dist_impl: str = "gather"
    uneven: bool = False
    frozen: str = ""  # the input without gradient
    dtype: torch.dtype = torch.float64
    impl: str = "eager"
    is_compiled: bool = False

    def whole_batch(self) -> dict[str, Tensor]:
        """The inputs of one process, by name."""
        image, text = pairs(sum(self.rows_per_rank), D, 0.5, device="cpu")
        inputs = {"image": image.to(self.dtype), "text": text.to(self.dtype)}
        if self.negatives_per_rank is not None:
            negative = pairs(sum(self.negatives_per_rank), D, seed=1, device="cpu")[0]
            inputs["negative"] = negative.to(self.dtype)
        scale = torch.tensor(SCALE, dtype=loss_dtype(self.dtype), device="cpu")
        return inputs | {"logit_scale": scale}

    def ids(self) -> Tensor | None:
        if self.distinct_ids is None:
            return None
        return torch.arange(sum(self.rows_per_rank), device="cpu") * 7 % self.distinct_ids

    def weights(self) -> Tensor:
        """(N,): the weight of each pair in the loss. Some are 0."""
        return torch.arange(sum(self.rows_per_rank), dtype=torch.float64, device="cpu") % 3


def total(results: Any, weights: Tensor) -> Tensor:
    """A loss of the results, summed over pairs with these weights."""
    row, column, pair = results
    loss = (weights * F.softplus(row - pair)).sum()
    if column is not None:
        # A column without negatives adds only its pair logit.
        margins = torch.where(column > -torch.inf, column, 0.0) - pair
        loss = loss + (weights * margins).sum()
    return loss


def gradients(loss: Tensor, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    trained = {name: x for name, x in leaves.items() if x.requires_grad}
    return dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True))


def step(rank: int, world_size: int, case: LseRankCase) -> tuple[Any, dict[str, Tensor]]:
    """This rank's results, and the gradients of its features and of the logit scale."""
    device, inputs = own_device(), case.whole_batch()
    for name in ("image", "text"):
        inputs[name] = inputs[name].split(case.rows_per_rank)[rank]
    if case.negatives_per_rank is not None:
        inputs["negative"] = inputs["negative"].split(case.negatives_per_rank)[rank]
    leaves = {name: x.to(device).requires_grad_(name != case.frozen) for name, x in inputs.items()}
    ids = case.ids()
    own_ids = None if ids is None else ids.split(case.rows_per_rank)[rank].to(device)

    def compute(*features: Tensor) -> Any:
        image, text, *negative, scale = features
        return contrastive_logsumexp(
            image,
            text,
            scale,
            ids=own_ids,
            negative_text_features=negative[0] if negative else None,
            one_way=case.one_way,
            dist_impl=case.dist_impl,
            uneven=case.uneven,
            impl=case.impl,
        )

    if case.is_compiled:
        compute = torch.compile(compute, backend="aot_eager", fullgraph=True)
    results = compute(*leaves.values())
    weights = case.weights().split(case.rows_per_rank)[rank].to(device, loss_dtype(case.dtype))
    loss = total(results, weights) * world_size / sum(case.rows_per_rank)
    return tuple(results), gradients(loss, leaves)


def check(case: LseRankCase, ranks: Ranks) -> None:
    answers = ranks.run(len(case.rows_per_rank), step, case)

    leaves = {
        name: x.double().requires_grad_(name != case.frozen)
        for name, x in case.whole_batch().items()
    }
    row, column, pair = reference.contrastive_logsumexp(
        leaves["image"], leaves["text"], leaves["logit_scale"], case.ids(), leaves.get("negative")
    )
    exact = (row, None if case.one_way else column, pair)
    loss = total(exact, case.weights()) / sum(case.rows_per_rank)
    tolerance = 1e-10 if case.dtype == torch.float64 else 2e-5
    close = {"rtol": tolerance, "atol": tolerance}
    for index, vector in enumerate(exact):
        parts = [results[index] for results, _ in answers]
        if vector is None:
            assert all(part is None for part in parts)
        else:
            torch.testing.assert_close(torch.cat(parts).double(), vector, **close)
    # Averaged over ranks, as DDP does, the gradients are those of one process.
    for name, gradient in gradients(loss, leaves).items():
        parts = [grads[name].double() for _, grads in answers]
        found = torch.stack(parts).sum(dim=0) if gradient.ndim == 0 else torch.cat(parts)
        # Without negatives the dense form's gradient is 0 / 0.
        gradient = gradient.nan_to_num()
        torch.testing.assert_close(found / len(case.rows_per_rank), gradient, **close)


def rank_cases(world_size: int) -> st.SearchStrategy[LseRankCase]:
    counts = st.tuples(*[st.integers(0, 5)] * world_size)
    same_on_all = st.sampled_from([0, 3]).map(lambda m: (m,) * world_size)
    uneven = st.builds(
        LseRankCase,
        rows_per_rank=counts.filter(any),
        negatives_per_rank=st.one_of(st.none(), counts),
        uneven=st.just(True),
    )
    even = st.builds(
        LseRankCase,
        rows_per_rank=st.integers(1, 5).map(lambda n: (n,) * world_size),
        negatives_per_rank=st.one_of(st.none(), same_on_all),
    )
    return st.builds(
        replace,
        st.one_of(even, uneven),
        distinct_ids=st.sampled_from([None, 1, 4]),
        one_way=st.booleans(),
        dist_impl=st.sampled_from(["gather", "ring"]),
        frozen=st.sampled_from(["", *NAMES[:2], "logit_scale"]),
    )


@pytest.mark.parametrize("world_size", [2, 3, 4])
@settings(max_examples=40)
@given(data=st.data())
def test_ranks_together_give_the_results_of_one_process(
    data: st.DataObject, world_size: int, ranks: Ranks
) -> None:
    check(data.draw(rank_cases(world_size)), ranks)


@DIST_IMPLS
def test_each_engine_gives_the_results_of_one_process(impl: str, dist_impl: str, ranks) -> None:
    case = LseRankCase((20, 20), (3, 3), 9, dtype=torch.float32, impl=impl, dist_impl=dist_impl)
    check(case, ranks)


@DIST_IMPLS
def test_compiled_ranks_give_the_results_of_one_process(dist_impl: str, ranks: Ranks) -> None:
    check(LseRankCase((4, 4), (2, 2), 3, is_compiled=True, dist_impl=dist_impl), ranks)


def traffic(rank: int, world_size: int, case: LseRankCase) -> Traffic:
    """The collectives of the second of two calls."""
    step(rank, world_size, case)
    with Recorder() as recorder:
        step(rank, world_size, case)
    return recorder.found


def test_a_call_sends_exactly_what_the_docs_say(ranks: Ranks) -> None:
    n, element_bytes = 4, 8
    gather = f"all_gather_into_tensor{'_out' if ranks.backend == 'gloo' else ''}"
    expected = [
        (gather, 2 * n * D * element_bytes),
        ("all_reduce max", 2 * 2 * n * element_bytes),
        ("all_reduce sum", 2 * n * element_bytes),
        (gather, 2 * n * element_bytes),
        ("reduce_scatter_tensor", 2 * n * D * element_bytes),
    ]
    assert ranks.run(2, traffic, LseRankCase((n, n))) == [expected] * 2
    one_way = [expected[0], expected[-1]]
    assert ranks.run(2, traffic, LseRankCase((n, n), one_way=True)) == [one_way] * 2


def differing_directions(rank: int, world_size: int) -> None:
    contrastive_logsumexp(*pairs(4, D, device=own_device()), one_way=rank == 0)


def differing_functions(rank: int, world_size: int) -> None:
    (CyCLIPLoss(0, 0) if rank == 0 else contrastive_logsumexp)(
        *pairs(4, D, device=own_device()), 1.0
    )


def no_grad_on_one_rank(rank: int, world_size: int) -> None:
    image, text = pairs(4, D, device=own_device())
    contrastive_logsumexp(image.requires_grad_(rank == 0), text)


@pytest.mark.parametrize(
    ("task", "what"),
    [
        (differing_directions, "one_way"),
        (differing_functions, "the function"),
        (no_grad_on_one_rank, "whether an input of each contrastive term requires a gradient"),
    ],
)
def test_ranks_whose_calls_differ_raise_an_error(task: Any, what: str, ranks: Ranks) -> None:
    with pytest.raises(RankError, match=f"{what} must be the same on every rank"):
        ranks.run(2, task)
