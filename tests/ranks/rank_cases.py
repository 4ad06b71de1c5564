"""One step of the loss across ranks: its inputs, the step itself, and the expected results."""

from dataclasses import dataclass
from functools import partial

import pytest
import torch
from accuracy import check, evaluate
from compiled import in_order
from hypothesis import strategies as st
from inputs import FOR_KERNELS, INPUTS, Case, cases
from pool import own_device

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
    is_compiled: bool = False

    def __post_init__(self):
        self.n = sum(self.rows_per_rank)
        if not self.uneven:  # each rank has the same number of extra negatives
            self.negatives = tuple(
                None if count is None else count - count % self.world_size
                for count in self.negatives
            )

    @property
    def world_size(self):
        return len(self.rows_per_rank)

    @property
    def options(self):
        """Of `evaluate`."""
        options = {"dist_impl": self.dist_impl, "uneven": self.uneven}
        if self.is_compiled:
            # With the backend "eager", PyTorch 2.11 loses gradients across ranks.
            wrap = partial(torch.compile, backend=in_order, fullgraph=not self.uneven)
            options["wrap"] = wrap
        return options

    def split(self, name, tensor):
        """The rows of each rank."""
        if tensor.ndim == 0:
            return (tensor,) * self.world_size
        if not name.startswith("negative"):
            return tensor.split(self.rows_per_rank)
        if self.seed % 2 and self.uneven:  # the last rank has all extra negatives
            return tensor.split((*[0] * (self.world_size - 1), len(tensor)))
        return tensor.tensor_split(self.world_size)

    def rank_arguments(self, rank):
        """A rank's rows of all arguments."""
        given = self.arguments(own_device())
        return {name: self.split(name, x)[rank] for name, x in given.items()}

    def rank_inputs(self, rank):
        """A rank's images and texts, and the logit scale."""
        given = self.rank_arguments(rank)
        return [given[name] for name in INPUTS]


def step(rank, world_size, case):
    """The terms and this rank's gradients; runs on every rank."""
    return evaluate(case, case.rank_arguments(rank), case.impl, **case.options)


def check_ranks(case, ranks):
    """Assert that each rank has the terms of the whole batch, and W times the gradients.

    Of the scalars' gradients only the average over ranks is compared, and of a loss made from
    log-sum-exps only the average of its values.
    """
    all_terms, all_grads = zip(*ranks.run(case.world_size, step, case), strict=True)
    terms = all_terms[0]
    for name, term in terms.items():
        on_ranks = torch.stack([others[name] for others in all_terms])
        if case.function in ("log-sum-exps", "one way"):
            terms[name] = on_ranks.mean()
        else:
            same = {"rtol": 0, "atol": 0, "equal_nan": True}
            torch.testing.assert_close(on_ranks, term.expand_as(on_ranks), **same)
    grads = {}
    for name, grad in all_grads[0].items():
        parts = [rank_grads[name] for rank_grads in all_grads]
        if grad is None:
            assert parts == [None] * len(parts), name
            grads[name] = None
        elif grad.ndim == 0:
            grads[name] = torch.stack(parts).double().sum().to(grad.dtype)
        else:
            grads[name] = torch.cat(parts)
    check(case, case.arguments(ranks.device), terms, grads, case.impl)


def rank_cases(impl):
    """Draws any step of three ranks. If it is uneven, they may have different numbers of rows."""

    def steps(uneven, most):
        given = {} if impl == "eager" else dict(FOR_KERNELS)
        rows = st.integers(1, most).map(lambda n: (n,) * 3)
        if uneven:
            rows = st.tuples(*[st.integers(0, most)] * 3).filter(any)
        given |= {
            "n": st.just(0),
            "d": st.one_of(st.integers(1, 9), st.sampled_from([33, 40])),
            "rows_per_rank": rows,
            "impl": st.just(impl),
            "dist_impl": st.sampled_from(["gather", "ring"]),
            "uneven": st.just(uneven),
        }
        return cases(RankCase, **given)

    most = st.sampled_from([3, 9, 33])
    return st.tuples(st.booleans(), most).flatmap(lambda drawn: steps(*drawn))
