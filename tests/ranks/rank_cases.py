"""One step of the loss across ranks: its inputs, the step itself, and the expected results."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from accuracy import check, check_against_pytorch, evaluate
from hypothesis import strategies as st
from inputs import DTYPES, NEGATIVES, STRATEGIES, Case, Grads, Tensors, loss_dtype
from pool import Ranks, own_device
from torch import Tensor

DIST_IMPLS = pytest.mark.parametrize("dist_impl", ["gather", "ring"])


@dataclass
class RankCase(Case):
    """The input of one step. It is a dataclass, so that Hypothesis prints how to make it again."""

    n: int = 0  # the sum of `rows_per_rank`
    d: int = 5
    dtype: torch.dtype = torch.float64
    rows_per_rank: tuple[int, ...] = (4, 4)
    impl: str = "eager"
    dist_impl: str = "gather"
    uneven: bool = False

    def __post_init__(self) -> None:
        self.n = sum(self.rows_per_rank)
        if not self.uneven:  # each rank has the same number of extra negatives
            self.negatives = tuple(
                None if count is None else count - count % self.world_size
                for count in self.negatives
            )

    @property
    def world_size(self) -> int:
        return len(self.rows_per_rank)

    def split(self, name: str, features: Tensor) -> tuple[Tensor, ...]:
        """The rows of each rank."""
        if name not in NEGATIVES:
            return features.split(self.rows_per_rank)
        if self.seed % 2 and self.uneven:  # the last rank has all extra negatives
            return features.split((*[0] * (self.world_size - 1), len(features)))
        return features.tensor_split(self.world_size)

    def rank_features(self, rank: int) -> Tensors:
        """A rank's rows of all features."""
        return {
            name: self.split(name, features)[rank]
            for name, features in self.features(own_device()).items()
        }

    def rank_inputs(self, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        """A rank's images and texts, and the logit scale."""
        features = self.rank_features(rank)
        return features["image"], features["text"], self.scale(own_device())


def step(rank: int, world_size: int, case: RankCase) -> tuple[Tensors, Grads]:
    """The terms and this rank's gradients; runs on every rank."""
    ids = case.ids(own_device())
    return evaluate(
        case,
        case.rank_features(rank),
        case.impl,
        own_device(),
        None if ids is None else ids.split(case.rows_per_rank)[rank],
        dist_impl=case.dist_impl,
        uneven=case.uneven,
    )


def check_ranks(case: RankCase, ranks: Ranks, against_pytorch: bool = False) -> None:
    """Assert that each rank has the terms of the whole batch, and W times the gradients.

    Only the average over ranks of the scale's gradient is compared. against_pytorch: whether to
    compare errors with those of plain PyTorch, too.
    """
    all_terms, all_grads = zip(*ranks.run(case.world_size, step, case), strict=True)
    terms = all_terms[0]
    for name, term in terms.items():
        on_ranks = [others[name] for others in all_terms]
        torch.testing.assert_close(on_ranks, [term] * len(on_ranks), rtol=0, atol=0, equal_nan=True)
    grads: Grads = {}
    for name in all_grads[0]:
        parts = [rank_grads[name] for rank_grads in all_grads]
        if parts[0] is None:
            assert all(part is None for part in parts), name
            grads[name] = None
        elif name == "logit_scale":
            grads[name] = torch.stack(parts).double().sum().to(loss_dtype(case.dtype))
        else:
            grads[name] = torch.cat(parts)
    features = case.features("cpu")
    check(case, features, terms, grads, case.impl)
    if against_pytorch:
        check_against_pytorch(case, features, terms, grads)


def rank_cases(world_size: int, impl: str) -> st.SearchStrategy[RankCase]:
    """Draws any step. If it is uneven, ranks may have different numbers of rows, or none."""

    def rows_per_rank(most: int, uneven: bool) -> st.SearchStrategy[tuple[int, ...]]:
        if uneven:
            return st.tuples(*[st.integers(0, most)] * world_size).filter(any)
        return st.integers(1, most).map(lambda n: (n,) * world_size)

    def steps(uneven: bool) -> st.SearchStrategy[RankCase]:
        most = st.sampled_from([3, 9, 40 if impl == "eager" else 33])
        given: dict[str, Any] = {
            "n": st.just(0),
            "d": st.one_of(st.integers(1, 9), st.sampled_from([33, 40])),
            "dtype": st.sampled_from([torch.float64, *DTYPES] if impl == "eager" else DTYPES[1:]),
            "rows_per_rank": most.flatmap(lambda most: rows_per_rank(most, uneven)),
            "impl": st.just(impl),
            "dist_impl": st.sampled_from(["gather", "ring"]),
            "uneven": st.just(uneven),
        }
        if impl == "triton":  # interpreted tiles are slow, and these reach into another tile
            given["negatives"] = st.tuples(*[st.sampled_from([None, None, 0, 1, 50])] * 2)
        return st.builds(RankCase, **(STRATEGIES | given))

    return st.booleans().flatmap(steps)
