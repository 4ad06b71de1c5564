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

from cyclip_loss.kernels.configs import PAIRS
from cyclip_loss.kernels.launch import ceil_div
from cyclip_loss.numerics import on_device_of


@triton.jit
def _gap(negatives, pair_logits, at, pairs_at, mask):
    """a - l, l and a. An infinite l could give a finite loss; inf - inf makes the gap NaN."""
    negative = tl.load(negatives + at, mask=mask, other=0.0)
    pair = tl.load(pair_logits + pairs_at, mask=mask, other=0.0)
    return (negative - pair) + (pair - pair), pair, negative


@triton.jit
def _log1p_exp(x):
    """log(1 + exp(-|x|)), accurate also if the exponential is much smaller than 1."""
    exp = tl.exp(-tl.abs(x))
    above_1 = 1.0 + exp
    # The quotient corrects the rounding of 1 + exp (the textbook log1p).
    return tl.where(above_1 == 1.0, exp, tl.log(above_1) * (exp / (above_1 - 1.0)))


@triton.jit
def _softplus(x):
    # Not `maximum`, which would lose a NaN.
    return tl.where(x > 0.0, x, 0.0) + _log1p_exp(x)


@triton.jit
def _sigmoid(x):
    exp = tl.exp(-tl.abs(x))
    return tl.where(x > 0.0, 1.0, exp) / (1.0 + exp)


@triton.jit(
    do_not_specialize=["n", "m", "first_column"],
    do_not_specialize_on_alignment=[
        "row_negatives", "column_negatives", "pair_logits", "column_pair_logits",
        "row_lse", "column_lse", "pair_gradient",
    ],
)  # fmt: skip
def pair_terms_kernel(
    row_negatives,  # (n,)
    column_negatives,  # (m,)
    pair_logits,  # (n,)
    column_pair_logits,  # (m,)
    loss,  # scalar out
    row_lse,  # (n,) out
    column_lse,  # (m,) out
    pair_gradient,  # (n,) out
    n,
    m,  # 0 if columns have no log-sum-exps
    first_column,  # row i is paired with column first_column + i
    weight,  # of the sum
    SYMMETRIC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    if tl.program_id(0) == 0:
        total = tl.zeros((BLOCK,), dtype=tl.float32)
        for start in range(0, n, BLOCK):
            rows = start + tl.arange(0, BLOCK)
            mask = rows < n
            gap, _, _ = _gap(row_negatives, pair_logits, rows, rows, mask)
            total += tl.where(mask, _softplus(gap), 0.0)
            if SYMMETRIC:
                gap, _, _ = _gap(column_negatives, pair_logits, rows + first_column, rows, mask)
                total += tl.where(mask, _softplus(gap), 0.0)
        value = tl.sum(total, axis=0) * weight
        # An infinite feature may give an infinite loss; inf - inf makes it NaN, and NaN stays.
        tl.store(loss, value + (value - value))
    else:
        at = (tl.program_id(0) - 1) * BLOCK + tl.arange(0, BLOCK)
        mask = at < n
        gap, pair, negative = _gap(row_negatives, pair_logits, at, at, mask)
        lse = tl.where(gap > 0.0, negative, pair) + _log1p_exp(gap)
        tl.store(row_lse + at, lse, mask=mask)
        of_pair = -_sigmoid(gap)
        if SYMMETRIC:
            gap, _, _ = _gap(column_negatives, pair_logits, at + first_column, at, mask)
            of_pair -= _sigmoid(gap)
            gap, pair, negative = _gap(column_negatives, column_pair_logits, at, at, at < m)
            lse = tl.where(gap > 0.0, negative, pair) + _log1p_exp(gap)
            tl.store(column_lse + at, lse, mask=at < m)
        tl.store(pair_gradient + at, of_pair, mask=mask)


def pair_terms(
    row_negatives: Tensor,
    column_negatives: Tensor,
    pair_logits: Tensor,
    column_pair_logits: Tensor,
    first_column: int,
    weight: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `cyclip_loss.eager.pair_terms`."""
    n, m = row_negatives.shape[0], column_negatives.shape[0]
    loss = row_negatives.new_empty(())
    row_lse, pair_gradient = row_negatives.new_empty(n), row_negatives.new_empty(n)
    column_lse = row_negatives.new_empty(m)
    with on_device_of(row_negatives):
        pair_terms_kernel[(1 + ceil_div(max(n, m), PAIRS.tile["BLOCK"]),)](
            row_negatives, column_negatives, pair_logits, column_pair_logits, loss, row_lse,
            column_lse, pair_gradient, n, m, first_column, float(weight), SYMMETRIC=m > 0,
            **PAIRS.kwargs,
        )  # fmt: skip
    return loss, row_lse, column_lse, pair_gradient
