"""The two cyclic penalties without an N x N matrix, and their autograd.

With U = I + T, V = I - T, p = ||U V^T||_F^2 and q = <U V^T, V U^T>_F:

    P_in    = 1/N * ||I I^T - T T^T||_F^2 = (p + q) / (2N)          (Goel et al. 2022, eq. 2)
    P_cross = 1/N * ||I T^T - T I^T||_F^2 = (p - q) / (2N)          (Goel et al. 2022, eq. 3)

because I I^T - T T^T is the symmetric part of U V^T and I T^T - T I^T its antisymmetric part, up to
sign. p and q come from D x D Gram matrices:

    A = U^T U,  B = V^T V,  C = V^T U:      p = <A, B>_F,  q = <C, C^T>_F

`eager.cyclic_grads` has the formulas of the gradients. A, B and C are sums over rows. So across
ranks, one all-reduce makes them global, no features are sent, and backward communicates nothing.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from cyclip_loss import engines
from cyclip_loss.batch import Batch, Plan
from cyclip_loss.numerics import accumulation_dtype, is_traced, sum_of_rows
from cyclip_loss.options import PenaltyOptions
from cyclip_loss.ranks import collectives
from cyclip_loss.terms import dense
from cyclip_loss.terms.operators import Operator

TERMS = ("inmodal_cyclic_loss", "crossmodal_cyclic_loss")


class Started(NamedTuple):
    """The penalties of a call whose all-reduce runs while other terms are computed."""

    means: Tensor | None  # as in `eager.gram_matrices`, of all ranks' rows
    # The Gram matrices. Across ranks, the start of an all-reduce of them and the row count: 2 D^2 +
    # 1 elements of the accumulation dtype, 3 D^2 + 1 with C. None if the plan needs none.
    grams: Tensor | None


def start(batch: Batch, plan: Plan) -> Started:
    """Compute this rank's Gram matrices, for `terms`."""
    if plan.penalties != "gram":
        return Started(None, None)
    features, ranks = (batch.image_features, batch.text_features), batch.ranks
    means = None
    with torch.no_grad():
        if plan.centered:
            # For autograd the means are constants: the gradients of a function of centred features
            # sum to 0 over the rows, so what the means would add to them is 0.
            count: Any = features[0].shape[0]
            sums = torch.cat([sum_of_rows(x) for x in features])
            if ranks.size > 1:
                summed = collectives.all_reduce(_with_count(sums, features), "sum", ranks)
                sums, count = summed[:-1], summed[-1]
            means = (sums / count).view(2, -1)
        grams: Tensor = gram_matrices(*features, means, plan.with_cross, plan.impl)
    if ranks.size > 1:
        grams = collectives.start_all_reduce(_with_count(grams, features), "sum", ranks)
    return Started(means, grams)


def _with_count(sums: Tensor, features: tuple[Tensor, Tensor]) -> Tensor:
    """This rank's sums, and as the last element the number of rows in them."""
    return torch.cat((sums.reshape(-1), sums.new_full((1,), features[0].shape[0])))


def terms(batch: Batch, started: Started, plan: Plan, options: PenaltyOptions) -> dict[str, Tensor]:
    """The weighted penalties by name if `plan.output_dict`, else {"cyclic_loss": their sum}.

    The scalars have the accumulation dtype. Empty if the plan needs none.
    """
    image_features, text_features, ranks, *_ = batch
    means, grams = started
    num_pairs: Any
    num_pairs, d = image_features.shape
    if plan.penalties == "none":
        return {}
    dtype = accumulation_dtype(image_features.dtype)
    if plan.penalties == "zeros":
        # Zeros with zero gradients, as one penalty has if only its lambda is 0.
        zero = (image_features[:0].sum() + text_features[:0].sum()).to(dtype)
        penalties = [zero, zero.clone()] if plan.output_dict else [zero]
    else:
        if grams is not None and ranks.size > 1:
            summed = collectives.wait(grams)
            grams, num_pairs = summed[:-1].view(-1, d, d), summed[-1]
        one: Any = 1.0
        # torch.compile would make constants of numbers that are combined with each other.
        if is_traced(image_features):
            one = image_features.new_ones((), dtype=dtype)
        weights = options.weights(num_pairs, one)
        if grams is None:
            penalties = dense.cyclic_terms(image_features, text_features, weights, plan)
        else:
            differentiable = _GramMatrices.apply(  # type: ignore[no-untyped-call]
                image_features, text_features, means, grams, ranks.size, plan.impl
            )
            one_by_one = (weights[0], 0.0), (0.0, weights[1])
            penalties = [
                _WeightedSum.apply(*x, *differentiable)  # type: ignore[no-untyped-call]
                for x in (one_by_one if plan.output_dict else [weights])
            ]
    names = TERMS if plan.output_dict else ("cyclic_loss",)
    return dict(zip(names, penalties))  # noqa: B905 (PyTorch 2.8 can't trace strict)


