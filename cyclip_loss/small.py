"""The loss of a batch with few rows, and its autograd: N x N matrices, each computed once.

Up to N = 2 D they are not much larger than the features, and take no more flops than avoiding them.
So the eager engine keeps G, which `contrastive.py` computes again in backward, and W, which
`cyclic.py` replaces by Gram matrices. With U = I + T, V = I - T and W = U V^T, and a and b the
weights of N * P_in and N * P_cross (`options.penalty_weights`):

    P_in = (p + q) / (2N),  P_cross = (p - q) / (2N),       p = ||W||_F^2,  q = <W, W^T>_F
    G_ij = exp(l_ij - r_i) + exp(l_ij - c_j),  minus 2 for a pair
    H    = (a + b) W + (a - b) W^T
    dI   = H V + H^T U + s/(2N) G T
    dT   = H V - H^T U + s/(2N) G^T I
    ds   = 1/(2N) sum_ij G_ij (I_i . T_j)

Forward and backward, that is 6 N^2 D flops for the contrastive term and 6 N^2 D for the penalties.
`contrastive.py` takes 8 N^2 D. Gram matrices take 8 N D^2, 10 N D^2 if C is needed to separate
terms of equal weight, and 14 N D^2 if the weights differ.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cyclip_loss import eager
from cyclip_loss.eager import weighted_penalties
from cyclip_loss.engines import engine
from cyclip_loss.numerics import accumulation_dtype, has_wide_products
from cyclip_loss.operators import FirstDerivativesOnly, is_traced, without_autocast
from cyclip_loss.options import PenaltyOptions, has_equal_lambdas, penalty_weights


def _contrastive(
    image: Tensor, text: Tensor, logit_scale: Tensor, ids: Tensor | None, with_gradient: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The contrastive term and, if `with_gradient`, G / (2N), (N, N), and ds.

    image, text: (N, D); logit_scale: scalar; all of the accumulation dtype; ids: (N,).
    """
    n = len(image)
    cosines = image @ text.T
    logits = cosines * logit_scale
    pair_logits = logits.diagonal().clone()
    # From here on only negatives count. Not -inf: a row without negatives must add 0, not NaN.
    least = torch.finfo(logits.dtype).min
    logits.fill_diagonal_(least)
    if ids is not None:
        logits.masked_fill_(ids[:, None] == ids, least)
    maxima = logits.new_empty(2, n)
    sums = torch.empty_like(maxima)
    torch.amax(logits, dim=1, out=maxima[0])
    torch.amax(logits, dim=0, out=maxima[1])
    by_row = (logits - maxima[0, :, None]).exp_()
    by_column = logits.sub_(maxima[1]).exp_()
    torch.sum(by_row, dim=1, out=sums[0])
    torch.sum(by_column, dim=0, out=sums[1])
    # a_i - l_ii and b_i - l_ii. An infinite pair logit could give a finite loss; inf - inf is NaN.
    gap = sums.log().add_(maxima).sub_(pair_logits).add_(pair_logits - pair_logits)
    # Above 40, log(1 + exp(x)) rounds to x in float64.
    loss = F.softplus(gap, threshold=40.0).sum() / (2 * n)
    if not with_gradient:
        return loss, None, None
    # exp(a_i - r_i): the row's part of G, summed over its negatives; its pair has minus this.
    of_negatives = gap.sigmoid_().mul_(1 / (2 * n))
    weights = of_negatives / sums
    gradient = by_row.mul_(weights[0, :, None]).addcmul_(by_column, weights[1])
    torch.add(-of_negatives[0], of_negatives[1], alpha=-1, out=gradient.diagonal())
    return loss, gradient, torch.dot(gradient.view(-1), cosines.view(-1))


