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

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from cyclip_loss import engines
from cyclip_loss.batch import Batch, Plan
from cyclip_loss.numerics import accumulation_dtype, without_autocast
from cyclip_loss.options import PenaltyOptions
from cyclip_loss.ranks import collectives
from cyclip_loss.terms import dense
from cyclip_loss.terms.operators import Operator, empty_grad_like

TERMS = ("inmodal_cyclic_loss", "crossmodal_cyclic_loss")


def start_grams(batch: Batch, plan: Plan) -> Tensor | None:
    """The Gram matrices for `terms`; None if the plan needs none.

    Across ranks, the start of an all-reduce of them and the row count: 2 D^2 + 1 elements of the
    accumulation dtype, 3 D^2 + 1 with C.
    """
    if plan.penalties != "gram":
        return None
    with torch.no_grad():
        grams: Tensor = gram_matrices.chosen(batch.traced)(
            batch.image_features, batch.text_features, plan.with_cross, plan.engine
        )
    if batch.ranks.size == 1:
        return grams
    own = torch.cat((grams.reshape(-1), grams.new_full((1,), batch.image_features.shape[0])))
    return collectives.start_all_reduce(own, "sum", batch.ranks)


def terms(
    batch: Batch, plan: Plan, options: PenaltyOptions, grams: Tensor | None
) -> dict[str, Tensor]:
    """The weighted penalties by name if `plan.output_dict`, else {"cyclic_loss": their sum}.

    The scalars have the accumulation dtype. Empty if the plan needs none. grams: from
    `start_grams`.
    """
    if plan.penalties == "none":
        return {}
    image_features, text_features = batch.image_features, batch.text_features
    total: Any
    total, d = image_features.shape
    dtype = accumulation_dtype(image_features.dtype)
    if plan.penalties == "zero":
        # Zeros with zero gradients, as one penalty has if only its lambda is 0.
        zero = (image_features[:0].sum() + text_features[:0].sum()).to(dtype)
        penalties = [zero, zero.clone()] if plan.output_dict else [zero]
    elif plan.penalties == "gram":
        if grams is not None and batch.ranks.size > 1:
            summed = collectives.wait(grams)
            grams, total = summed[:-1].view(-1, d, d), summed[-1]
        # Numbers become tensors on the CPU: filling one on a GPU would launch a kernel.
        tensors = [
            x if isinstance(x, Tensor) else torch.scalar_tensor(x, dtype=dtype, device="cpu")
            for x in _weights(batch, plan, options, total)
        ]
        penalties = _CyclicPenalties.apply(  # type: ignore[no-untyped-call]
            image_features, text_features, grams, *tensors, batch.ranks.size, batch.traced, plan
        )
    else:
        weights = _weights(batch, plan, options, total)
        penalties = dense.cyclic_terms(
            image_features, text_features, weights, plan.with_cross, plan.output_dict
        )
    names = TERMS if plan.output_dict else ("cyclic_loss",)
    return dict(zip(names, penalties))  # noqa: B905 (PyTorch 2.8 can't trace strict)


def total(terms: Iterable[Tensor]) -> Tensor:
    """The sum of the terms of a loss."""
    first, *others = terms
    return sum(others, first)


def _weights(batch: Batch, plan: Plan, options: PenaltyOptions, total: Any) -> tuple[Any, Any]:
    """The weights of N * P_in and N * P_cross, as numbers or tensors; equal without C."""
    one: Any = 1.0
    # torch.compile would make constants of numbers that are combined with each other.
    if batch.traced:
        features = batch.image_features
        one = features.new_ones((), dtype=accumulation_dtype(features.dtype))
    inmodal, crossmodal = options.weights(total, one)
    if not plan.with_cross:
        # They are equal. Use both, so that torch.compile treats both as inputs.
        inmodal = (inmodal + crossmodal) / 2
    return inmodal, crossmodal