class _GramMatrices(torch.autograd.Function):
    """The Gram matrices of the global batch, from `start`, as functions of the features.

    image_features, text_features: (n, D); means: from `start`; num_ranks: how many share the batch.
    """

    @staticmethod
    def forward(
        ctx: Any,
        image_features: Tensor,
        text_features: Tensor,
        means: Tensor | None,
        grams: Tensor,
        num_ranks: int,
        impl: str,
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(image_features, text_features, means)
        ctx.num_ranks, ctx.impl = num_ranks, impl
        return grams.unbind()

    @staticmethod
    def backward(ctx: Any, *gram_grads: Tensor) -> tuple[Tensor | None, ...]:
        grads = list(gram_grads)
        if ctx.num_ranks > 1:  # DDP averages
            grads = [x * ctx.num_ranks for x in grads]
        return (*cyclic_grads(*ctx.saved_tensors, grads, ctx.impl), None, None, None, None)


class _WeightedSum(torch.autograd.Function):
    """The sum of N * P_in and N * P_cross, each times its weight (Goel et al. 2022, eq. 2 and 3).

        p = <A, B>_F,  q = <C, C^T>_F,  N * P_in = (p + q) / 2,  N * P_cross = (p - q) / 2

    weights: numbers or scalars; A, B and, unless the weights are equal, C: (D, D), summed over
    ranks. Forward computes the gradients, because that takes fewer launches than autograd's
    formulas.
    """

    @staticmethod
    def forward(
        ctx: Any, inmodal: Any, crossmodal: Any, a: Tensor, b: Tensor, *c: Tensor
    ) -> Tensor:
        x, y = (inmodal + crossmodal) / 2, (inmodal - crossmodal) / 2
        grads = [*torch._foreach_mul([b, a], x), *[m.T.contiguous() * (2 * y) for m in c]]
        ctx.save_for_backward(*grads)
        total = torch.dot(a.view(-1), grads[0].view(-1))
        if c:
            total = total + torch.dot(c[0].view(-1), grads[2].view(-1)) / 2
            # Rounding must not make it negative; NaN stays. Not in place: under torch.compile,
            # PyTorch 2.11 would lose the gradient.
            total = total.clamp(min=0)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *torch._foreach_mul(ctx.saved_tensors, grad)


def _gram_matrices(
    image_features: Tensor,
    text_features: Tensor,
    means: Tensor | None,
    with_cross: bool,
    impl: str,
) -> Tensor:
    """The Gram matrices of this rank's rows, as in `eager.gram_matrices`."""
    return engines.load(impl, image_features).gram_matrices(  # type: ignore[no-any-return]
        image_features, text_features, means, with_cross
    )


def _gram_fake(given: Any) -> Tensor:
    features: Tensor = given.image_features
    d, dtype = features.shape[1], accumulation_dtype(features.dtype)
    return features.new_empty(3 if given.with_cross else 2, d, d, dtype=dtype)


gram_matrices = Operator("gram_matrices", _gram_matrices, _gram_fake)


def _cyclic_grads(
    image_features: Tensor,
    text_features: Tensor,
    means: Tensor | None,
    gram_grads: list[Tensor],
    impl: str,
) -> tuple[Tensor, Tensor]:
    """Gradients of this rank's features, as in `eager.cyclic_grads`."""
    return engines.load(impl, image_features).cyclic_grads(  # type: ignore[no-any-return]
        image_features, text_features, means, gram_grads
    )


def _grads_fake(given: Any) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in (given.image_features, given.text_features))


cyclic_grads = Operator("cyclic_grads", _cyclic_grads, _grads_fake)
