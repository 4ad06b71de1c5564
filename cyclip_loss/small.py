"""Autograd of the loss of a batch with few rows for its features: N x N matrices, each made once.

Up to N = 2 D, N x N matrices are not much larger than the features, and take no more flops than
what avoids them. So the eager engine then keeps G, which `contrastive.py` computes again in
backward, and W, which `cyclic.py` replaces by Gram matrices. With U = I + T, V = I - T and
W = U V^T, the rest as in those two files, and a and b what the lambdas weigh a pair with
(`cyclic.per_pair`, the lambdas over N):

    P_in = (p + q) / (2N),  P_cross = (p - q) / (2N),       p = ||W||_F^2,  q = <W, W^T>_F
    G_ij = exp(l_ij - r_i) + exp(l_ij - c_j),  of a pair less 2
    H    = (a + b) W + (a - b) W^T
    dI   = H V + H^T U + s/(2N) G T
    dT   = H V - H^T U + s/(2N) G^T I
    ds   = 1/(2N) sum_ij G_ij (I_i . T_j)

Forward and backward that is 6 N^2 D flops a term; `contrastive.py` takes 8 N^2 D, and the penalties
by Gram matrices 8 N D^2; 10 N D^2 where C is needed to tell terms of equal weight apart, 14 N D^2
where the weights differ.

The four products of backward could be one, [dI; dT] = [[S, X], [X^T, -S]] [I; T]. That is no faster
with its matrix to be filled, and S I - S T, which is S V, loses digits in rows whose pair is closer
than the other rows' are.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cyclip_loss import eager
from cyclip_loss.cyclic import per_pair
from cyclip_loss.eager import accumulation_dtype, weighted_penalties
from cyclip_loss.ops import engine, is_traced, no_second_derivatives, without_autocast


def loss_is_small(image_features: Tensor, text_features: Tensor, impl: str) -> bool:
    """Whether `cyclip_terms` is for these features (N, D), all in one process.

    With both terms it takes no more flops up to N = 2 D, with the contrastive one alone fewer
    always; but memory is to stay O(N D).
    """
    if not _computes(image_features, text_features, impl):
        return False
    n, d = image_features.shape
    return n <= 2 * d


def penalties_are_small(
    image_features: Tensor,
    text_features: Tensor,
    lambda_inmodal: float,
    lambda_crossmodal: float,
    separate: bool,
    impl: str,
) -> bool:
    """The same for `cyclic_penalties`: up to 4/3 D; to 5/3 D where Gram matrices would need C in
    forward, 7/3 D where in backward too.
    """
    if not _computes(image_features, text_features, impl):
        return False
    if lambda_inmodal == 0 and lambda_crossmodal == 0:
        return False
    n, d = image_features.shape
    flops_by_grams = 14 if lambda_inmodal != lambda_crossmodal else 10 if separate else 8
    return 6 * n <= flops_by_grams * d


def _computes(image_features: Tensor, text_features: Tensor, impl: str) -> bool:
    """Whether the eager engine computes, without what is not done here.

    That is an operator, which takes part where something is traced, and the fast products of 16-bit
    matrices that CUDA has.
    """
    return (
        not is_traced(image_features, text_features)
        and not eager.has_wide_products(image_features)
        and engine(impl, image_features) is eager
    )


def _contrastive(
    image: Tensor, text: Tensor, logit_scale: Tensor, with_gradient: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The contrastive term and, if asked for, G / (2N), (N, N), and ds.

    image, text: (N, D); logit_scale: scalar; all of the accumulation dtype.
    """
    n = len(image)
    cosines = image @ text.T
    logits = cosines * logit_scale
    pair_logits = logits.diagonal().clone()
    # From here on only negatives count. Finite, so that one row without any comes out as 0.
    logits.fill_diagonal_(torch.finfo(logits.dtype).min)
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
    # Beyond 40, log(1 + exp(x)) is x to the last digit of float64.
    loss = F.softplus(gap, threshold=40.0).sum() / (2 * n)
    if not with_gradient:
        return loss, None, None
    # exp(a_i - r_i): what all negatives of a row have in G, and its pair has with a minus sign.
    of_negatives = gap.sigmoid_().mul_(1 / (2 * n))
    weights = of_negatives / sums
    gradient = by_row.mul_(weights[0, :, None]).addcmul_(by_column, weights[1])
    torch.add(-of_negatives[0], of_negatives[1], alpha=-1, out=gradient.diagonal())
    return loss, gradient, torch.dot(gradient.view(-1), cosines.view(-1))


def _penalties(product: Tensor, weights: tuple[float, float], separate: bool) -> tuple[Tensor, ...]:
    """The weighted penalties from W, or (their sum,). weights: a and b."""
    with_cross = separate or weights[0] != weights[1]
    p = product.square().sum()
    q = (product * product.T).sum() if with_cross else None
    return tuple(weighted_penalties(p, q, list(weights), separate))