class _CyclicPenalties(torch.autograd.Function):
    """(weight_in * N P_in, weight_cross * N P_cross) if `plan.output_dict`, else (their sum,).

    image_features, text_features: (n, D); grams: the Gram matrices of the global batch, which is on
    `size` ranks; weights: scalar tensors, equal unless `plan.with_cross`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        image_features: Tensor,
        text_features: Tensor,
        grams: Tensor,
        inmodal_weight: Tensor,
        crossmodal_weight: Tensor,
        size: int,
        traced: bool,
        plan: Plan,
    ) -> tuple[Tensor, ...]:
        weights = [inmodal_weight, crossmodal_weight]
        penalties = penalties_of(grams, weights, plan.output_dict)
        ctx.save_for_backward(image_features, text_features, grams, *weights)
        ctx.plan, ctx.traced, ctx.size = plan, traced, size
        return tuple(penalties)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        image_features, text_features, grams, *weights = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:2])
        feature_grads = cyclic_grads.chosen(ctx.traced)(
            image_features,
            text_features,
            grams,
            list(grads),
            weights,
            ctx.size,  # the gradients are multiplied by it, because DDP averages
            needs,
            ctx.plan.engine,
        )
        return (*feature_grads, *[None] * 6)


def penalties_of(grams: Tensor, weights: list[Tensor], output_dict: bool) -> list[Tensor]:
    """Both weighted penalties if `output_dict`, else [their sum] (Goel et al. 2022, eq. 2 and 3).

        p = <A, B>_F,  q = <C, C^T>_F,  N * P_in = (p + q) / 2,  N * P_cross = (p - q) / 2

    Plain PyTorch for every engine, outside of the operators, so that a compiler can fuse these few
    operations.

    grams: from `start_grams`, summed over ranks; weights: of N * P_in and of N * P_cross, scalar
    tensors on the device of the Gram matrices or on the CPU. Without C, the weights are equal, and
    only the sum is wanted.
    """
    p = (grams[0] * grams[1]).sum()
    if len(grams) == 2:
        return [p * weights[0]]
    q = (grams[2] * grams[2].T).sum()
    # Both are sums of squares. Rounding must not make them negative; `clamp` keeps NaN.
    inmodal = (p + q).clamp_(min=0) * (weights[0] / 2)
    crossmodal = (p - q).clamp_(min=0) * (weights[1] / 2)
    return [inmodal, crossmodal] if output_dict else [inmodal + crossmodal]


def _gram_matrices(
    image_features: Tensor, text_features: Tensor, with_cross: bool, engine: str
) -> Tensor:
    """The Gram matrices of this rank's rows, as in `eager.gram_matrices`."""
    compute = engines.load(engine, image_features)
    with without_autocast(image_features):
        return compute.gram_matrices(  # type: ignore[no-any-return]
            image_features, text_features, with_cross
        )


def _gram_fake(given: Any) -> Tensor:
    features: Tensor = given.image_features
    d, dtype = features.shape[1], accumulation_dtype(features.dtype)
    return features.new_empty(3 if given.with_cross else 2, d, d, dtype=dtype)


gram_matrices = Operator("gram_matrices", _gram_matrices, _gram_fake)


def _cyclic_grads(
    image_features: Tensor,
    text_features: Tensor,
    grams: Tensor,
    grads: list[Tensor],
    weights: list[Tensor],
    size: int,
    needs: list[bool],
    engine: str,
) -> tuple[Tensor, Tensor]:
    """Gradients of this rank's features, as in `eager.cyclic_grads`."""
    compute = engines.load(engine, image_features)
    with without_autocast(image_features):
        return compute.cyclic_grads(  # type: ignore[no-any-return]
            image_features, text_features, grams, grads, weights, size, needs
        )


def _grads_fake(given: Any) -> tuple[Tensor, ...]:
    features = given.image_features, given.text_features
    return tuple(map(empty_grad_like, features, given.needs))


cyclic_grads = Operator("cyclic_grads", _cyclic_grads, _grads_fake)
