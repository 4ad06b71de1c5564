"""Autograd of the contrastive term: only log-sum-exps cross from forward to backward.

With l_ij = s * I_i . T_j, r_i and c_j the log-sum-exps of the rows and columns of l, and N pairs:

    symmetric   L = 1/(2N) * (sum_i r_i + sum_j c_j - 2 * sum_i l_ii)     (Goel et al. 2022, eq. 1)
    one way     L = 1/N * (sum_i r_i - sum_i l_ii)

The backward pass computes the logits again: 8 N^2 D flops in all where dense autograd takes 6, but
no N x N matrix is ever kept.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cyclip_loss import ops, reference


class _Contrastive(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        symmetric: bool,
        impl: str,
    ) -> Tensor:
        row_lse, column_lse, pair_logits = ops.contrastive_lse(
            image_features, text_features, logit_scale, 0, symmetric, impl
        )
        ctx.save_for_backward(image_features, text_features, logit_scale, row_lse, column_lse)
        ctx.symmetric, ctx.impl = symmetric, impl
        loss: Tensor = (row_lse - pair_logits).mean()
        if symmetric:
            loss = (loss + (column_lse - pair_logits).mean()) / 2
        # An infinite feature may leave an infinite loss; inf - inf makes it NaN, as a NaN stays.
        return loss + (loss - loss)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        image_features, text_features, logit_scale, row_lse, column_lse = ctx.saved_tensors
        needs_image, needs_text, needs_scale = ctx.needs_input_grad[:3]
        weight = grad / (len(image_features) * (2 if ctx.symmetric else 1))
        image_grad, text_grad, scale_grad = ops.contrastive_grads(
            image_features,
            text_features,
            logit_scale,
            row_lse,
            column_lse,
            weight,
            0,
            ctx.symmetric,
            needs_image,
            needs_text,
            needs_scale,
            ctx.impl,
        )
        return (
            image_grad if needs_image else None,
            text_grad if needs_text else None,
            scale_grad if needs_scale else None,
            None,
            None,
        )


_contrastive: Callable[..., Tensor] = _Contrastive.apply


def contrastive_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    impl: str,
    symmetric: bool = True,
) -> Tensor:
    """The contrastive term of checked inputs: a scalar of the accumulation dtype.

    image_features, text_features: (N, D), row i of one is paired with row i of the other;
    logit_scale: scalar of the accumulation dtype, exp'd. Not `symmetric`: rows to columns only.
    """
    if impl == "reference":
        dense = reference.contrastive_loss if symmetric else reference.one_way_contrastive_loss
        return dense(image_features, text_features, logit_scale).to(logit_scale.dtype)
    return _contrastive(image_features, text_features, logit_scale, symmetric, impl)