class _Small(torch.autograd.Function):
    """The terms if `separate`, else (their sum,). Without a logit scale: the penalties alone."""

    @staticmethod
    def forward(
        ctx: Any,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | None,
        weights: tuple[float, float],
        separate: bool,
        grad_mode: bool,  # of the call: off in here
    ) -> tuple[Tensor, ...]:
        dtype = accumulation_dtype(image_features.dtype)
        contrastive = gradient = scale_grad = product = None
        with without_autocast(image_features):
            image, text = image_features.to(dtype), text_features.to(dtype)
            terms: tuple[Tensor, ...] = ()
            if any(weights):
                product = (image + text) @ (image - text).T
                terms = _penalties(product, weights, separate)
            elif separate:
                terms = (image.new_zeros(()), image.new_zeros(()))
            if logit_scale is not None:
                contrastive, gradient, scale_grad = _contrastive(
                    image, text, logit_scale, grad_mode and any(ctx.needs_input_grad)
                )
                terms = (contrastive, *terms) if separate else (sum(terms, contrastive),)
        ctx.save_for_backward(
            image_features, text_features, logit_scale, gradient, scale_grad, product
        )
        ctx.weights = weights
        # An infinite feature may leave an infinite term; inf - inf makes it NaN, as a NaN stays.
        return tuple(term + (term - term) for term in terms)

    @staticmethod
    def backward(ctx: Any, *grad_terms: Tensor) -> tuple[Tensor | None, ...]:
        arguments = (*ctx.saved_tensors, ctx.weights, ctx.needs_input_grad, *grad_terms)
        # Grad mode, here, is create_graph=True.
        gradients = _gradients_in_grad_mode if torch.is_grad_enabled() else _gradients
        return (*gradients(*arguments), None, None, None)


def _gradients(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | None,
    gradient: Tensor | None,
    scale_grad: Tensor | None,
    product: Tensor | None,
    weights: tuple[float, float],
    needs: tuple[bool, ...],
    *grad_terms: Tensor,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dI, dT and ds, each None where not needed, from what `_Small.forward` saved.

    gradient: G / (2N); scale_grad: ds; product: W; weights: a and b; grad_terms: upstream
    gradients, of each term or of their sum.
    """
    needs_image, needs_text, needs_scale, *_ = needs
    dtype = accumulation_dtype(image_features.dtype)
    image_grad = text_grad = None
    with without_autocast(image_features):
        if scale_grad is not None and needs_scale:
            scale_grad = scale_grad * grad_terms[0]
        image, text = image_features.to(dtype), text_features.to(dtype)
        if product is not None:
            inmodal = grad_terms[-2 if len(grad_terms) > 1 else 0] * weights[0]
            crossmodal = grad_terms[-1] * weights[1]
            both_ways = product * (inmodal + crossmodal)
            difference = inmodal - crossmodal
            # Equal weights are the usual case, and W^T is slow to read; on CPU a look costs little.
            if difference.device.type != "cpu" or difference != 0:
                both_ways.addcmul_(product.T, difference)
            u_grad = both_ways @ (image - text)
            v_grad = both_ways.T @ (image + text)
            image_grad = u_grad + v_grad if needs_image else None
            text_grad = u_grad.sub_(v_grad) if needs_text else None
        if gradient is not None and logit_scale is not None:
            weighted = gradient * (logit_scale * grad_terms[0])
            if needs_image:
                image_grad = _add_product(image_grad, weighted, text)
            if needs_text:
                text_grad = _add_product(text_grad, weighted.T, image)
    return (
        image_grad.to(image_features.dtype) if image_grad is not None else None,
        text_grad.to(text_features.dtype) if text_grad is not None else None,
        scale_grad if needs_scale else None,
    )


def _add_product(total: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    return left @ right if total is None else total.addmm_(left, right)


class _GradientsInGradMode(torch.autograd.Function):
    """`_gradients`, which cannot be differentiated again."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor | None, ...]:
        return _gradients(*arguments)

    backward = staticmethod(no_second_derivatives)


_small: Callable[..., tuple[Tensor, ...]] = _Small.apply
_gradients_in_grad_mode: Callable[..., tuple[Tensor | None, ...]] = _GradientsInGradMode.apply


def cyclip_terms(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    lambda_inmodal: float,
    lambda_crossmodal: float,
    separate: bool,
    reference_batch_size: int | None = None,
) -> tuple[Tensor, ...]:
    """The contrastive term and both weighted penalties of checked inputs, or (their sum,).

    image_features, text_features: (N, D), row i of one is paired with row i of the other;
    logit_scale: scalar of the accumulation dtype, exp'd, which the results have too. Of both
    lambdas 0 nothing is computed. reference_batch_size: as in `cyclic.per_pair`.
    """
    weights = _weights(lambda_inmodal, lambda_crossmodal, image_features, reference_batch_size)
    return _small(
        image_features, text_features, logit_scale, weights, separate, torch.is_grad_enabled()
    )


def _weights(
    lambda_inmodal: float,
    lambda_crossmodal: float,
    image_features: Tensor,
    reference_batch_size: int | None,
) -> tuple[float, float]:
    n = len(image_features)
    return (
        float(per_pair(lambda_inmodal, n, reference_batch_size)),
        float(per_pair(lambda_crossmodal, n, reference_batch_size)),
    )


def cyclic_penalties(
    image_features: Tensor,
    text_features: Tensor,
    lambda_inmodal: float,
    lambda_crossmodal: float,
    separate: bool,
    reference_batch_size: int | None = None,
) -> tuple[Tensor, ...]:
    """The penalties alone: `cyclic.cyclic_penalties` for a small batch. One lambda is not 0."""
    weights = _weights(lambda_inmodal, lambda_crossmodal, image_features, reference_batch_size)
    return _small(image_features, text_features, None, weights, separate, torch.is_grad_enabled())
