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

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cyclip_loss import ops
from cyclip_loss.eager import accumulation_dtype


def direct_is_cheaper(n: int, d: int, with_cross: bool) -> bool:
    """Whether the direct form takes fewer flops, forward and backward, than the Gram form.

    direct: 6 N^2 D. Gram: 14 N D^2, or 8 N D^2 where C is not needed. W is then smaller than
    7/3 N D elements, so memory stays O(N D) either way.
    """
    return 6 * n < (14 if with_cross else 8) * d


class _CyclicPenalties(torch.autograd.Function):
    """[lambda_in * P_in, lambda_cross * P_cross] if `separate`, else [their sum]."""

    @staticmethod
    def forward(
        ctx: Any,
        image_features: Tensor,
        text_features: Tensor,
        lambda_inmodal: float,
        lambda_crossmodal: float,
        separate: bool,
    ) -> Tensor:
        n, d = image_features.shape
        with_cross = separate or lambda_inmodal != lambda_crossmodal
        direct = direct_is_cheaper(n, d, with_cross)
        statistics = ops.cyclic_statistics(image_features, text_features, direct, with_cross)
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
        terms = torch.stack((inmodal, crossmodal) if separate else (inmodal + crossmodal,))

        ctx.save_for_backward(image_features, text_features, statistics)
        ctx.lambdas = (lambda_inmodal, lambda_crossmodal)
        ctx.direct, ctx.with_cross, ctx.separate = direct, with_cross, separate
        # An infinite feature may leave an infinite penalty; inf - inf makes it NaN.
        return terms + (terms - terms)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_terms: Tensor) -> tuple[Tensor | None, ...]:
        image_features, text_features, statistics = ctx.saved_tensors
        needs_image, needs_text = ctx.needs_input_grad[:2]
        n = len(image_features)
        inmodal = grad_terms[0] * (ctx.lambdas[0] / n)
        crossmodal = grad_terms[1 if ctx.separate else 0] * (ctx.lambdas[1] / n)
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
        )
        return (
            image_grad if needs_image else None,
            text_grad if needs_text else None,
            None,
            None,
            None,
        )


def cyclic_penalty(
    image_features: Tensor,
    text_features: Tensor,
    lambda_inmodal: float,
    lambda_crossmodal: float,
) -> Tensor:
    """lambda_inmodal * P_in + lambda_crossmodal * P_cross of checked inputs: a scalar.

    Features (N, D); the scalar has the accumulation dtype. Both lambdas 0: nothing is computed.
    """
    if lambda_inmodal == 0 and lambda_crossmodal == 0:
        return _zero(image_features)
    terms: Tensor = _CyclicPenalties.apply(
        image_features, text_features, lambda_inmodal, lambda_crossmodal, False
    )
    return terms[0]


def cyclic_penalties(
    image_features: Tensor,
    text_features: Tensor,
    lambda_inmodal: float,
    lambda_crossmodal: float,
) -> tuple[Tensor, Tensor]:
    """lambda_inmodal * P_in and lambda_crossmodal * P_cross apart, as `cyclic_penalty` otherwise.

    With equal lambdas this costs 2 N D^2 flops more in the Gram form: only the sum does without C.
    """
    if lambda_inmodal == 0 and lambda_crossmodal == 0:
        return _zero(image_features), _zero(image_features)
    terms: Tensor = _CyclicPenalties.apply(
        image_features, text_features, lambda_inmodal, lambda_crossmodal, True
    )
    return terms[0], terms[1]


def _zero(features: Tensor) -> Tensor:
    return features.new_zeros((), dtype=accumulation_dtype(features.dtype))
