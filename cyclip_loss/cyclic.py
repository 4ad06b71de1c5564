"""Autograd of the two cyclic penalties, without an N x N matrix for large batches.

With U = I + T, V = I - T, p = ||U V^T||_F^2 and q = <U V^T, V U^T>_F:

    P_in    = 1/N * ||I I^T - T T^T||_F^2 = (p + q) / (2N)          (Goel et al. 2022, eq. 2)
    P_cross = 1/N * ||I T^T - T I^T||_F^2 = (p - q) / (2N)          (Goel et al. 2022, eq. 3)

because I I^T - T T^T is the symmetric part of U V^T and I T^T - T I^T its antisymmetric part, up to
sign. Two forms of p and q, the cheaper of which is taken:

    Gram    A = U^T U, B = V^T V, C = V^T U (D x D):   p = <A, B>_F,   q = <C, C^T>_F
    direct  W = U V^T (N x N, small batches only):     p +- q = 1/2 * ||W +- W^T||_F^2

The gradients are in `eager.cyclic_grads`. Over ranks A, B and C are sums: one all-reduce makes them
global, no feature travels, and backward needs no communication.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cyclip_loss import distributed
from cyclip_loss.distributed import Ranks
from cyclip_loss.eager import accumulation_dtype
from cyclip_loss.ops import engine, like, operator


def direct_is_cheaper(n: int, d: int, with_cross: bool) -> bool:
    """Whether the direct form takes fewer flops, forward and backward, than the Gram form.

    direct: 6 N^2 D. Gram: 14 N D^2, or 8 N D^2 where C is not needed. W is then smaller than
    7/3 N D elements, so memory stays O(N D) either way.
    """
    return 6 * n < (14 if with_cross else 8) * d


def _statistics_shapes(
    image: Tensor, text: Tensor, direct: bool, with_cross: bool, impl: str
) -> Tensor:
    n, d = image.shape
    shape = (n, n) if direct else (3 if with_cross else 2, d, d)
    return image.new_empty(shape, dtype=accumulation_dtype(image.dtype))


@operator(_statistics_shapes)
def cyclic_statistics(
    image_features: Tensor, text_features: Tensor, direct: bool, with_cross: bool, impl: str
) -> Tensor:
    """W or the Gram matrices of this rank's rows: `eager.cyclic_statistics`."""
    compute = engine(impl, image_features)
    return compute.cyclic_statistics(image_features, text_features, direct, with_cross)  # type: ignore[no-any-return]


