"""`contrastive_logsumexp` across ranks has the results and gradients of one process."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import examples
from hypothesis import given
from hypothesis import strategies as st
from inputs import loss_dtype, pairs
from pool import Ranks, own_device
from rank_cases import DIST_IMPLS
from test_ranks_traffic import Recorder, Traffic
from torch import Tensor

from cyclip_loss import contrastive_logsumexp

pytestmark = pytest.mark.nccl
D, SCALE = 5, 8.0
FEATURES = ("image", "text", "negative")


@dataclass
class LseCase:
    """One call. It is a dataclass, so that Hypothesis prints how to make it again."""

    counts: tuple[int, ...]  # pairs on each rank
    num_negatives: tuple[int, ...] | None = None  # extra negatives on each rank
    distinct_ids: int | None = None  # with 1, a row's only negatives are the extra ones
    one_way: bool = False
    dist_impl: str = "gather"
    uneven: bool = False
    frozen: str = ""  # the input without gradient
    dtype: torch.dtype = torch.float64
    impl: str = "eager"
    is_compiled: bool = False

    def step(self, rank: int | None, device: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Results, and gradients of a loss made from them. rank: None for one process."""
        n, counts = sum(self.counts), self.counts
        values = [*pairs(n, D, 0.5, device="cpu"), None]
        if self.num_negatives is not None:
            values[2] = pairs(sum(self.num_negatives), D, seed=1, device="cpu")[0]
        given = {
            k: x.to(self.dtype) for k, x in zip(FEATURES, values, strict=True) if x is not None
        }
        ids = None
        if self.distinct_ids is not None:
            ids = torch.arange(n, device="cpu") * 7 % self.distinct_ids
        weights = torch.arange(n, dtype=torch.float64, device="cpu") % 3  # some are 0
        if rank is not None:
            split = {"negative": self.num_negatives}
            given = {k: x.split(split.get(k, counts))[rank] for k, x in given.items()}
            weights = weights.split(counts)[rank] * len(counts)
            ids = None if ids is None else ids.split(counts)[rank].to(device)
        given["scale"] = torch.tensor(SCALE, dtype=loss_dtype(self.dtype), device="cpu")
        leaves = {k: x.to(device).requires_grad_(k != self.frozen) for k, x in given.items()}
        options = {"one_way": self.one_way, "impl": self.impl}
        if rank is not None:
            options |= {"dist_impl": self.dist_impl, "uneven": self.uneven}

        def compute(image: Tensor, text: Tensor, scale: Tensor, negative: Tensor | None) -> Any:
            return contrastive_logsumexp(
                image, text, scale, ids=ids, negative_text_features=negative, **options
            )

        if self.is_compiled and rank is not None:
            compute = torch.compile(compute, backend="aot_eager", fullgraph=True)
        vectors = compute(*(leaves.get(name) for name in ("image", "text", "scale", "negative")))
        row, column, pair = vectors
        loss = F.softplus(row - pair)
        if column is not None:  # a column without negatives adds only its pair logit
            loss = loss + torch.where(column > -torch.inf, column, 0.0) - pair
        total = (weights.to(device, loss.dtype) * loss).sum() / n
        trained = {name: x for name, x in leaves.items() if x.requires_grad}
        grads = torch.autograd.grad(total, list(trained.values()))
        found = {name: x.detach() for name, x in vectors._asdict().items() if x is not None}
        return found, dict(zip(trained, grads, strict=True))


def step(rank: int, world_size: int, case: LseCase) -> tuple[Any, Any]:
    return case.step(rank, own_device())


def check(case: LseCase, ranks: Ranks) -> None:
    """Averaged over ranks, as DDP does, the gradients are those of one process."""
    world_size = len(case.counts)
    answers = ranks.run(world_size, step, case)
    expected, exact_grads = replace(case, impl="eager").step(None, "cpu")
    tolerance = 1e-10 if case.dtype == torch.float64 else 2e-5
    close = {"rtol": tolerance, "atol": tolerance}
    assert answers[0][0].keys() == expected.keys()
    for name, vector in expected.items():
        found = torch.cat([results[name] for results, _ in answers])
        torch.testing.assert_close(found, vector, **close, msg=name)
    for name, gradient in exact_grads.items():
        parts = [grads[name] for _, grads in answers]
        found = torch.stack(parts).sum(dim=0) if name == "scale" else torch.cat(parts)
        torch.testing.assert_close(found / world_size, gradient, **close, msg=name)


def lse_cases(world_size: int) -> st.SearchStrategy[LseCase]:
    counts = st.tuples(*[st.integers(0, 5)] * world_size)
    even = st.integers(1, 5).map(lambda n: (n,) * world_size)
    same_on_all = st.sampled_from([0, 3]).map(lambda m: (m,) * world_size)
    sizes = st.one_of(
        st.builds(LseCase, counts.filter(any), st.one_of(st.none(), counts), uneven=st.just(True)),
        st.builds(LseCase, even, st.one_of(st.none(), same_on_all)),
    )
    return st.builds(
        replace,
        sizes,
        distinct_ids=st.sampled_from([None, 1, 4]),
        one_way=st.booleans(),
        dist_impl=st.sampled_from(["gather", "ring"]),
        frozen=st.sampled_from(["", "image", "text", "scale"]),
    )


@pytest.mark.parametrize("world_size", [2, 3, 4])
@examples(1)
@given(data=st.data())
def test_ranks_together_give_the_results_of_one_process(
    data: st.DataObject, world_size: int, ranks: Ranks
) -> None:
    check(data.draw(lse_cases(world_size)), ranks)


@DIST_IMPLS
def test_each_engine_gives_the_results_of_one_process(impl: str, dist_impl: str, ranks) -> None:
    check(LseCase((20, 20), (3, 3), 9, dtype=torch.float32, impl=impl, dist_impl=dist_impl), ranks)


@DIST_IMPLS
def test_compiled_ranks_give_the_results_of_one_process(dist_impl: str, ranks: Ranks) -> None:
    check(LseCase((4, 4), (2, 2), 3, is_compiled=True, dist_impl=dist_impl), ranks)


def traffic(rank: int, world_size: int, case: LseCase) -> Traffic:
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
    assert ranks.run(2, traffic, LseCase((n, n))) == [expected] * 2
    one_way = [expected[0], expected[-1]]
    assert ranks.run(2, traffic, LseCase((n, n), one_way=True)) == [one_way] * 2
