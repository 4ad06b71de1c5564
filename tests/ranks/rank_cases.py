"""One step of the loss across ranks: its inputs, the step itself, and the expected results."""

from dataclasses import dataclass
from typing import Any

import torch
from accuracy import Grads, check, evaluate
from hypothesis import strategies as st
from inputs import DRAWN, DTYPES, NEGATIVES, Case, loss_dtype
from pool import Ranks, own_device
from torch import Tensor


@dataclass
class RankCase(Case):
    """The input of one step. A dataclass, so that hypothesis prints what reproduces it."""

    n: int = 0  # the sum of `rows`
    d: int = 5
    dtype: torch.dtype = torch.float64
    rows: tuple[int, ...] = (4, 4)  # numbers of rows, by rank
    impl: str = "eager"
    dist_impl: str = "gather"
    uneven: bool = False

    def __post_init__(self) -> None:
        self.n = sum(self.rows)
        if not self.uneven:  # as many extra negatives on each rank
            multiples = (x if x is None else x - x % self.world_size for x in self.negatives)
            self.negatives = tuple(multiples)

    def split(self, name: str, rows: Tensor) -> tuple[Tensor, ...]:
        """The ranks' rows; without `uneven`, as many extra negatives for each."""
        if name not in NEGATIVES:
            return rows.split(self.rows)
        if self.seed % 2 and self.uneven:  # all to the last rank
            return rows.split((*[0] * (self.world_size - 1), len(rows)))
        return rows.tensor_split(self.world_size)

    @property
    def world_size(self) -> int:
        return len(self.rows)

    def of_rank(self, rank: int) -> dict[str, Tensor]:
        """A rank's rows of all features."""
        whole = self.features(own_device())
        return {name: self.split(name, rows)[rank] for name, rows in whole.items()}

    def rank_inputs(self, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        """A rank's images and texts, and the logit scale."""
        features = self.of_rank(rank)
        return features["image"], features["text"], self.scale(own_device())


def step(rank: int, world_size: int, case: RankCase) -> tuple[dict[str, Tensor], Grads]:
    """The terms and this rank's gradients; runs on every rank."""
    ids, options = case.ids(own_device()), {"dist_impl": case.dist_impl, "uneven": case.uneven}
    options["ids"] = None if ids is None else ids.split(case.rows)[rank]
    return evaluate(case, case.of_rank(rank), case.impl, own_device(), **options)


def check_ranks(case: RankCase, ranks: Ranks) -> None:
    """Every rank has the whole batch's terms and W times its gradients, the scale's on average."""
    of_ranks = ranks.run(case.world_size, step, case)
    terms = of_ranks[0][0]
    grads: Grads = {}
    for name in of_ranks[0][1]:
        parts = [of_rank[name] for _, of_rank in of_ranks]
        if parts[0] is None:
            assert all(part is None for part in parts), name
            grads[name] = None
        elif name == "logit_scale":
            grads[name] = torch.stack(parts).double().sum().to(loss_dtype(case.dtype))
        else:
            grads[name] = torch.cat(parts)
    for others, _ in of_ranks:
        assert all(torch.equal(others[name], term) for name, term in terms.items()), "bits differ"
    check(case, case.features("cpu"), terms, grads, case.impl)


def rank_cases(world_size: int, impl: str) -> st.SearchStrategy[RankCase]:
    """Any step; if `uneven`, ranks may hold different numbers of rows, or none."""

    def of(uneven: bool) -> st.SearchStrategy[RankCase]:
        def rows(most: int) -> st.SearchStrategy[tuple[int, ...]]:
            if uneven:
                return st.tuples(*[st.integers(0, most)] * world_size).filter(any)
            return st.integers(1, most).map(lambda n: (n,) * world_size)

        given: dict[str, Any] = {
            "n": st.just(0),
            "d": st.one_of(st.integers(1, 9), st.sampled_from([33, 40])),
            "dtype": st.sampled_from([torch.float64, *DTYPES] if impl == "eager" else DTYPES[1:]),
            "rows": st.sampled_from([3, 9, 40]).flatmap(rows),
            "impl": st.just(impl),
            "dist_impl": st.sampled_from(["gather", "ring"]),
            "uneven": st.just(uneven),
        }
        return st.builds(RankCase, **(DRAWN | given))

    return st.booleans().flatmap(of)
