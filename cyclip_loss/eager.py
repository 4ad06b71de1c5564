"""The engine in PyTorch, with bounded memory: for CPU, MPS and CUDA without Triton.

Everything is computed in strips: blocks of rows against all columns. Products accumulate in float32
(float64 for float64 features). 16-bit features are widened first, so their products are exact. For
the contrastive term, CUDA multiplies 16-bit features as they are, with a float32 result. That is
many times as fast and as exact, except that G is rounded to 16 bits.

I, T are the rows (n, D) and the columns (m, D) of `Logits`, as image and text features are.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cyclip_loss import numerics
from cyclip_loss.numerics import Logits, Lse, accumulation_dtype, strip_rows


def _multiply(image: Tensor, text_t: Tensor, logit_scale: Tensor, out: Tensor) -> None:
    """Write s * I T^T of a strip of image rows to `out`."""
    if image.dtype != out.dtype:
        torch.mm(image, text_t, out_dtype=out.dtype, out=out).mul_(logit_scale)
    elif out.device.type == "cpu":
        # Scale the smaller factor: n * D multiplications instead of n * m.
        torch.mm(image * logit_scale, text_t, out=out)
    else:
        # Scale the product: it may be in tf32, which holds 16-bit features exactly, but not s * I.
        torch.mm(image, text_t, out=out).mul_(logit_scale)


def _strips(rows: int, height: int) -> list[tuple[int, int]]:
    return [(start, min(start + height, rows)) for start in range(0, rows, max(height, 1))]


def _pairs(strip: Tensor, start: int, logits: Logits) -> tuple[Tensor, slice]:
    """The pairs of a strip that begins with row `start`, as a view, and their rows."""
    offset = logits.first_column + start
    low = start + max(0, -offset)
    pairs = strip.diagonal(offset)[: max(0, logits.pairs - low)]
    return pairs, slice(low, low + len(pairs))


def contrastive_lse(logits: Logits) -> tuple[Tensor, Tensor, Tensor]:
    """Log-sum-exps of the negatives of each row and column, and the pairs' logits, in one sweep.

    Returns row_negatives (n,), column_negatives (m,), empty unless `symmetric`, and pair_logits
    (n,), in the accumulation dtype. Without negatives the log-sum-exp is -inf. A row without a
    partner has pair logit 0.
    """
    features, columns, logit_scale, *_ = logits
    n, m = len(features), len(columns)
    dtype = accumulation_dtype(features.dtype)
    factor_dtype = features.dtype if numerics.has_wide_products(features) else dtype
    columns_t = columns.to(factor_dtype).T
    height = min(n, strip_rows(m, features.device))
    logits_buffer = columns_t.new_empty(height, m, dtype=dtype)
    exp_buffer = torch.empty_like(logits_buffer)
    row_negatives = columns_t.new_empty(n, dtype=dtype)
    pair_logits = columns_t.new_zeros(n, dtype=dtype)
    # Maxima are kept finite, also of rows without negatives, as -inf - (-inf) would be NaN.
    lowest = torch.finfo(dtype).min
    column_max = columns_t.new_full((m if logits.symmetric else 0,), lowest, dtype=dtype)
    column_sum = torch.zeros_like(column_max)
    for start, stop in _strips(n, height):
        strip, exps = logits_buffer[: stop - start], exp_buffer[: stop - start]
        _multiply(features[start:stop].to(factor_dtype), columns_t, logit_scale, strip)
        pairs, rows = _pairs(strip, start, logits)
        pair_logits[rows] = pairs
        pairs.fill_(-torch.inf)
        same = logits.same_ids(start, stop)
        if same is not None:
            strip.masked_fill_(same, -torch.inf)
        row_max = strip.amax(dim=1, keepdim=True).clamp_(min=lowest)
        torch.sub(strip, row_max, out=exps).exp_()
        row_negatives[start:stop] = exps.sum(dim=1).log_().add_(row_max[:, 0])
        if logits.symmetric:
            new_max = torch.maximum(column_max, strip.amax(dim=0))
            column_sum.mul_(column_max.sub_(new_max).exp_())
            column_sum.add_(strip.sub_(new_max).exp_().sum(dim=0))
            column_max = new_max
    return row_negatives, column_sum.log_().add_(column_max), pair_logits


def pair_terms(
    row_negatives: Tensor,
    column_negatives: Tensor,
    pair_logits: Tensor,
    column_pair_logits: Tensor,
    first_column: int,
    weight: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss, complete log-sum-exps, and G of the pairs, from the negatives and the pair logits.

    row_negatives, pair_logits: (n,); column_negatives, column_pair_logits: (m,), of all columns.
    Row i is paired with column `first_column + i`. Empty column_negatives: only rows count.

    Returns weight * the sum, over rows and their paired columns, of log-sum-exp - pair logit;
    row_lse (n,) and column_lse (m,), log-sum-exps with the pairs; and pair_gradient (n,), the sum
    of exp(pair logit - log-sum-exp) - 1 for row and column. The formulas are in `contrastive.py`.
    """
    negatives = row_negatives[None]
    column_lse = column_negatives
    if column_negatives.shape[0] > 0:
        own_columns = column_negatives[first_column : first_column + len(row_negatives)]
        negatives = torch.stack((row_negatives, own_columns))
        column_lse = torch.logaddexp(column_negatives, column_pair_logits)
    gap = negatives - pair_logits
    # An infinite pair logit would give a finite loss; inf - inf makes it NaN.
    gap = gap + (pair_logits - pair_logits)
    # Above 40, log(1 + exp(x)) rounds to x in float64.
    loss = F.softplus(gap, threshold=40.0).sum() * weight
    row_lse = torch.logaddexp(row_negatives, pair_logits)
    # An infinite feature may give an infinite loss, which becomes NaN too.
    return loss + (loss - loss), row_lse, column_lse, -gap.sigmoid().sum(dim=0)


