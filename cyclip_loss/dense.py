"""Both terms of a batch with few rows, from N x N matrices that are computed once.

Up to N = 2 D these matrices are not much larger than the features, and take no more flops than
avoiding them. So forward keeps the exponentials, which `contrastive.py` computes again in backward,
and W, which `cyclic.py` replaces by Gram matrices. With U = I + T, V = I - T and W = U V^T:

    N P_in = ||W + W^T||_F^2 / 4,    N P_cross = ||W - W^T||_F^2 / 4,    their sum is ||W||_F^2

Forward and backward take 6 N^2 D flops for the contrastive term and 6 N^2 D for the penalties.
`contrastive.py` takes 8 N^2 D. Gram matrices take 8 N D^2, 10 N D^2 if C is needed to separate
terms of equal weight, and 14 N D^2 if the weights differ.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cyclip_loss.numerics import accumulation_dtype, without_autocast
from cyclip_loss.operators import call_backward


def contrastive_loss(
    image_features: Tensor, text_features: Tensor, logit_scale: Tensor, ids: Tensor | None
) -> Tensor:
    """CLIP's loss (Goel et al. 2022, eq. 1), a scalar of the accumulation dtype.

    image_features, text_features: (N, D); logit_scale: scalar; ids: (N,).
    """
    dtype = accumulation_dtype(image_features.dtype)
    row_lse, column_lse, pair_logits = _LogSumExps.apply(  # type: ignore[no-untyped-call]
        image_features.to(dtype), text_features.to(dtype), logit_scale, ids
    )
    # r_i - l_ii = log(1 + exp(a_i - l_ii)), with a_i over the negatives alone.
    margins = torch.stack((row_lse, column_lse)) - pair_logits
    # Above 40, log(1 + exp(x)) rounds to x in float64.
    return F.softplus(margins, threshold=40.0).sum() / (2 * len(pair_logits))


class _LogSumExps(torch.autograd.Function):
    """Log-sum-exps of the negatives of each row and column, and the pairs' logits: (N,) each."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        image_features, text_features, logit_scale, ids = inputs
        with without_autocast(image_features):
            logits = (image_features @ text_features.T).mul_(logit_scale)
        pair_logits = logits.diagonal().clone()
        # From here on only negatives count. Not -inf: a row without negatives must add 0, not NaN.
        least = torch.finfo(logits.dtype).min
        logits.fill_diagonal_(least)
        if ids is not None:
            logits.masked_fill_(ids[:, None] == ids, least)
        row_max, column_max = logits.amax(dim=1), logits.amax(dim=0)
        row_exps = (logits - row_max[:, None]).exp_()
        column_exps = logits.sub_(column_max).exp_()
        row_sums, column_sums = row_exps.sum(dim=1), column_exps.sum(dim=0)
        ctx.save_for_backward(
            image_features, text_features, logit_scale, row_exps, column_exps, row_sums, column_sums
        )
        # An infinite pair logit would look perfectly matched. inf - inf makes it NaN.
        pair_logits += pair_logits - pair_logits
        return row_sums.log() + row_max, column_sums.log() + column_max, pair_logits

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad
        return (*call_backward(_log_sum_exp_grads, *ctx.saved_tensors, *grads, needs), None)


def _log_sum_exp_grads(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    row_exps: Tensor,
    column_exps: Tensor,
    row_sums: Tensor,
    column_sums: Tensor,
    row_grad: Tensor,
    column_grad: Tensor,
    pair_grad: Tensor,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Gradients of the features and the scale, each None where not needed.

    With upstream gradients g and h of the log-sum-exps a and b, and e of the pairs' logits:

        G_ij = g_i exp(l_ij - a_i) + h_j exp(l_ij - b_j) for negatives,  G_ii = e_i
        dI = s G T,   dT = s G^T I,   ds = sum_ij G_ij (I_i . T_j) = sum_i I_i . (G T)_i
    """
    needs_image, needs_text, needs_scale, _ = needs
    gradient = row_exps * (row_grad / row_sums)[:, None]
    gradient.addcmul_(column_exps, column_grad / column_sums)
    gradient.diagonal().copy_(pair_grad)
    image_grad = text_grad = scale_grad = None
    with without_autocast(image_features):
        if needs_image or (needs_scale and not needs_text):
            image_grad = gradient @ text_features
        if needs_text:
            text_grad = gradient.T @ image_features
    if needs_scale and image_grad is not None:
        scale_grad = torch.dot(image_features.reshape(-1), image_grad.view(-1))
    elif needs_scale and text_grad is not None:
        scale_grad = torch.dot(text_features.reshape(-1), text_grad.view(-1))
    if image_grad is not None:
        image_grad = image_grad.mul_(logit_scale) if needs_image else None
    if text_grad is not None:
        text_grad.mul_(logit_scale)
    return image_grad, text_grad, scale_grad


def penalties(
    image_features: Tensor,
    text_features: Tensor,
    weights: tuple[float, float],
    separate: bool,
    with_cross: bool,
) -> tuple[Tensor, ...]:
    """(weights[0] * N P_in, weights[1] * N P_cross) if `separate`, else (their sum,).

    image_features, text_features: (N, D). with_cross: False only for the sum with equal weights.
    """
    dtype = accumulation_dtype(image_features.dtype)
    image, text = image_features.to(dtype), text_features.to(dtype)
    product = _Product.apply(image + text, image - text)  # type: ignore[no-untyped-call]
    if not with_cross:
        return (product.square().sum() * weights[0],)
    # Squares of each part, where p + q and p - q would cancel.
    inmodal = (product + product.T).square().sum() * (weights[0] / 4)
    crossmodal = (product - product.T).square().sum() * (weights[1] / 4)
    return (inmodal, crossmodal) if separate else (inmodal + crossmodal,)


class _Product(torch.autograd.Function):
    """W = U V^T (N, N) of U and V (N, D), never in autocast's dtype."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(u, v)
        with without_autocast(u):
            return u @ v.T

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return call_backward(_product_grads, *ctx.saved_tensors, grad)


def _product_grads(u: Tensor, v: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    with without_autocast(u):
        return grad @ v, grad.T @ u
