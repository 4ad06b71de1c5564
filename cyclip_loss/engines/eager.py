"""The engine in PyTorch, with bounded memory: for CPU, MPS, CUDA without Triton, and float64.

Everything is computed in strips: blocks of rows against all columns. Products accumulate in float32
(float64 for float64 features). 16-bit features are widened first, so their products are exact. For
the contrastive term, CUDA multiplies 16-bit features as they are, with a float32 result. That is
many times faster and equally exact, except that G is rounded to 16 bits.

I, T are the row features (n, D) and the column features (m, D) of `Logits`.

A change to a kernel begins here, because this file defines what the functions compute. Then comes
the file of the function's name in `kernels/`. A new constexpr needs a step that launches it in
`variants` of `benchmarks/gate/compile.py`.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from cyclip_loss import numerics
from cyclip_loss.logits import (
    BlockLse,
    Gradients,
    Logits,
    SavedStatistics,
    SharedExponentials,
)
from cyclip_loss.numerics import accumulation_dtype, float16_shift, rows_per_strip

# A CPU computes symmetric matrices in blocks of this many rows. With D = 512 that saves a quarter
# of the time on one thread, and a tenth on two. With 64 rows, products are too small for two.
GRAM_ROWS = 128


def _columns_to_multiply(logits: Logits) -> Tensor:
    """The column features in the dtype in which they are multiplied."""
    features = logits.column_features
    if numerics.has_wide_products(features):
        return features
    return features.to(logits.logit_scale.dtype)


def _buffer(logits: Logits) -> Tensor:
    """Uninitialised memory for one strip of logits."""
    m = len(logits.column_features)
    height = min(len(logits.row_features), rows_per_strip(m, logits.row_features.device))
    return logits.logit_scale.new_empty(height, m)


def _logit_strips(
    logits: Logits,
    column_features: Tensor,
    kept: Tensor | None = None,
    is_computed: bool = False,
) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """For each strip: its first row, its end, its row features and its logits.

    column_features: the result of `_columns_to_multiply`, to whose dtype the row features are cast.
    kept: memory for all logits; None or empty: each strip overwrites the one before. is_computed:
    whether all logits, or what took their place, are there already.
    """
    memory = _buffer(logits) if kept is None or kept.numel() == 0 else kept
    dtype = logits.logit_scale.dtype
    options = {} if column_features.dtype == dtype else {"out_dtype": dtype}
    # Scale the rows, n * D products. Not off the CPU: in tf32 s * I would be rounded, and 16-bit I
    # is not.
    scales_rows = column_features.dtype == dtype and column_features.is_cpu
    n, m = len(logits.row_features), len(column_features)
    height = rows_per_strip(m, column_features.device)
    for start in range(0, n, height):
        stop = min(start + height, n)
        strip = memory[start:stop] if len(memory) == n else memory[: stop - start]
        strip_features = logits.row_features[start:stop].to(column_features.dtype)
        if scales_rows and not is_computed:
            torch.mm(strip_features * logits.logit_scale, column_features.T, out=strip)
        elif not is_computed:
            torch.mm(strip_features, column_features.T, out=strip, **options)
            strip.mul_(logits.logit_scale)
        yield start, stop, strip_features, strip


def _pairs(strip: Tensor, start: int, logits: Logits) -> tuple[Tensor, slice]:
    """The pairs of a strip that begins with row `start`, as a view, and their rows."""
    offset = start + logits.partner_offset
    diagonal = strip.diagonal(offset)  # empty beyond the last column
    first = start + max(0, -offset)
    return diagonal, slice(first, first + len(diagonal))


def contrastive_lse(logits: Logits, exponentials: SharedExponentials | None = None) -> BlockLse:
    """Log-sum-exps of the negatives of each row and column, and the pairs' logits, in one sweep.

    With `exponentials`, which are filled for backward, one exponential of each logit serves both.
    With E_ij = exp(l_ij - m_i), rows have the sum of E_ij, and columns that of w_i E_ij, where
    w_i = exp(m_i - max m). Each w_i E_ij may lose 3 * tiny, the smallest normal number, where a
    factor or the product underflows: a column 3 n * tiny. In a sum of 4 n * tiny / eps or more,
    that is less than its rounding. If a sum is smaller (e^-61 for n = 4,096 in float32, where the
    largest exponential is 1), columns are computed with their own exponentials, and all of
    `exponentials.row_max` is set to NaN.
    """
    column_features = _columns_to_multiply(logits)
    n, m = len(logits.row_features), len(column_features)
    zeros, limits = logits.logit_scale.new_zeros, torch.finfo(logits.logit_scale.dtype)
    pair_logits, row_lse, column_sum = zeros(n), zeros(n), zeros(m * logits.symmetric)
    # Maxima are kept finite, also of rows without negatives, as -inf - (-inf) would be NaN.
    column_max = torch.full_like(column_sum, limits.min)
    kept = None if exponentials is None else exponentials.values
    for start, stop, _, strip in _logit_strips(logits, column_features, kept):
        strip_pair_logits, paired_rows = _pairs(strip, start, logits)
        # NaN instead of an infinite logit, which would look perfectly matched.
        pair_logits[paired_rows] = strip_pair_logits + (strip_pair_logits - strip_pair_logits)
        strip_pair_logits.fill_(-torch.inf)
        same = logits.same_ids(start, stop)
        if same is not None:
            strip.masked_fill_(same, -torch.inf)
        row_max = strip.amax(dim=1).clamp_(min=limits.min)
        if exponentials is None:
            exps = (strip - row_max[:, None]).exp_()
        else:
            exps = strip.sub_(row_max[:, None]).exp_()
            exponentials.row_max[start:stop] = row_max
        row_lse[start:stop] = exps.sum(dim=1).log_().add_(row_max)
        if logits.symmetric:
            largest = strip.amax(dim=0) if exponentials is None else row_max.max()
            new_max = torch.maximum(column_max, largest)
            column_sum.mul_(column_max.sub_(new_max).exp_())
            if exponentials is None:
                column_sum.add_(strip.sub_(new_max).exp_().sum(dim=0))
            else:
                column_sum.addmv_(exps.T, row_max.sub(new_max[0]).exp_())
            column_max = new_max
    smallest = 4 * n * limits.tiny / limits.eps
    # Written with `not`, so that NaN counts as too small.
    if exponentials is not None and logits.symmetric and not column_sum.min() >= smallest:
        exponentials.row_max.fill_(torch.nan)
        return contrastive_lse(logits)
    column_lse = column_sum.log_().add_(column_max)
    return BlockLse(torch.cat((row_lse, column_lse)), pair_logits)


def contrastive_grads(
    logits: Logits,
    saved: SavedStatistics,
    needs: list[bool],
    float32_grads: bool,
    exponentials: SharedExponentials | None = None,
) -> Gradients:
    """Gradients of a contrastive term, whose logits have the gradient w G.

    With w = `upstream_scale`, r = `row_log_divisor` and c = `column_log_divisor`, G_ij is
    pair_gradient_i / w if column j is row i's partner, 0 if it has row i's id, and otherwise

        G_ij = exp(l_ij - r_i) + exp(l_ij - c_j)
        dI = w s G T,   dT = w s G^T I,   ds = w sum_ij G_ij (I_i . T_j)

    Without `symmetric` the columns' terms are left out.

    needs: which of the three are needed. dI and dT have the features' dtype or, with
    `float32_grads`, the accumulation dtype (for sums across ranks). exponentials: from
    `contrastive_lse` of these logits; they are not changed.
    """
    column_features = _columns_to_multiply(logits)
    features = logits.row_features
    grad_dtype = logits.logit_scale.dtype if float32_grads else features.dtype
    products = _Products(logits, column_features, saved.upstream_scale, needs, grad_dtype)
    pair_gradient = saved.pair_gradient / saved.upstream_scale
    row_divisor, column_divisor = saved.row_log_divisor[:, None], saved.column_log_divisor
    if exponentials is not None:
        row_max = exponentials.row_max[:, None]
        top = row_max.max()
        limit = math.log(torch.finfo(top.dtype).max) - 1
        # exp(t - c_j), below, must be finite, with a factor of e for rounding. False if it is NaN,
        # because the exponentials are not shared after all.
        if logits.symmetric and not top - column_divisor.min() < limit:
            exponentials = None
    is_kept, buffer, kept = False, _buffer(logits), None
    if exponentials is not None:
        # exp(l_ij - r_i) + exp(l_ij - c_j) = E_ij (exp(m_i - r_i) + exp(m_i - t) exp(t - c_j))
        row_weights, top_weights = (row_max - row_divisor).exp_(), (row_max - top).exp_()
        column_weights = (top - column_divisor).exp_()
        kept = exponentials.values
        is_kept = kept.numel() > 0
    for start, stop, strip_features, strip in _logit_strips(logits, column_features, kept, is_kept):
        gradient = buffer[: stop - start]
        if exponentials is None:
            torch.sub(strip, row_divisor[start:stop], out=gradient).exp_()
            if logits.symmetric:
                gradient.add_(strip.sub_(column_divisor).exp_())
        else:
            exps = strip if is_kept else strip.sub_(row_max[start:stop]).exp_()
            if logits.symmetric:
                torch.mul(top_weights[start:stop], column_weights, out=gradient)
                gradient.add_(row_weights[start:stop]).mul_(exps)
            else:
                torch.mul(exps, row_weights[start:stop], out=gradient)
        same = logits.same_ids(start, stop)
        if same is not None:
            gradient.masked_fill_(same, 0.0)
        pair_elements, paired_rows = _pairs(gradient, start, logits)
        pair_elements.copy_(pair_gradient[paired_rows])
        products.add(start, stop, strip_features, gradient)
    return products.gradients()


class _Products:
    """w s G T, w s G^T I and w sum_ij G_ij (I_i . T_j), from strips of G.

    column_features: the result of `_columns_to_multiply`; weight: w, a scalar;
    grad_dtype: of the first two.
    """

    def __init__(
        self,
        logits: Logits,
        column_features: Tensor,
        weight: Tensor,
        needs: list[bool],
        grad_dtype: torch.dtype,
    ) -> None:
        self.column_features, self.needs, self.grad_dtype = column_features, needs, grad_dtype
        self.shift = float16_shift(column_features)
        self.factor = weight * 2.0**-self.shift
        self.feature_factor = self.factor * logits.logit_scale
        rows, new = logits.row_features, logits.logit_scale.new_zeros
        self.row_grad = rows.new_empty(rows.shape if needs[0] else (0,), dtype=grad_dtype)
        self.column_grad = new(column_features.shape if needs[1] else (0,))
        self.scale_sum = new(())

    def add(self, start: int, stop: int, strip_features: Tensor, gradient: Tensor) -> None:
        """Add the products of rows `start` to `stop` of G, which is overwritten."""
        needs_rows, needs_columns, needs_scale = self.needs
        columns, dtype = self.column_features, gradient.dtype
        if columns.dtype != dtype:
            gradient = gradient.mul_(2.0**self.shift).to(columns.dtype)
        # sum_ij G_ij (I_i . T_j) = sum_i I_i . (G T)_i = sum_j T_j . (G^T I)_j. From a feature
        # gradient that is computed anyway, it takes n * D multiplications.
        if needs_rows or not needs_columns:
            strip_grad = numerics.matmul(gradient, columns, dtype)
            if needs_scale:
                self.scale_sum += torch.dot(
                    strip_features.to(dtype).reshape(-1), strip_grad.view(-1)
                )
            if needs_rows:
                self.row_grad[start:stop] = strip_grad.mul_(self.feature_factor)
        if needs_columns:
            numerics.add_product(self.column_grad, gradient.T, strip_features)

    def gradients(self) -> Gradients:
        """The three sums over all strips, empty where not needed."""
        needs_rows, needs_columns, needs_scale = self.needs
        if needs_scale and needs_columns and not needs_rows:
            columns = self.column_features.to(self.scale_sum.dtype)
            self.scale_sum += torch.dot(columns.reshape(-1), self.column_grad.view(-1))
        column_grad = self.column_grad.mul_(self.feature_factor).to(self.grad_dtype)
        scale_grad = self.scale_sum.new_empty(0)
        if needs_scale:
            scale_grad = self.scale_sum.mul_(self.factor)
        return Gradients(self.row_grad, column_grad, scale_grad)


def same_ids_but_pairs(logits: Logits, start: int, stop: int) -> Tensor | None:
    """As `Logits.same_ids`, but False for the pairs."""
    same = logits.same_ids(start, stop)
    if same is not None:
        _pairs(same, start, logits)[0].fill_(False)
    return same


# Elementwise losses by name: f(x), and f'(x), which takes `out`. Both must be 0 at -inf, and f' at
# most 2, so that 2^14 f' fits float16 (`float16_shift`).
ELEMENTWISE: dict[str, tuple[Any, Any]] = {"sigmoid": (numerics.softplus, torch.sigmoid)}


def elementwise_terms(
    logits: Logits, logit_bias: Tensor, function: str, weight: float, needs: list[bool]
) -> tuple[Tensor, Gradients]:
    """The sums of an elementwise loss and of G over a block, (2,), and gradients times `weight`.

    With l_ij = s * I_i . T_j + b, and y_ij = 1 for a pair, else -1 (SigLIP's, Zhai et al. 2023,
    sec. 3.2, has f(x) = log(1 + exp(x))):

        loss = sum_ij f(-y_ij l_ij)        G_ij = -y_ij f'(-y_ij l_ij)
        dI = w s G T,   dT = w s G^T I,   ds = w sum_ij G_ij (I_i . T_j)

    Other elements with the same id are left out or, with `positives`, have y = 1.

    logit_bias: scalar; function: a name in `ELEMENTWISE`; needs: which gradients are needed, of
    rows, columns and scale. If none is, G is not computed, and its sum is 0. The gradients are in
    the accumulation dtype.
    """
    value, derivative = ELEMENTWISE[function]
    column_features, scale = _columns_to_multiply(logits), logits.logit_scale
    factor = scale.new_full((), weight)
    products = _Products(logits, column_features, factor, needs, scale.dtype)
    sums = scale.new_zeros(2)
    loss, g_sum = sums
    buffer = _buffer(logits)
    for start, stop, strip_features, strip in _logit_strips(logits, column_features):
        strip.add_(logit_bias)
        pairs = _pairs(strip, start, logits)[0]
        pairs.add_(pairs - pairs)  # NaN for an infinite logit, which may have no loss
        same = same_ids_but_pairs(logits, start, stop)
        if same is not None and not logits.positives:
            strip.masked_fill_(same, -torch.inf)
            same = None
        _negate_positives(strip, start, logits, same)
        loss.add_(value(strip).sum())
        if any(needs):
            gradient = derivative(strip, out=buffer[: stop - start])
            _negate_positives(gradient, start, logits, same)
            g_sum.add_(gradient.sum())
            products.add(start, stop, strip_features, gradient)
    return sums, products.gradients()


def _negate_positives(x: Tensor, start: int, logits: Logits, others: Tensor | None) -> None:
    """Negate the pairs of a strip, in place, and the other positives."""
    _pairs(x, start, logits)[0].neg_()
    if others is not None:
        torch.where(others, -x, x, out=x)


def _u_and_v_strips(
    image_features: Tensor, text_features: Tensor, means: Tensor | None
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """For each strip: its rows, and U = I + T and V = I - T in the accumulation dtype.

    With `means`, those of U and V are subtracted.
    """
    (n, d), dtype = image_features.shape, accumulation_dtype(image_features.dtype)
    height = rows_per_strip(2 * d, image_features.device)
    for start in range(0, n, height):
        rows = slice(start, start + height)
        image, text = image_features[rows].to(dtype), text_features[rows].to(dtype)
        u, v = image + text, image - text
        if means is not None:
            u -= means[0] + means[1]
            v -= means[0] - means[1]
        yield rows, u, v


def gram_matrices(
    image_features: Tensor, text_features: Tensor, means: Tensor | None, with_cross: bool
) -> Tensor:
    """The Gram matrices A = U^T U, B = V^T V and, if `with_cross`, C = V^T U: (2 or 3, D, D).

    U = I + T and V = I - T are formed in the accumulation dtype, before anything is rounded. V is
    small for well-aligned pairs, and would be lost in a difference of rounded numbers.

    means: (2, D), what is subtracted from the images and from the texts, in the accumulation dtype;
    None: nothing. The sum is subtracted from U, and the difference from V, which loses fewer digits
    than to subtract them from I and T.
    """
    d, dtype = image_features.shape[1], accumulation_dtype(image_features.dtype)
    grams = image_features.new_zeros(3 if with_cross else 2, d, d, dtype=dtype)
    # A and B are symmetric: each block of rows is computed from the diagonal on, then mirrored.
    height = GRAM_ROWS if image_features.is_cpu else d
    blocks = [slice(start, start + height) for start in range(0, d, height)]
    for _, u, v in _u_and_v_strips(image_features, text_features, means):
        for gram, x in ((grams[0], u), (grams[1], v)):
            for rows in blocks:
                gram[rows, rows.start :].addmm_(x[:, rows].T, x[:, rows.start :])
        if with_cross:
            grams[2].addmm_(v.T, u)
    for rows in blocks:
        grams[:2, rows.stop :, rows] = grams[:2, rows, rows.stop :].mT
    return grams


def cyclic_grads(
    image_features: Tensor, text_features: Tensor, means: Tensor | None, gram_grads: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """Gradients of the features, given those of the Gram matrices, dA, dB and, with C, dC.

        dU = U (dA + dA^T) + V dC        dI = dU + dV
        dV = V (dB + dB^T) + U dC^T      dT = dU - dV

    means: as in `gram_matrices`. gram_grads: (D, D) each, contiguous. Returns dI and dT, (n, D), in
    the features' dtype.
    """
    a_grad, b_grad, *c_grad = gram_grads
    a_grad, b_grad = a_grad + a_grad.T, b_grad + b_grad.T
    # With equal weights C has no share. (On a GPU the host would wait to see that.)
    with_cross = c_grad and (not c_grad[0].is_cpu or c_grad[0].any())
    # Both, also if only one is needed: they have all products in common.
    image_grad, text_grad = (x.new_empty(x.shape) for x in (image_features, text_features))
    for rows, u, v in _u_and_v_strips(image_features, text_features, means):
        u_grad, v_grad = u @ a_grad, v @ b_grad
        if with_cross:
            u_grad.addmm_(v, c_grad[0])
            v_grad.addmm_(u, c_grad[0].T)
        torch.add(u_grad, v_grad, out=image_grad[rows])
        torch.sub(u_grad, v_grad, out=text_grad[rows])
    return image_grad, text_grad