def contrastive_grads(
    logits: Logits, lse: Lse, grad: Tensor, weight: float, needs: list[bool], wide: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of w * (sum_i r_i + sum_j c_j - 2 * sum_i l_ii) with w = grad * weight.

    r = `lse.rows` and c = `lse.columns` are log-sum-exps of all logits of a row or column, those of
    other ranks included. With G_ij = pair_gradient_i if column j is row i's partner, 0 if it has
    the same id, else

        G_ij = exp(l_ij - r_i) + exp(l_ij - c_j)
        dI = w * s * G T,   dT = w * s * G^T I,   ds = w * sum_ij G_ij (I_i . T_j)

    Without `symmetric` the columns' terms are left out.

    grad: scalar of the accumulation dtype; needs: which of the three are needed. Returns dI (n, D)
    and dT (m, D) in the features' dtype or, if `wide`, in the accumulation dtype (for sums across
    ranks), empty where not needed; and ds, a scalar, arbitrary if not needed.
    """
    needs_image, needs_text, needs_scale = needs
    features, columns, logit_scale, *_ = logits
    n, m = len(features), len(columns)
    dtype = accumulation_dtype(features.dtype)
    factor_dtype = features.dtype if numerics.has_wide_products(features) else dtype
    text = columns.to(factor_dtype)
    height = min(n, strip_rows(m, features.device))
    logits_buffer = text.new_empty(height, m, dtype=dtype)
    gradient_buffer = torch.empty_like(logits_buffer)
    # float16 keeps 11 bits only above 6e-5, and most of G is smaller. So 2^14 * G is multiplied,
    # whose largest possible element, 2^15, still fits.
    shift = 14 if factor_dtype == torch.float16 else 0
    weighted_grad = grad * (weight * 2.0**-shift)
    feature_weight = weighted_grad * logit_scale
    scale_sum = lse.rows.new_zeros(())
    grad_dtype = dtype if wide else features.dtype
    image_grad = features.new_empty(features.shape if needs_image else (0,), dtype=grad_dtype)
    text_grad = text.new_zeros(text.shape if needs_text else (0,), dtype=dtype)
    for start, stop in _strips(n, height):
        strip, gradient = logits_buffer[: stop - start], gradient_buffer[: stop - start]
        image = features[start:stop].to(factor_dtype)
        _multiply(image, text.T, logit_scale, strip)
        torch.sub(strip, lse.rows[start:stop, None], out=gradient).exp_()
        if logits.symmetric:
            gradient.add_(strip.sub_(lse.columns).exp_())
        same = logits.same_ids(start, stop)
        if same is not None:
            gradient.masked_fill_(same, 0.0)
        pairs, rows = _pairs(gradient, start, logits)
        pairs.copy_(lse.pair_gradient[rows])
        if factor_dtype != dtype:
            gradient = gradient.mul_(2.0**shift).to(factor_dtype)
        # sum_ij G_ij (I_i . T_j) = sum_i I_i . (G T)_i = sum_j T_j . (G^T I)_j. From a feature
        # gradient that is computed anyway, it takes n * D multiplications.
        if needs_image or not needs_text:
            row_gradient = numerics.matmul(gradient, text, dtype)
            if needs_scale:
                scale_sum += torch.dot(image.to(dtype).reshape(-1), row_gradient.view(-1))
            if needs_image:
                image_grad[start:stop] = row_gradient.mul_(feature_weight)
        if needs_text:
            numerics.add_product(text_grad, gradient.T, image)
    if needs_scale and needs_text and not needs_image:
        scale_sum += torch.dot(text.to(dtype).reshape(-1), text_grad.view(-1))
    text_grad = text_grad.mul_(feature_weight).to(grad_dtype)
    return image_grad, text_grad, scale_sum.mul_(weighted_grad)


def cyclic_statistics(image_features: Tensor, text_features: Tensor, with_cross: bool) -> Tensor:
    """The Gram matrices A = U^T U, B = V^T V and, if `with_cross`, C = V^T U: (2 or 3, D, D).

    U = I + T and V = I - T are formed in the accumulation dtype, before anything is rounded. V is
    small for well-aligned pairs, and would be lost in a difference of rounded numbers.
    """
    dtype = accumulation_dtype(image_features.dtype)
    n, d = image_features.shape
    grams = torch.zeros(3 if with_cross else 2, d, d, dtype=dtype, device=image_features.device)
    for start, stop in _strips(n, strip_rows(d, image_features.device)):
        image, text = image_features[start:stop].to(dtype), text_features[start:stop].to(dtype)
        u, v = image + text, image - text
        grams[0].addmm_(u.T, u)
        grams[1].addmm_(v.T, v)
        if with_cross:
            grams[2].addmm_(v.T, u)
    return grams


def cyclic_terms(grams: Tensor, weights: list[Tensor], separate: bool) -> list[Tensor]:
    """The weighted penalties from `cyclic_statistics` of all rows of the global batch.

        p = <A, B>_F,  q = <C, C^T>_F,  N * P_in = (p + q) / 2,  N * P_cross = (p - q) / 2

    weights: of N * P_in and of N * P_cross, scalars on the features' device or on the CPU. Without
    C they are equal, and the sum does not need q. Returns both if `separate`, else [their sum].
    """
    p = (grams[0] * grams[1]).sum()
    q = (grams[2] * grams[2].T).sum() if len(grams) == 3 else None
    return weighted_penalties(p, q, weights, separate)


def weighted_penalties(
    p: Tensor, q: Tensor | None, weights: Sequence[Any], separate: bool
) -> list[Tensor]:
    """`cyclic_terms` from p and q. weights: tensors or numbers."""
    if q is None:
        # Use both weights, so that torch.compile treats both as inputs.
        terms = [p * ((weights[0] + weights[1]) / 2)]
    else:
        # Both are sums of squares. Rounding must not make them negative; `clamp` keeps NaN.
        inmodal = (p + q).clamp_(min=0) * (weights[0] / 2)
        crossmodal = (p - q).clamp_(min=0) * (weights[1] / 2)
        terms = [inmodal, crossmodal] if separate else [inmodal + crossmodal]
    # An infinite feature may give an infinite penalty; inf - inf makes it NaN.
    return [term + (term - term) for term in terms]


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
    # If separate terms were added up, a = b may hold; on a CPU the comparison costs nothing.
    with_cross = len(grams) == 3 and (difference.device.type != "cpu" or difference != 0)
    weighted = grams[:2] * total
    cross = grams[2] * difference if with_cross else None
    image_grad = image_features.new_empty(image_features.shape if needs_image else (0,))
    text_grad = text_features.new_empty(text_features.shape if needs_text else (0,))
    for start, stop in _strips(n, strip_rows(d, image_features.device)):
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
