"""Autograd of the contrastive term: vectors of N cross from forward to backward, no matrix.

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
from torch import Tensor

from cyclip_loss import distributed, exchange
from cyclip_loss.distributed import Ranks


class _Contrastive(torch.autograd.Function):
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
    ) -> Tensor:
        columns = text_features if gathered is None else distributed.finish_gather(gathered, ranks)
        how = (symmetric, impl, *ranks.named())
        loss, *of_pairs = exchange.contrastive_lse(image_features, columns, logit_scale, *how)
        ctx.save_for_backward(image_features, columns, logit_scale, *of_pairs)
        ctx.how = how
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        needs = list(ctx.needs_input_grad[:3])
        arguments = (*ctx.saved_tensors, grad, needs, *ctx.how)
        grads = exchange.contrastive_grads(*arguments)
        needed = (grad if need else None for grad, need in zip(grads, needs, strict=True))
        return (*needed, None, None, None, None)


_contrastive: Callable[..., Tensor] = _Contrastive.apply


def contrastive_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    gathered: Tensor | None,
    symmetric: bool,
    impl: str,
    ranks: Ranks,
) -> Tensor:
    """The contrastive term of checked inputs: a scalar of the accumulation dtype.

    image_features, text_features: (n, D), this rank's, row i of one is paired with row i of the
    other; logit_scale: scalar of the accumulation dtype, exp'd; gathered: where the text features
    are gathered, `distributed.start_gather` of them. Not `symmetric`: rows to columns only.
    """
    return _contrastive(
        image_features, text_features, logit_scale, gathered, symmetric, impl, ranks
    )
