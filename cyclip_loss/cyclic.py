"""Autograd of the two cyclic penalties, without an N x N matrix for large batches.

With U = I + T, V = I - T, p = ||U V^T||_F^2 and q = <U V^T, V U^T>_F:

    P_in    = 1/N * ||I I^T - T T^T||_F^2 = (p + q) / (2N)          (Goel et al. 2022, eq. 2)
    P_cross = 1/N * ||I T^T - T I^T||_F^2 = (p - q) / (2N)          (Goel et al. 2022, eq. 3)

because I I^T - T T^T is the symmetric part of U V^T and I T^T - T I^T its antisymmetric part, up to
sign. Two forms of p and q, the cheaper of which is taken:

    Gram    A = U^T U, B = V^T V, C = V^T U (D x D):   p = <A, B>_F,   q = <C, C^T>_F
    direct  W = U V^T (N x N, small batches only):     p +- q = 1/2 * ||W +- W^T||_F^2

The gradients are in `eager.cyclic_grads`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cyclip_loss import ops, reference
from cyclip_loss.eager import accumulation_dtype


def direct_is_cheaper(n: int, d: int, with_cross: bool) -> bool:
    """Whether the direct form takes fewer flops, forward and backward, than the Gram form.

    direct: 6 N^2 D. Gram: 14 N D^2, or 8 N D^2 where C is not needed. W is then smaller than
    7/3 N D elements, so memory stays O(N D) either way.
    """
    return 6 * n < (14 if with_cross else 8) * d


class _CyclicPenalties(torch.autograd.Function):
    """(lambda_in * P_in, lambda_cross * P_cross) if `separate`, else (their sum,)."""

    @staticmethod
    def forward(
        ctx: Any,
        image_features: Tensor,
        text_features: Tensor,
        lambda_inmodal: float,
        lambda_crossmodal: float,
        separate: bool,
        impl: str,
    ) -> tuple[Tensor, ...]:
        n, d = image_features.shape
        with_cross = separate or lambda_inmodal != lambda_crossmodal
        direct = direct_is_cheaper(n, d, with_cross)
        statistics = ops.cyclic_statistics(image_features, text_features, direct, with_cross, impl)
        if direct:
            p_plus_q = (statistics + statistics.T).square().sum() / 2
            p_minus_q = (statistics - statistics.T).square().sum() / 2
        else:
            p = (statistics[0] * statistics[1]).sum()
            q = (statistics[2] * statistics[2].T).sum() if with_cross else torch.zeros_like(p)
            # Sums of squares both: rounding must not make them negative. `clamp` keeps NaN.
            p_plus_q, p_minus_q = (p + q).clamp(min=0), (p - q).clamp(min=0)
        inmodal = p_plus_q * (lambda_inmodal / (2 * n))
        crossmodal = p_minus_q * (lambda_crossmodal / (2 * n))
        # Tensors of their own: a caller may write `loss += ...`, which views would refuse.
        terms = (inmodal, crossmodal) if separate else (inmodal + crossmodal,)

        ctx.save_for_backward(image_features, text_features, statistics)
        ctx.lambdas = (lambda_inmodal, lambda_crossmodal)
        ctx.direct, ctx.with_cross, ctx.impl = direct, with_cross, impl
        # An infinite feature may leave an infinite penalty; inf - inf makes it NaN.
        return tuple(term + (term - term) for term in terms)

    @staticmethod
    def backward(ctx: Any, *grad_terms: Tensor) -> tuple[Tensor | None, ...]:
        image_features, text_features, statistics = ctx.saved_tensors
        needs_image, needs_text = ctx.needs_input_grad[:2]
        n = len(image_features)
        inmodal = grad_terms[0] * (ctx.lambdas[0] / n)
        crossmodal = grad_terms[-1] * (ctx.lambdas[1] / n)
        coefficients = torch.stack((inmodal + crossmodal, inmodal - crossmodal))
        image_grad, text_grad = ops.cyclic_grads(
            image_features,
            text_features,
            statistics,
            coefficients,
            ctx.direct,
            ctx.with_cross,
            needs_image,
            needs_text,
            ctx.impl,
        )
        return (
            image_grad if needs_image else None,
            text_grad if needs_text else None,
            None,
            None,
            None,
            None,
        )


_cyclic_penalties: Callable[..., tuple[Tensor, ...]] = _CyclicPenalties.apply


def cyclic_penalties(
    image_features: Tensor,
    text_features: Tensor,
    lambda_inmodal: float,
    lambda_crossmodal: float,
    separate: bool,
    impl: str,
) -> tuple[Tensor, ...]:
    """(lambda_inmodal * P_in, lambda_crossmodal * P_cross) of checked inputs, or (their sum,).

    Features (N, D); the scalars have the accumulation dtype. Both lambdas 0: nothing is computed.
    With equal lambdas `separate` costs up to 2 N D^2 flops more: only the sum does without C.
    """
    lambda_inmodal, lambda_crossmodal = float(lambda_inmodal), float(lambda_crossmodal)
    if lambda_inmodal == 0 and lambda_crossmodal == 0:
        zero = image_features.new_zeros((), dtype=accumulation_dtype(image_features.dtype))
        return (zero, torch.zeros_like(zero)) if separate else (zero,)
    if impl == "reference":
        dtype = accumulation_dtype(image_features.dtype)
        features = (image_features, text_features)
        inmodal = lambda_inmodal * reference.inmodal_cyclic_penalty(*features).to(dtype)
        crossmodal = lambda_crossmodal * reference.crossmodal_cyclic_penalty(*features).to(dtype)
        return (inmodal, crossmodal) if separate else (inmodal + crossmodal,)
    return _cyclic_penalties(
        image_features, text_features, lambda_inmodal, lambda_crossmodal, separate, impl
    )
