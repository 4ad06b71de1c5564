"""Both terms of a batch with few rows, from N x N matrices, in plain PyTorch.

Up to about N = 1.5 D these matrices are not much larger than the features, and take no more flops
than the streamed form. So PyTorch's autograd keeps them, and torch.compile fuses what is between
the products. With U = I + T, V = I - T and W = U V^T:

    P_in = ||W + W^T||_F^2 / (4N)        P_cross = ||W - W^T||_F^2 / (4N)

The contrastive term has the formula of `contrastive.py`: its sums run over the negatives.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cyclip_loss.engines import eager
from cyclip_loss.logits import Logits
from cyclip_loss.numerics import accumulation_dtype, without_autocast


def log_sum_exps(logits: Logits) -> tuple[Tensor, Tensor]:
    """The log-sum-exps of the negatives of the pairs' rows and columns, and the pairs' logits.

    Shapes (2, n), or (1, n) unless `logits.symmetric`, and (n,). Row i is paired with column i.
    Without negatives, a log-sum-exp is the lowest number of the dtype: of -inf, the gradient would
    be NaN.
    """
    dtype = accumulation_dtype(logits.row_features.dtype)
    lowest = torch.finfo(dtype).min
    with without_autocast(logits.row_features):
        negatives = _products(logits, dtype) * logits.logit_scale
        detached = negatives.detach()
        diagonal = detached.diagonal()
        # All three are NaN where a pair's logit is infinite, and would look perfectly matched.
        zero_or_nan = diagonal - diagonal
        pair_logits = negatives.diagonal() + zero_or_nan
        # Mask without autograd. A masked element has no gradient: its exponential is 0 or, in a row
        # without negatives, the upstream gradient is. Not while compiling: Inductor (PyTorch 2.13)
        # would drop the gradient of the pair logits in batches of 3 or 4 pairs.
        masked = negatives if torch.compiler.is_compiling() else detached
        masked.diagonal().fill_(lowest)
        same = logits.same_ids(0, negatives.shape[0])
        if same is not None:
            masked.masked_fill_(same, lowest)
        # Not `torch.logsumexp`, which computes the exponentials again in backward.
        maxima, sums = [], []
        for dim in (1, 0) if logits.symmetric else (1,):
            maximum = detached.amax(dim, keepdim=True)
            maxima.append(maximum.view(-1))
            sums.append((negatives - maximum).exp_().sum(dim))
        if logits.has_extra_negatives:
            n, zero_or_nan = logits.num_pairs, logits.zero_or_nan(dtype)
            maxima, sums = [x[:n] for x in maxima], [x[:n] for x in sums]
            pair_logits = pair_logits[:n]
        return torch.stack(sums).log() + torch.stack(maxima) + zero_or_nan, pair_logits


def _products(logits: Logits, dtype: torch.dtype) -> Tensor:
    return logits.row_features.to(dtype) @ logits.column_features.to(dtype).T


def contrastive_term(logits: Logits) -> Tensor:
    """The mean over the rows, or the rows and columns, of the pairs: a scalar."""
    negatives_lse, pair_logits = log_sum_exps(logits)
    return eager.softplus(negatives_lse - pair_logits).mean()


def sigmoid_loss(logits: Logits, logit_bias: Tensor, divisor: int) -> Tensor:
    """SigLIP's loss, as in `terms/sigmoid.py`, without other positives: a scalar."""
    dtype = accumulation_dtype(logits.row_features.dtype)
    with without_autocast(logits.row_features):
        with torch.no_grad():  # an infinite feature may give a logit without loss
            zero = logits.zero_or_nan(dtype)
        margins = _products(logits, dtype).mul(-logits.logit_scale).sub_(logit_bias)  # y_ij l_ij
        # The diagonal goes on where extra images meet extra texts.
        margins.diagonal()[: logits.num_pairs].neg_()
        same = logits.same_ids(0, margins.shape[0])
        if same is not None:
            same.diagonal()[: logits.num_pairs].fill_(False)
            margins.masked_fill_(same, torch.inf)
        return zero - F.logsigmoid(margins).sum() / divisor


def cyclic_terms(
    image_features: Tensor,
    text_features: Tensor,
    weights: Any,
    with_cross: bool,
    as_terms: bool,
) -> list[Tensor]:
    """The weighted penalties, as in `eager.cyclic_terms`. Features: (N, D)."""
    dtype = accumulation_dtype(image_features.dtype)
    with without_autocast(image_features):
        image, text = image_features.to(dtype), text_features.to(dtype)
        w_matrix = (image + text) @ (image - text).T
        if not with_cross:
            # The backward of a product takes less time than that of `square`. Use both weights, so
            # that torch.compile treats both as inputs.
            return [(w_matrix * w_matrix).sum() * ((weights[0] + weights[1]) / 2)]
        inmodal = (w_matrix + w_matrix.T).square().sum() * (weights[0] / 4)
        crossmodal = (w_matrix - w_matrix.T).square().sum() * (weights[1] / 4)
        return [inmodal, crossmodal] if as_terms else [inmodal + crossmodal]
