"""One step of the loss over ranks: its inputs, the step itself, and what should come out."""

from dataclasses import dataclass, replace

import pytest
import torch
from accuracy import (
    Results,
    assert_accurate,
    contrastive_bound,
    cyclic_bound,
    exact_contrastive,
    exact_cyclic,
)
from conftest import set_strip_rows
from hypothesis import strategies as st
from inputs import DISTANCES, DTYPES, LAMBDAS, LAYOUTS, LOGIT_SCALES, lay_out, loss_dtype, pairs
from pool import Ranks, own_device
from torch import Tensor

from cyclip_loss import CyclicPenalty, CyCLIPLoss

TERMS = ("contrastive_loss", "inmodal_cyclic_loss", "crossmodal_cyclic_loss")
# Also: the loss, the sum of its terms, and the module with the penalties alone.
WHOLE = ("loss", "sum", "penalty")


@dataclass
class RankCase:
    """The input of one step. Written so that hypothesis prints all that makes it."""

    rows: tuple[int, ...]  # of each rank
    d: int = 5
    dtype: torch.dtype = torch.float64
    impl: str = "eager"
    dist_impl: str = "gather"
    term: str = "loss"
    lambdas: tuple[float, float] = (0.25, 0.25)
    logit_scale: float = 10.0
    distance: float | None = None
    layouts: tuple[str, str] = ("contiguous", "contiguous")
    strip_rows: int | None = None
    uneven: bool = False
    upstream: float = 1.0
    seed: int = 0

    def features(self, rank: int) -> tuple[Tensor, Tensor]:
        """A rank's rows of the images and texts."""
        both = pairs(sum(self.rows), self.d, self.distance, seed=self.seed, device=own_device())
        image, text = (features.to(self.dtype).split(self.rows)[rank] for features in both)
        return lay_out(image, self.layouts[0]), lay_out(text, self.layouts[1])

    def batch(self) -> tuple[Tensor, Tensor]:
        """The rows of all ranks."""
        images, texts = zip(*map(self.features, range(len(self.rows))), strict=True)
        return torch.cat(images), torch.cat(texts)

    def scale(self) -> Tensor:
        return torch.tensor(self.logit_scale, dtype=loss_dtype(self.dtype), device=own_device())

    def weights(self) -> tuple[bool, float, float]:
        """Whether the contrastive term is in what is computed, and the weights of the penalties."""
        if self.term in WHOLE:
            return (self.term != "penalty", *self.lambdas)
        at = TERMS.index(self.term)
        return at == 0, self.lambdas[0] * (at == 1), self.lambdas[1] * (at == 2)


def evaluate(case: RankCase, image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    if case.term == "penalty":
        return CyclicPenalty(*case.lambdas, impl=case.impl)(image, text)
    loss = CyCLIPLoss(*case.lambdas, dist_impl=case.dist_impl, uneven=case.uneven, impl=case.impl)
    if case.term == "loss":
        return loss(image, text, scale)
    terms = loss(image, text, scale, output_dict=True)
    return sum(terms.values()) if case.term == "sum" else terms[case.term]


def step(rank: int, world_size: int, case: RankCase) -> Results:
    """The value and this rank's gradients; runs on every rank."""
    leaves = [tensor.detach().requires_grad_() for tensor in (*case.features(rank), case.scale())]
    copies = [leaf.detach().clone() for leaf in leaves]
    with pytest.MonkeyPatch.context() as monkeypatch:
        set_strip_rows(monkeypatch, case.strip_rows)
        value = evaluate(case, *leaves)
        if value.requires_grad:
            value.backward(torch.full_like(value, case.upstream))
    assert all(torch.equal(leaf, copy) for leaf, copy in zip(leaves, copies, strict=True))
    return Results(
        value.detach(),
        *(torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves),
    )


def check(case: RankCase, ranks: Ranks) -> list[Results]:
    """Runs the step. Every rank has the loss of the whole batch, and W times its gradients.

    The ranks' gradients of the logit scale average to the whole batch's.
    """
    world_size = len(case.rows)
    of_ranks = ranks.run(world_size, step, case)
    for one in of_ranks:
        assert one.value.dtype == one.logit_scale.dtype == loss_dtype(case.dtype)
        assert one.image.dtype == one.text.dtype == case.dtype
        assert torch.equal(one.value, of_ranks[0].value), "not the same bits on every rank"
    scale_grads = torch.stack([one.logit_scale for one in of_ranks]).double()
    actual = Results(
        of_ranks[0].value,
        torch.cat([one.image for one in of_ranks]),
        torch.cat([one.text for one in of_ranks]),
        scale_grads.sum().to(loss_dtype(case.dtype)),
    )

    image, text = case.batch()
    contrastive, *lambdas = case.weights()
    exact = [exact_cyclic(image, text, *lambdas)]
    bound = cyclic_bound(image, text, *lambdas, case.impl)
    if contrastive:
        exact.append(exact_contrastive(image, text, case.logit_scale))
        bound = bound + contrastive_bound(image, text, case.logit_scale, case.impl)
    factor = world_size * case.upstream
    exact = [part.times_upstream(factor) for part in exact]
    assert_accurate(actual, exact, bound.times_upstream(abs(factor)))
    return of_ranks


@st.composite
def rank_cases(draw: st.DrawFn, world_size: int, impl: str, uneven: bool = False) -> RankCase:
    least, most = (0 if uneven else 1), draw(st.sampled_from([3, 9, 24]))
    if uneven:
        counts = st.tuples(*[st.integers(least, most)] * world_size).filter(any)
    else:
        counts = st.integers(least, most).map(lambda n: (n,) * world_size)
    case = RankCase(
        rows=draw(counts),
        d=draw(st.one_of(st.integers(1, 9), st.sampled_from([33, 40]))),
        dtype=draw(st.sampled_from([torch.float64, *DTYPES] if impl == "eager" else DTYPES[1:])),
        impl=impl,
        dist_impl=draw(st.sampled_from(["gather", "ring"])),
        term=draw(st.sampled_from([*TERMS, *WHOLE, "loss"])),
        lambdas=draw(st.one_of(LAMBDAS, st.just((0.0, 0.0)))),
        logit_scale=draw(LOGIT_SCALES),
        distance=draw(st.sampled_from(DISTANCES)),
        strip_rows=draw(st.sampled_from([None, 1, 7])),
        uneven=uneven,
        upstream=draw(st.sampled_from([1.0, 1.0, -0.5, 64.0])),
        seed=draw(st.integers(0, 2**31)),
    )
    if all(case.rows):  # "expanded" needs a first row
        case = replace(case, layouts=draw(st.tuples(*[st.sampled_from(LAYOUTS)] * 2)))
    return case