class _Small(torch.autograd.Function):
    """The terms if `separate`, else (their sum,). Without a logit scale: the penalties alone.

    weights: a and b; grad_mode: whether the caller has gradients on (in forward they are off).
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        image_features, text_features, logit_scale, ids, weights, separate, grad_mode = inputs
        dtype = accumulation_dtype(image_features.dtype)
        contrastive = gradient = scale_grad = product = None
        with without_autocast(image_features):
            image, text = image_features.to(dtype), text_features.to(dtype)
            terms: tuple[Tensor, ...] = ()
            if any(weights):
                product = (image + text) @ (image - text).T
                with_cross = separate or weights[0] != weights[1]
                q = (product * product.T).sum() if with_cross else None
                terms = (*weighted_penalties(product.square().sum(), q, weights, separate),)
            elif separate:
                terms = (image.new_zeros(()), image.new_zeros(()))
            if logit_scale is not None:
                contrastive, gradient, scale_grad = _contrastive(
                    image, text, logit_scale, ids, grad_mode and any(ctx.needs_input_grad)
                )
                terms = (contrastive, *terms) if separate else (sum(terms, contrastive),)
        ctx.save_for_backward(
            image_features, text_features, logit_scale, gradient, scale_grad, product
        )
        ctx.weights = weights
        # An infinite feature may give an infinite term; inf - inf makes it NaN, and NaN stays.
        return tuple(term + (term - term) for term in terms)

    @staticmethod
    def backward(ctx: Any, *grad_terms: Tensor) -> tuple[Tensor | None, ...]:
        arguments = (ctx.weights, ctx.needs_input_grad, grad_terms, *ctx.saved_tensors)
        if torch.is_grad_enabled():  # create_graph=True
            gradients = FirstDerivativesOnly.apply(_gradients, *arguments)  # type: ignore[no-untyped-call]
        else:
            gradients = _gradients(*arguments)
        return (*gradients, None, None, None, None)


def _gradients(weights: Any, needs: Any, grad_terms: Any, *saved: Any) -> tuple[Any, ...]:
    """dI, dT and ds, each None where not needed, from what `_Small.forward` saved.

    weights: a and b; needs: which of the three; grad_terms: upstream gradients of each term, or of
    their sum.
    """
    # The last three are G / (2N), ds and W, or None.
    image_features, text_features, logit_scale, gradient, scale_grad, product = saved
    dtype = accumulation_dtype(image_features.dtype)
    with without_autocast(image_features):
        image, text = image_features.to(dtype), text_features.to(dtype)
        if product is None:
            image_grad, text_grad = torch.zeros_like(image), torch.zeros_like(text)
        else:
            inmodal = grad_terms[-2 if len(grad_terms) > 1 else 0] * weights[0]
            crossmodal = grad_terms[-1] * weights[1]
            both_ways = product * (inmodal + crossmodal)
            difference = inmodal - crossmodal
            # Weights are usually equal, and W^T is slow to read; comparing costs little on a CPU.
            if difference.device.type != "cpu" or difference != 0:
                both_ways.addcmul_(product.T, difference)
            u_grad = both_ways @ (image - text)
            v_grad = both_ways.T @ (image + text)
            image_grad, text_grad = u_grad + v_grad, u_grad.sub_(v_grad)
        if gradient is not None:
            scale_grad = scale_grad * grad_terms[0]
            weighted = gradient * (logit_scale * grad_terms[0])
            if needs[0]:
                image_grad.addmm_(weighted, text)
            if needs[1]:
                text_grad.addmm_(weighted.T, image)
    grads = image_grad.to(image_features.dtype), text_grad.to(text_features.dtype), scale_grad
    return tuple(grad if need else None for grad, need in zip(grads, needs[:3], strict=True))


def terms(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | None,
    options: PenaltyOptions,
    separate: bool,
    ids: Tensor | None = None,
) -> tuple[Tensor, ...] | None:
    """The contrastive term and both weighted penalties of checked inputs, or (their sum,).

    None where the other form takes fewer flops, that is beyond N = 2 D; for the penalties alone
    beyond N = 4/3 D, or 5/3 D if Gram matrices would need C in forward, or 7/3 D if they would need
    it in backward too; or if the eager engine does not compute, or has fast 16-bit products.

    image_features, text_features: (N, D); logit_scale: scalar of the accumulation dtype, or None
    for the penalties alone; ids: (N,). If both lambdas are 0, no penalty is computed.
    """
    # First, so that N is not compared when traced.
    if is_traced(image_features, text_features) or has_wide_products(image_features):
        return None
    n, d = image_features.shape
    flops_by_grams = (10 if separate else 8) if has_equal_lambdas(options) else 14
    if 6 * n > (12 if logit_scale is not None else flops_by_grams) * d:
        return None
    if engine(options.impl, image_features) is not eager:
        return None
    settings = (ids, penalty_weights(options, n), separate, torch.is_grad_enabled())
    return _Small.apply(image_features, text_features, logit_scale, *settings)  # type: ignore[no-any-return, no-untyped-call]