def _grads_shapes(image: Tensor, text: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    needs = others[4]
    return like(image, needs[0]), like(text, needs[1])


@operator(_grads_shapes, gives_gradients=True)
def cyclic_grads(
    image_features: Tensor,
    text_features: Tensor,
    statistics: Tensor,
    coefficients: Tensor,
    direct: bool,
    with_cross: bool,
    needs: list[bool],
    impl: str,
) -> tuple[Tensor, Tensor]:
    """Gradients of this rank's features: `eager.cyclic_grads`."""
    compute = engine(impl, image_features)
    return compute.cyclic_grads(  # type: ignore[no-any-return]
        image_features, text_features, statistics, coefficients, direct, with_cross, needs
    )


def start_penalties(
    image_features: Tensor,
    text_features: Tensor,
    lambda_inmodal: float,
    lambda_crossmodal: float,
    impl: str,
    ranks: Ranks,
) -> Tensor | None:
    """Over ranks: the Gram matrices and the number of rows, on their way to being summed.

    Returns, for `cyclic_penalties`, 3 D^2 + 1 elements of the accumulation dtype; None in one
    process or if both lambdas are 0. C is always among them, so that a rank which asks for the
    terms apart, to log them, sends no more than the others. With the number of rows there too,
    ranks need not hold equally many.
    """
    if ranks.group is None or not (lambda_inmodal > 0 or lambda_crossmodal > 0):
        return None
    with torch.no_grad():
        grams = cyclic_statistics(image_features, text_features, False, True, impl)
    own = torch.cat((grams.reshape(-1), grams.new_full((1,), image_features.shape[0])))
    return distributed.start_all_reduce(own, "sum", ranks.group)


class _CyclicPenalties(torch.autograd.Function):
    """(P_in, P_cross) if `with_cross`, else (their sum,), which does without q and so without C.

    started: over `size` > 1 ranks, `start_penalties`; the penalties are the global ones.
    """

    @staticmethod
    def forward(
        ctx: Any,
        image_features: Tensor,
        text_features: Tensor,
        with_cross: bool,
        impl: str,
        started: Tensor | None,
        size: int,
    ) -> tuple[Tensor, ...]:
        rows, d = image_features.shape
        n: int | Tensor = rows  # of the global batch, below
        direct = started is None and direct_is_cheaper(rows, d, with_cross)
        if started is None:
            saved = statistics = cyclic_statistics(
                image_features, text_features, direct, with_cross, impl
            )
        else:
            saved = distributed.wait(started)
            statistics, n = _unpack(saved, d)
        if direct:
            p_plus_q = (statistics + statistics.T).square().sum() / 2
            p_minus_q = (statistics - statistics.T).square().sum() / 2
        else:
            p = (statistics[0] * statistics[1]).sum()
            q = (statistics[2] * statistics[2].T).sum() if with_cross else torch.zeros_like(p)
            # Sums of squares both: rounding must not make them negative. `clamp` keeps NaN.
            p_plus_q, p_minus_q = (p + q).clamp(min=0), (p - q).clamp(min=0)
        inmodal, crossmodal = p_plus_q / (2 * n), p_minus_q / (2 * n)
        terms = (inmodal, crossmodal) if with_cross else (inmodal + crossmodal,)

        ctx.save_for_backward(image_features, text_features, saved)
        ctx.direct, ctx.with_cross, ctx.impl, ctx.size = direct, with_cross, impl, size
        # An infinite feature may leave an infinite penalty; inf - inf makes it NaN.
        return tuple(term + (term - term) for term in terms)

    @staticmethod
    def backward(ctx: Any, *grad_terms: Tensor) -> tuple[Tensor | None, ...]:
        image_features, text_features, statistics = ctx.saved_tensors
        n: int | Tensor = image_features.shape[0]
        if ctx.size > 1:
            statistics, n = _unpack(statistics, image_features.shape[1])
            statistics = statistics if ctx.with_cross else statistics[:2]
        # size times: DDP will average.
        inmodal, crossmodal = (grad_terms[at] * (ctx.size / n) for at in (0, -1))
        coefficients = torch.stack((inmodal + crossmodal, inmodal - crossmodal))
        needs = list(ctx.needs_input_grad[:2])
        features = (image_features, text_features, statistics, coefficients)
        grads = cyclic_grads(*features, ctx.direct, ctx.with_cross, needs, ctx.impl)
        needed = (grad if need else None for grad, need in zip(grads, needs, strict=True))
        return (*needed, None, None, None, None)


def _unpack(summed: Tensor, d: int) -> tuple[Tensor, Tensor]:
    """The Gram matrices and the number of rows of `start_penalties`."""
    return summed[:-1].view(-1, d, d), summed[-1]


_cyclic_penalties: Callable[..., tuple[Tensor, ...]] = _CyclicPenalties.apply


def cyclic_penalties(
    image_features: Tensor,
    text_features: Tensor,
    lambda_inmodal: float,
    lambda_crossmodal: float,
    separate: bool,
    impl: str,
    started: Tensor | None = None,
    size: int = 1,
) -> tuple[Tensor, ...]:
    """(lambda_inmodal * P_in, lambda_crossmodal * P_cross) of checked inputs, or (their sum,).

    Features (N, D); the scalars have the accumulation dtype. Both lambdas 0: nothing is computed.
    With equal lambdas `separate` costs up to 2 N D^2 flops more: only the sum does without C.
    started: `start_penalties`, for the penalties of all of `size` ranks.
    """
    # `torch.compile` makes a number a constant, and compiles anew for each other one, where it goes
    # into an autograd.Function, is compared by == or is not used. So the weights stay outside, are
    # compared by < and >, and are used both, also where they are equal.
    if not (lambda_inmodal > 0 or lambda_crossmodal > 0):
        zero = image_features.new_zeros((), dtype=accumulation_dtype(image_features.dtype))
        return (zero, torch.zeros_like(zero)) if separate else (zero,)
    with_cross = separate
    if lambda_inmodal < lambda_crossmodal or lambda_inmodal > lambda_crossmodal:
        with_cross = True
    penalties = _cyclic_penalties(image_features, text_features, with_cross, impl, started, size)
    if not with_cross:
        half = penalties[0] / 2
        return (half * lambda_inmodal + half * lambda_crossmodal,)
    inmodal, crossmodal = penalties[0] * lambda_inmodal, penalties[1] * lambda_crossmodal
    return (inmodal, crossmodal) if separate else (inmodal + crossmodal,)
