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

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cyclip_loss import numerics
from cyclip_loss.logits import (
    Gradients,
    Logits,
    LogSumExps,
    SavedStatistics,
)
from cyclip_loss.numerics import accumulation_dtype, float16_shift, rows_per_strip, strips


def _columns_to_multiply(logits: Logits) -> Tensor:
    """The column features in the dtype in which they are multiplied."""
    features = logits.row_features
    if numerics.has_wide_products(features):
        return logits.column_features
    return logits.column_features.to(accumulation_dtype(features.dtype))


def _logit_strips(
    logits: Logits, column_features: Tensor
) -> Iterator[tuple[int, int, Tensor, Tensor, Tensor]]:
    """For each strip: its first row, its end, its row features, its logits, and a buffer like them.

    The next strip overwrites the logits and the buffer, and the caller may. column_features: the
    result of `_columns_to_multiply`, to whose dtype the row features are cast.
    """
    dtype = accumulation_dtype(column_features.dtype)
    options = {} if column_features.dtype == dtype else {"out_dtype": dtype}
    # Scaling the smaller factor takes n * D multiplications instead of n * m. But off the CPU the
    # product may be in tf32, which holds 16-bit features exactly, but not s * I.
    scales_rows = column_features.dtype == dtype and column_features.is_cpu
    n, m = len(logits.row_features), len(column_features)
    height = min(n, rows_per_strip(m, column_features.device))
    buffers = [column_features.new_empty(height, m, dtype=dtype) for _ in range(2)]
    for start, stop in strips(n, height):
        strip, buffer = (x[: stop - start] for x in buffers)
        strip_features = logits.row_features[start:stop].to(column_features.dtype)
        if scales_rows:
            torch.mm(strip_features * logits.logit_scale, column_features.T, out=strip)
        else:
            torch.mm(strip_features, column_features.T, out=strip, **options)
            strip.mul_(logits.logit_scale)
        yield start, stop, strip_features, strip, buffer


def _pairs(strip: Tensor, start: int, logits: Logits) -> tuple[Tensor, slice]:
    """The pairs of a strip that begins with row `start`, as a view, and their rows."""
    rows, columns = logits.block(start, start + len(strip)).pairs
    diagonal = strip.diagonal(columns.start - rows.start)[: rows.stop - rows.start]
    return diagonal, slice(start + rows.start, start + rows.stop)


def contrastive_lse(logits: Logits) -> LogSumExps:
    """Log-sum-exps of the negatives of each row and column, and the pairs' logits, in one sweep."""
    column_features = _columns_to_multiply(logits)
    n, m = len(logits.row_features), len(column_features)
    dtype = accumulation_dtype(column_features.dtype)
    row_negatives_lse = column_features.new_empty(n, dtype=dtype)
    pair_logits = column_features.new_zeros(n, dtype=dtype)
    # Maxima are kept finite, also of rows without negatives, as -inf - (-inf) would be NaN.
    lowest = torch.finfo(dtype).min
    column_max = column_features.new_full((m if logits.symmetric else 0,), lowest, dtype=dtype)
    column_sum = torch.zeros_like(column_max)
    for start, stop, _, strip, exps in _logit_strips(logits, column_features):
        strip_pair_logits, paired_rows = _pairs(strip, start, logits)
        # NaN instead of an infinite logit, which would look perfectly matched.
        pair_logits[paired_rows] = strip_pair_logits + (strip_pair_logits - strip_pair_logits)
        strip_pair_logits.fill_(-torch.inf)
        same = logits.same_ids(start, stop)
        if same is not None:
            strip.masked_fill_(same, -torch.inf)
        row_max = strip.amax(dim=1, keepdim=True).clamp_(min=lowest)
        torch.sub(strip, row_max, out=exps).exp_()
        row_negatives_lse[start:stop] = exps.sum(dim=1).log_().add_(row_max[:, 0])
        if logits.symmetric:
            new_max = torch.maximum(column_max, strip.amax(dim=0))
            column_sum.mul_(column_max.sub_(new_max).exp_())
            column_sum.add_(strip.sub_(new_max).exp_().sum(dim=0))
            column_max = new_max
    column_negatives_lse = column_sum.log_().add_(column_max)
    return LogSumExps(torch.cat((row_negatives_lse, column_negatives_lse)), pair_logits)


def softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)). Above 40 it rounds to x in float64."""
    return F.softplus(x, threshold=40.0)


def contrastive_grads(
    logits: Logits,
    saved: SavedStatistics,
    needs: list[bool],
    float32_grads: bool,
) -> Gradients:
    """Gradients of a contrastive term, whose logits have the gradient `unit` * G.

    With r = `row_lse` and c = `column_lse`, G_ij is pair_gradient_i / unit if column j is row i's
    partner, 0 if it has row i's id, and otherwise

        G_ij = exp(l_ij - r_i) + exp(l_ij - c_j)
        dI = unit * s * G T,   dT = unit * s * G^T I,   ds = unit * sum_ij G_ij (I_i . T_j)

    Without `symmetric` the columns' terms are left out.

    needs: which of the three are needed. dI and dT have the features' dtype or, with
    `float32_grads`, the accumulation dtype (for sums across ranks).
    """
    column_features = _columns_to_multiply(logits)
    shift = float16_shift(column_features)
    dtype = accumulation_dtype(column_features.dtype)
    strips_of_g = _contrastive_strips(logits, saved, column_features)
    grad_dtype = dtype if float32_grads else logits.row_features.dtype
    factor = saved.unit * 2.0**-shift
    return _multiplied(strips_of_g, logits, column_features, factor, needs, grad_dtype)


def _contrastive_strips(
    logits: Logits, saved: SavedStatistics, column_features: Tensor
) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """For each strip: its first row, its end, its row features, and G."""
    pair_gradient = saved.pair_gradient / saved.unit
    for start, stop, strip_features, strip, gradient in _logit_strips(logits, column_features):
        torch.sub(strip, saved.row_lse[start:stop, None], out=gradient).exp_()
        if logits.symmetric:
            gradient.add_(strip.sub_(saved.column_lse).exp_())
        same = logits.same_ids(start, stop)
        if same is not None:
            gradient.masked_fill_(same, 0.0)
        pair_elements, paired_rows = _pairs(gradient, start, logits)
        pair_elements.copy_(pair_gradient[paired_rows])
        yield start, stop, strip_features, gradient


def _multiplied(
    strips_of_g: Iterator[tuple[int, int, Tensor, Tensor]],
    logits: Logits,
    column_features: Tensor,
    factor: Tensor,
    needs: list[bool],
    grad_dtype: torch.dtype,
) -> Gradients:
    """factor * s * 2^shift * G T, the same with G^T I, and factor * 2^shift * sum G_ij (I_i . T_j).

    column_features: the result of `_columns_to_multiply`; grad_dtype: of the first two.
    """
    needs_rows, needs_columns, needs_scale = needs
    row_features, dtype = logits.row_features, accumulation_dtype(column_features.dtype)
    feature_factor = factor * logits.logit_scale
    scale_sum = logits.logit_scale.new_zeros(())
    row_grad = row_features.new_empty(row_features.shape if needs_rows else (0,), dtype=grad_dtype)
    column_shape = column_features.shape if needs_columns else (0,)
    column_grad = column_features.new_zeros(column_shape, dtype=dtype)
    for start, stop, strip_features, gradient in strips_of_g:
        if column_features.dtype != dtype:
            shifted = gradient.mul_(2.0 ** float16_shift(column_features))
            gradient = shifted.to(column_features.dtype)
        # sum_ij G_ij (I_i . T_j) = sum_i I_i . (G T)_i = sum_j T_j . (G^T I)_j. From a feature
        # gradient that is computed anyway, it takes n * D multiplications.
        if needs_rows or not needs_columns:
            strip_grad = numerics.matmul(gradient, column_features, dtype)
            if needs_scale:
                scale_sum += torch.dot(strip_features.to(dtype).reshape(-1), strip_grad.view(-1))
            if needs_rows:
                row_grad[start:stop] = strip_grad.mul_(feature_factor)
        if needs_columns:
            numerics.add_product(column_grad, gradient.T, strip_features)
    if needs_scale and needs_columns and not needs_rows:
        scale_sum += torch.dot(column_features.to(dtype).reshape(-1), column_grad.view(-1))
    column_grad = column_grad.mul_(feature_factor).to(grad_dtype)
    scale_grad = scale_sum.mul_(factor) if needs_scale else scale_sum.new_empty(0)
    return Gradients(row_grad, column_grad, scale_grad)


def same_ids_but_pairs(logits: Logits, start: int, stop: int) -> Tensor | None:
    """As `Logits.same_ids`, but False for the pairs."""
    same = logits.same_ids(start, stop)
    if same is not None:
        _pairs(same, start, logits)[0].fill_(False)
    return same


# Losses of single logits, by name: f(x), and its derivative, which takes `out`. Both are 0 at -inf,
# and no derivative is above 2, so that it fits float16 (`float16_shift`).
ELEMENTWISE: dict[str, tuple[Any, Any]] = {"sigmoid": (softplus, torch.sigmoid)}


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
    column_features = _columns_to_multiply(logits)
    sums = logits.logit_scale.new_zeros(2)
    loss, g_sum = sums

    def negate_positives(x: Tensor, start: int, is_positive: Tensor | None) -> None:
        _pairs(x, start, logits)[0].neg_()
        if is_positive is not None:
            torch.where(is_positive, -x, x, out=x)

    def strips_of_g() -> Iterator[tuple[int, int, Tensor, Tensor]]:
        for start, stop, strip_features, strip, gradient in _logit_strips(logits, column_features):
            strip.add_(logit_bias)
            pairs = _pairs(strip, start, logits)[0]
            pairs.add_(pairs - pairs)  # NaN for an infinite logit, which may have no loss
            same = same_ids_but_pairs(logits, start, stop)
            is_positive = same if logits.positives else None
            if same is not None and not logits.positives:
                strip.masked_fill_(same, -torch.inf)
            negate_positives(strip, start, is_positive)
            loss.add_(value(strip).sum())
            if any(needs):
                negate_positives(derivative(strip, out=gradient), start, is_positive)
                g_sum.add_(gradient.sum())
                yield start, stop, strip_features, gradient

    factor = logits.logit_scale.new_full((), weight * 2.0 ** -float16_shift(column_features))
    grads = _multiplied(
        strips_of_g(), logits, column_features, factor, needs, logits.logit_scale.dtype
    )
    return sums, grads


def gram_matrices(image_features: Tensor, text_features: Tensor, with_cross: bool) -> Tensor:
    """The Gram matrices A = U^T U, B = V^T V and, if `with_cross`, C = V^T U: (2 or 3, D, D).

    U = I + T and V = I - T are formed in the accumulation dtype, before anything is rounded. V is
    small for well-aligned pairs, and would be lost in a difference of rounded numbers.
    """
    dtype = accumulation_dtype(image_features.dtype)
    n, d = image_features.shape
    grams = torch.zeros(3 if with_cross else 2, d, d, dtype=dtype, device=image_features.device)
    for start, stop in strips(n, rows_per_strip(d, image_features.device)):
        image, text = image_features[start:stop].to(dtype), text_features[start:stop].to(dtype)
        u, v = image + text, image - text
        grams[0].addmm_(u.T, u)
        grams[1].addmm_(v.T, v)
        if with_cross:
            grams[2].addmm_(v.T, u)
    return grams


def cyclic_terms(grams: Tensor, weights: list[Tensor], output_dict: bool) -> list[Tensor]:
    """Both weighted penalties if `output_dict`, else [their sum] (Goel et al. 2022, eq. 2 and 3).

        p = <A, B>_F,  q = <C, C^T>_F,  N * P_in = (p + q) / 2,  N * P_cross = (p - q) / 2

    grams: from `gram_matrices`, of all rows of the global batch; weights: of N * P_in and of
    N * P_cross, scalar tensors on the device of the Gram matrices or on the CPU. Without C, the
    weights are equal, and only the sum is wanted.
    """
    p = (grams[0] * grams[1]).sum()
    if len(grams) == 2:
        # Use both weights, so that torch.compile treats both as inputs.
        return [p * ((weights[0] + weights[1]) / 2)]
    q = (grams[2] * grams[2].T).sum()
    # Both are sums of squares. Rounding must not make them negative; `clamp` keeps NaN.
    inmodal = (p + q).clamp_(min=0) * (weights[0] / 2)
    crossmodal = (p - q).clamp_(min=0) * (weights[1] / 2)
    return [inmodal, crossmodal] if output_dict else [inmodal + crossmodal]


def cyclic_grads(
    image_features: Tensor,
    text_features: Tensor,
    grams: Tensor,
    grads: list[Tensor],
    weights: list[Tensor],
    size: int,
    needs: list[bool],
) -> tuple[Tensor, Tensor]:
    """Gradients of `size` * the terms of `cyclic_terms`, given the upstream gradients `grads`.

    With a = size * grads[0] * weights[0], b = size * grads[-1] * weights[1]:

        dU = (a+b) U B + (a-b) V C^T        dI = dU + dV
        dV = (a+b) V A + (a-b) U C          dT = dU - dV

    grams, weights: as in `cyclic_terms`; without C, a = b. Returns dI and dT, (n, D), in the
    features' dtype, empty where not needed.
    """
    needs_image, needs_text = needs
    dtype = accumulation_dtype(image_features.dtype)
    n, d = image_features.shape
    inmodal = grads[0] * (weights[0] * size)
    crossmodal = grads[-1] * (weights[1] * size)
    total, difference = inmodal + crossmodal, inmodal - crossmodal
    # If the terms were added up, a = b may hold; on a CPU the comparison costs nothing.
    with_cross = len(grams) == 3 and (difference.device.type != "cpu" or difference != 0)
    weighted = grams[:2] * total
    cross = grams[2] * difference if with_cross else None
    image_grad = image_features.new_empty(image_features.shape if needs_image else (0,))
    text_grad = text_features.new_empty(text_features.shape if needs_text else (0,))
    for start, stop in strips(n, rows_per_strip(d, image_features.device)):
        image, text = image_features[start:stop].to(dtype), text_features[start:stop].to(dtype)
        u, v = image + text, image - text
        u_grad, v_grad = u @ weighted[1], v @ weighted[0]
        if cross is not None:
            u_grad.addmm_(v, cross.T)
            v_grad.addmm_(u, cross)
        if needs_image:
            image_grad[start:stop] = u_grad + v_grad
        if needs_text:
            text_grad[start:stop] = u_grad.sub_(v_grad)
    return image_grad, text_grad
