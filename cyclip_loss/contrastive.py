"""Autograd of the contrastive term: vectors of N cross from forward to backward, no matrix.

Over ranks, a rank's image rows meet the text columns of all (`exchange.py`).

With l_ij = s * I_i . T_j, r_i and c_j the log-sum-exps of the rows and columns of l, and N pairs:

    symmetric   L = 1/(2N) * (sum_i r_i + sum_j c_j - 2 * sum_i l_ii)     (Goel et al. 2022, eq. 1)
    one way     L = 1/N * (sum_i r_i - sum_i l_ii)

A pair that is found with confidence has l_ii near r_i, and its gradient has exp(l_ii - r_i) - 1:
differences that would lose all digits. So what is summed is a_i, the log-sum-exp of the row's
negatives, all but its pair (b_j for a column), and neither is a difference of large numbers:

    r_i - l_ii            = log(1 + exp(a_i - l_ii))
    exp(l_ii - r_i) - 1   = -1 / (1 + exp(l_ii - a_i))

The backward pass computes the logits again: 8 N^2 D flops in all where dense autograd takes 6, but
no N x N matrix is ever kept.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cyclip_loss import distributed, exchange, ops, reference
from cyclip_loss.distributed import Ranks


def _of_pairs(rows: Tensor, cols: Tensor | None, pair_logits: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of all r_i - l_ii (and c_i - l_ii), and what the pairs have in G: (n,).

    rows, cols: (n,), a_i and, if symmetric, b_i; pair_logits: (n,). Formulas above.
    """
    gap = (rows if cols is None else torch.stack((rows, cols))) - pair_logits
    # An infinite pair logit would give a finite loss; inf - inf makes it NaN.
    gap = gap + (pair_logits - pair_logits)
    of_pairs = -gap.sigmoid()
    # Beyond 40, log(1 + exp(x)) is x to the last digit of float64.
    return F.softplus(gap, threshold=40.0).sum(), of_pairs if cols is None else of_pairs.sum(dim=0)


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
        rows, cols, pair_logits = ops.contrastive_lse(
            image_features, text_features, logit_scale, 0, symmetric, impl
        )
        loss, pair_gradient = _of_pairs(rows, cols if symmetric else None, pair_logits)
        row_lse = torch.logaddexp(rows, pair_logits)
        column_lse = torch.logaddexp(cols, pair_logits) if symmetric else cols
        ctx.save_for_backward(
            image_features, text_features, logit_scale, row_lse, column_lse, pair_gradient
        )
        ctx.symmetric, ctx.impl = symmetric, impl
        loss = loss / (len(image_features) * (2 if symmetric else 1))
        # An infinite feature may leave an infinite loss; inf - inf makes it NaN, as a NaN stays.
        return loss + (loss - loss)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        image_features, text_features, logit_scale, row_lse, column_lse, pair_gradient = (
            ctx.saved_tensors
        )
        needs_image, needs_text, needs_scale = ctx.needs_input_grad[:3]
        weight = grad / (len(image_features) * (2 if ctx.symmetric else 1))
        image_grad, text_grad, scale_grad = ops.contrastive_grads(
            image_features,
            text_features,
            logit_scale,
            row_lse,
            column_lse,
            pair_gradient,
            weight,
            0,
            ctx.symmetric,
            needs_image,
            needs_text,
            needs_scale,
            False,
            ctx.impl,
        )
        return (
            image_grad if needs_image else None,
            text_grad if needs_text else None,
            scale_grad if needs_scale else None,
            None,
            None,
        )


class _ContrastiveOverRanks(torch.autograd.Function):
    """The loss of the global batch, and how many ranks stood in (`distributed.agree`).

    gathered: the text features of all ranks, on their way; None: they travel in a ring.
    """

    @staticmethod
    def forward(
        ctx: Any,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        gathered: Tensor | None,
        symmetric: bool,
        impl: str,
        ranks: Ranks,
    ) -> tuple[Tensor, Tensor]:
        if gathered is None:
            text, find_lse = text_features, exchange.ring_lse
        else:
            text, find_lse = distributed.finish_gather(gathered, ranks), exchange.gather_lse
        rows, cols, pair_logits, column_lse = find_lse(
            image_features, text, logit_scale, symmetric, impl, *ranks.named()
        )
        loss, pair_gradient = _of_pairs(rows, cols if symmetric else None, pair_logits)
        row_lse = torch.logaddexp(rows, pair_logits)
        loss, stand_ins = distributed.total(loss, ranks)
        ctx.save_for_backward(image_features, text, logit_scale, row_lse, column_lse, pair_gradient)
        ctx.ring, ctx.symmetric, ctx.impl, ctx.ranks = gathered is None, symmetric, impl, ranks
        ctx.mark_non_differentiable(stand_ins)
        total = ranks.total(text_features.shape[0])
        loss = loss / (total * (2 if symmetric else 1))
        # An infinite feature may leave an infinite loss; inf - inf makes it NaN, as a NaN stays.
        return loss + (loss - loss), stand_ins

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        image_features, text, logit_scale, row_lse, column_lse, pair_gradient = ctx.saved_tensors
        needs_image, needs_text, needs_scale = ctx.needs_input_grad[:3]
        ranks = ctx.ranks
        total = ranks.total(image_features.shape[0])
        # W times: DDP will average.
        weight = grad * (ranks.group.size / (total * (2 if ctx.symmetric else 1)))
        grads = exchange.ring_grads if ctx.ring else exchange.gather_grads
        image_grad, text_grad, scale_grad = grads(
            image_features,
            text,
            logit_scale,
            row_lse,
            column_lse,
            pair_gradient,
            weight,
            ctx.symmetric,
            needs_image,
            needs_text,
            needs_scale,
            ctx.impl,
            *ranks.named(),
        )
        return (
            image_grad.to(image_features.dtype) if needs_image else None,
            text_grad.to(text.dtype) if needs_text else None,
            scale_grad if needs_scale else None,
            None,
            None,
            None,
            None,
        )


_contrastive: Callable[..., Tensor] = _Contrastive.apply
_contrastive_over_ranks: Callable[..., tuple[Tensor, Tensor]] = _ContrastiveOverRanks.apply


def contrastive_over_ranks(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    gathered: Tensor | None,
    impl: str,
    ranks: Ranks,
    symmetric: bool = True,
) -> tuple[Tensor, Tensor]:
    """As `contrastive_loss` for the global batch, and how many ranks stood in.

    image_features, text_features: (n, D), this rank's; gathered: `distributed.start_gather` of the
    text features, or None to let them travel in a ring.
    """
    return _contrastive_over_ranks(
        image_features, text_features, logit_scale, gathered, symmetric, impl, ranks
    )


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
