"""Both terms of a batch with few rows, from N x N matrices, in plain PyTorch.

Up to N = D these matrices are not larger than the features, and take no more flops than the
streamed form. So PyTorch's autograd keeps them, and torch.compile fuses what is between the
products. With U = I + T, V = I - T and W = U V^T:

    P_in = ||W + W^T||_F^2 / (4N)        P_cross = ||W - W^T||_F^2 / (4N)

The contrastive term has the formula of `contrastive.py`: its sums run over the negatives.
"""

from typing import Any

import torch
from torch import Tensor

from cyclip_loss.batch import Plan
from cyclip_loss.logits import Logits
from cyclip_loss.numerics import accumulation_dtype, is_traced, without_autocast


def log_sum_exps(logits: Logits, may_share: bool = True) -> tuple[Tensor, Tensor]:
    """The log-sum-exps of the negatives of the pairs' rows and columns, and the pairs' logits.

    Shapes (2, n), or (1, n) unless `logits.symmetric`, and (n,). Row i is paired with column i; if
    the columns are extra negatives, the second result is empty. Without negatives, a log-sum-exp is
    the lowest number of the dtype: of -inf, the gradient would be NaN.

    may_share: on a CPU, one exponential of each logit serves rows and columns. If a sum is then too
    small, everything is computed again. (To see the sums, a GPU's host would wait, and compiled
    code cannot.)
    """
    dtype = logits.logit_scale.dtype
    lowest = torch.finfo(dtype).min
    rest: list[Any]
    row_features, column_features, *rest = logits
    if row_features.dtype != dtype:
        # Under autocast, which would round the products, all features but float64 have 16 bits. (To
        # look for it in every call takes 2% of a step of 128 pairs.)
        with without_autocast(row_features):
            return log_sum_exps(Logits(row_features.to(dtype), column_features.to(dtype), *rest))
    traced = is_traced(row_features)
    # Not `.T`, a permutation for autograd, which takes longer.
    negatives = torch.mm(row_features, column_features.mT) * logits.logit_scale
    detached = negatives.detach()
    # Autograd does not see the masks, which are written through `detached`. It need not: the
    # gradient of a masked logit is 0, as its exponential is 0 or, in a row without negatives,
    # the upstream gradient is. While compiling it sees them: else Inductor (PyTorch 2.13) drops
    # the gradient of the pair logits in batches of 3 or 4 pairs.
    masked = negatives if traced else detached
    pair_logits = negatives.new_empty(0)  # extra negatives have none
    if logits.has_pairs():
        if traced:
            # Not a view of the diagonal: Inductor makes its stride, N + 1, a constant (PyTorch
            # 2.13). To write through such a view, below, is an operator without one.
            pairs = torch.linalg.vecdot(row_features, column_features) * logits.logit_scale
        else:
            pairs = negatives.diagonal()
        # NaN for an infinite pair logit, which would look perfectly matched.
        # (`torch.func.linearize` ends the process at `add` with another alpha than 1.)
        pair_logits = pairs + pairs.detach() * 0
        masked.diagonal().fill_(lowest)
    same = logits.same_ids(0, negatives.shape[0])
    if same is not None:
        masked.masked_fill_(same, lowest)
    dims = (1, 0) if logits.symmetric else (1,)
    if may_share and row_features.is_cpu and not traced:
        # Autograd need not see the maximum either: subtracted here and added below, it has no
        # gradient. That saves 2% of a step of 128 pairs.
        maximum = detached.max()
        detached.sub_(maximum)
        exps = negatives.exp()
        sums = torch.stack([exps.sum(dim) for dim in dims])
        # Of a sum of at least 1e-19, exponentials that underflow (each below 1.2e-38 in float32)
        # are less than 1e-15, for 8,192 of them; and an upstream gradient of up to 1e19 can be
        # divided by it. Written with `not`, so that NaN counts as too small.
        if not sums.min().item() >= 1e-19:
            return log_sum_exps(logits, may_share=False)
        lse = sums.log()
        lse.detach().add_(maximum)
        return lse, pair_logits
    # Not `torch.logsumexp`, which computes the exponentials again in backward.
    of_dims = []
    for dim in dims:
        maximum = detached.amax(dim, keepdim=True)
        of_dims.append((negatives - maximum).exp_().sum(dim).log() + maximum.view(-1))
    return torch.stack(of_dims), pair_logits


def cyclic_terms(
    image_features: Tensor, text_features: Tensor, weights: Any, plan: Plan
) -> list[Tensor]:
    """Both weighted penalties if `plan.output_dict`, else [their sum]. Features: (N, D).

    weights: of N * P_in and N * P_cross. They are equal unless `plan.with_cross`.
    """
    dtype = accumulation_dtype(image_features.dtype)
    with without_autocast(image_features):
        image, text = image_features.to(dtype), text_features.to(dtype)
        u, v = image + text, image - text
        if plan.centered:
            # Autograd sees the means, which second derivatives need.
            u, v = u - u.mean(dim=0), v - v.mean(dim=0)
        w_matrix = u @ v.mT
        if not plan.with_cross:
            # The backward of a product takes less time than that of `square`.
            return [(w_matrix * w_matrix).sum() * ((weights[0] + weights[1]) / 2)]
        inmodal = (w_matrix + w_matrix.mT).square().sum() * (weights[0] / 4)
        crossmodal = (w_matrix - w_matrix.mT).square().sum() * (weights[1] / 4)
        return [inmodal, crossmodal] if plan.output_dict else [inmodal + crossmodal]
