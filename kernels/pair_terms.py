"""The loss, complete log-sum-exps and G of the pairs, from the log-sum-exps of the negatives.

With the pairs' logits l_ii, and a_i, b_i the log-sum-exps of the negatives of row and column i:

    loss = weight * sum_i softplus(a_i - l_ii) + softplus(b_i - l_ii)
    r_i = logaddexp(a_i, l_ii)        c_j = logaddexp(b_j, l_jj)
    pair_gradient_i = -sigmoid(a_i - l_ii) - sigmoid(b_i - l_ii)

One program adds up the loss, in a fixed order. The others compute the vectors.
"""

import triton
import triton.language as tl
from torch import Tensor

from cyclip_loss.kernels.configs import PAIR_TERMS
from cyclip_loss.kernels.tiles import ceil_div, log1p_exp, sigmoid, softplus
from cyclip_loss.logits import PairTerms
from cyclip_loss.numerics import on_device_of


@triton.jit
def _margin(negatives_lse, pair_logits, index, pair_index, mask):
    """a - l, l and a. An infinite l would look perfectly matched; inf - inf makes a - l NaN."""
    negative = tl.load(negatives_lse + index, mask=mask, other=0.0)
    pair = tl.load(pair_logits + pair_index, mask=mask, other=0.0)
    return (negative - pair) + (pair - pair), pair, negative


@triton.jit
def _logaddexp(a, b):
    # Two equal infinities have no difference. A column without a partner has the pair logit -inf.
    difference = tl.where(a == b, 0.0, a - b)
    return tl.where(difference > 0.0, a, b) + log1p_exp(difference)


@triton.jit(
    do_not_specialize=["n", "m", "partner_offset"],
    do_not_specialize_on_alignment=[
        "row_negatives_lse", "column_negatives_lse", "pair_logits", "column_pair_logits",
        "row_lse", "column_lse", "pair_gradient",
    ],
)  # fmt: skip
def pair_terms_kernel(
    row_negatives_lse,  # (n,)
    column_negatives_lse,  # (m,)
    pair_logits,  # (n,)
    column_pair_logits,  # (m,)
    loss,  # scalar out
    row_lse,  # (n,) out
    column_lse,  # (m,) out
    pair_gradient,  # (n,) out
    n,
    m,  # 0 if columns have no log-sum-exps
    partner_offset,  # row i is paired with column i + partner_offset
    weight,  # of the sum
    SYMMETRIC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    if tl.program_id(0) == 0:
        total = tl.zeros((BLOCK,), dtype=tl.float32)
        for start in range(0, n, BLOCK):
            rows = start + tl.arange(0, BLOCK)
            mask = rows < n
            margin, _, _ = _margin(row_negatives_lse, pair_logits, rows, rows, mask)
            total += tl.where(mask, softplus(margin), 0.0)
            if SYMMETRIC:
                margin, _, _ = _margin(
                    column_negatives_lse, pair_logits, rows + partner_offset, rows, mask
                )
                total += tl.where(mask, softplus(margin), 0.0)
        tl.store(loss, tl.sum(total, axis=0) * weight)
    else:
        index = (tl.program_id(0) - 1) * BLOCK + tl.arange(0, BLOCK)
        mask = index < n
        margin, pair, negative = _margin(row_negatives_lse, pair_logits, index, index, mask)
        lse = tl.where(margin > 0.0, negative, pair) + log1p_exp(margin)
        tl.store(row_lse + index, lse, mask=mask)
        gradient = -sigmoid(margin)
        if SYMMETRIC:
            margin, _, _ = _margin(
                column_negatives_lse, pair_logits, index + partner_offset, index, mask
            )
            gradient -= sigmoid(margin)
            _, pair, negative = _margin(
                column_negatives_lse, column_pair_logits, index, index, index < m
            )
            tl.store(column_lse + index, _logaddexp(negative, pair), mask=index < m)
        tl.store(pair_gradient + index, gradient, mask=mask)


def pair_terms(
    row_negatives_lse: Tensor,
    column_negatives_lse: Tensor,
    pair_logits: Tensor,
    column_pair_logits: Tensor,
    partner_offset: int,
    weight: float,
) -> PairTerms:
    """As `eager.pair_terms`."""
    n, m = row_negatives_lse.shape[0], column_negatives_lse.shape[0]
    loss = row_negatives_lse.new_empty(())
    row_lse, pair_gradient = row_negatives_lse.new_empty(n), row_negatives_lse.new_empty(n)
    column_lse = row_negatives_lse.new_empty(m)
    with on_device_of(row_negatives_lse):
        programs = 1 + ceil_div(max(n, m), PAIR_TERMS.tile["BLOCK"])
        pair_terms_kernel[(programs,)](
            row_negatives_lse, column_negatives_lse, pair_logits,
            column_pair_logits, loss, row_lse, column_lse, pair_gradient, n, m, partner_offset,
            float(weight), SYMMETRIC=m > 0, **PAIR_TERMS.kwargs,
        )  # fmt: skip
    return PairTerms(loss, row_lse, column_lse, pair_gradient)
