"""The engine in PyTorch, with bounded memory: for CPU, MPS and CUDA without Triton.

Everything is computed strip by strip: a strip is a block of rows against all columns. Products
accumulate in float32 (float64 for float64 features); 16-bit features are widened first, so their
products are exact. Notation as in the formulas: I, T are `image_features` (n, D) and
`text_features` (m, D); s is `logit_scale`; l_ij = s * I_i . T_j.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# Elements of one strip. On CPU 2^22 float32 are 16 MB: strips of 512 rows at N = 8,192, tall enough
# for the full speed of the matrix products (256 rows or fewer cost up to a quarter more there).
# Other devices need more work in flight to be busy: 2^26 elements.
STRIP_ELEMENTS = {"cpu": 2**22}
STRIP_ELEMENTS_OTHER_DEVICES = 2**26
# Rows below which a matrix product is no longer efficient, however wide the strip.
MIN_STRIP_ROWS = 64


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums, log-sum-exps and losses for features of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def strip_rows(columns: int, device: torch.device) -> int:
    """How many rows of `columns` elements one strip holds."""
    elements = STRIP_ELEMENTS.get(device.type, STRIP_ELEMENTS_OTHER_DEVICES)
    return max(MIN_STRIP_ROWS, elements // columns)


def _strips(rows: int, height: int) -> list[tuple[int, int]]:
    return [(start, min(start + height, rows)) for start in range(0, rows, max(height, 1))]


def _pairs_in_strip(start: int, stop: int, first_column: int, columns: int) -> tuple[int, int, int]:
    """The stretch of the diagonal that lies in rows start..stop.

    Row i is paired with column first_column + i, if there is one. Returns `Tensor.diagonal`'s
    offset within the strip, and the first and the end of the rows that have a partner.
    """
    low = max(start, -first_column)
    high = min(stop, columns - first_column)
    return first_column + start, low, max(low, high)


def contrastive_lse(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    first_column: int,
    symmetric: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-sum-exps of the negatives of each row and column, and the pairs' logits, in one sweep.

    image_features: (n, D); text_features: (m, D); logit_scale: scalar of the accumulation dtype.
    Row i is paired with column `first_column + i`; the negatives of a row or column are all its
    logits but its pair's.

    Returns row_negatives (n,), column_negatives (m,) and pair_logits (n,), in the accumulation
    dtype. Without `symmetric`, column_negatives is empty. Where there is no negative, its
    log-sum-exp is -inf; a row without a partner has pair logit 0.
    """
    n, m = len(image_features), len(text_features)
    dtype = accumulation_dtype(image_features.dtype)
    text_t = text_features.to(dtype).T
    height = min(n, strip_rows(m, image_features.device))
    logits_buffer = text_t.new_empty(height, m)
    exp_buffer = text_t.new_empty(height, m)
    row_negatives = text_t.new_empty(n)
    pair_logits = text_t.new_zeros(n)
    # Maxima are finite, so that -inf less one of them is -inf: of a row whose only logit is its
    # pair's, for example.
    lowest = torch.finfo(dtype).min
    column_max = text_t.new_full((m if symmetric else 0,), lowest)
    column_sum = torch.zeros_like(column_max)
    for start, stop in _strips(n, height):
        logits, exps = logits_buffer[: stop - start], exp_buffer[: stop - start]
        # The scale goes into the narrow factor: n * D multiplications instead of n * m.
        torch.mm(image_features[start:stop].to(dtype) * logit_scale, text_t, out=logits)
        offset, low, high = _pairs_in_strip(start, stop, first_column, m)
        if high > low:
            diagonal = logits.diagonal(offset)[: high - low]
            pair_logits[low:high] = diagonal
            diagonal.fill_(-torch.inf)
        row_max = logits.amax(dim=1, keepdim=True).clamp_(min=lowest)
        torch.sub(logits, row_max, out=exps).exp_()
        row_negatives[start:stop] = exps.sum(dim=1).log_().add_(row_max[:, 0])
        if symmetric:
            new_max = torch.maximum(column_max, logits.amax(dim=0))
            column_sum.mul_(column_max.sub_(new_max).exp_())
            column_sum.add_(logits.sub_(new_max).exp_().sum(dim=0))
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
    """What the pairs add to the log-sum-exps of their rows' and columns' negatives.

    row_negatives, pair_logits: (n,); column_negatives, column_pair_logits: (m,), of all columns, of
    which row i's own is `first_column + i`. No column_negatives: only the rows count.

    Returns a scalar, weight * the sum over rows, and over their own columns, of log-sum-exp less
    pair logit; row_lse (n,) and column_lse (m,), log-sum-exps with the pairs; and pair_gradient
    (n,), the sum of exp(pair logit - log-sum-exp) - 1 for row and column. The formulas, in which no
    difference of large numbers occurs, are in `contrastive.py`.
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
    # Beyond 40, log(1 + exp(x)) is x to the last digit of float64.
    loss = F.softplus(gap, threshold=40.0).sum() * weight
    row_lse = torch.logaddexp(row_negatives, pair_logits)
    # An infinite feature may leave an infinite loss; it becomes NaN too.
    return loss + (loss - loss), row_lse, column_lse, -gap.sigmoid().sum(dim=0)


def contrastive_grads(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    row_lse: Tensor,
    column_lse: Tensor,
    pair_gradient: Tensor,
    grad: Tensor,
    weight: float,
    first_column: int,
    symmetric: bool,
    needs: list[bool],
    wide: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of w * (sum_i row_lse_i + sum_j column_lse_j - 2 * sum_i pair_logits_i).

    row_lse, column_lse: log-sum-exps of all logits of a row or column, of all ranks', its pair's
    among them; w = grad * weight. With G_ij = pair_gradient_i if j is i's partner, else

        G_ij = exp(l_ij - row_lse_i) + exp(l_ij - column_lse_j)
        dI = w * s * G T,   dT = w * s * G^T I,   ds = w * sum_ij G_ij (I_i . T_j)

    Without `symmetric` the columns' terms are left out.

    pair_gradient: (n,), as `pair_terms` gives it; grad: scalar of the accumulation dtype; needs:
    which of the three are needed. Shapes as in `contrastive_lse`. Returns dI (n, D) and dT (m, D)
    in the features' dtype or, if `wide`, in the accumulation dtype (for sums over ranks), empty
    where not needed, and ds as a scalar, 0 if not needed.
    """
    needs_image, needs_text, needs_scale = needs
    n, m = len(image_features), len(text_features)
    dtype = accumulation_dtype(image_features.dtype)
    text = text_features.to(dtype)
    height = min(n, strip_rows(m, image_features.device))
    logits_buffer = text.new_empty(height, m)
    gradient_buffer = text.new_empty(height, m)
    weighted_grad = grad * weight
    feature_weight = weighted_grad * logit_scale
    scale_sum = text.new_zeros(())
    grad_dtype = dtype if wide else image_features.dtype
    image_shape = image_features.shape if needs_image else (0,)
    image_grad = image_features.new_empty(image_shape, dtype=grad_dtype)
    text_grad = text.new_zeros(text.shape if needs_text else (0,))
    for start, stop in _strips(n, height):
        logits, gradient = logits_buffer[: stop - start], gradient_buffer[: stop - start]
        image = image_features[start:stop].to(dtype)
        torch.mm(image * logit_scale, text.T, out=logits)
        torch.sub(logits, row_lse[start:stop, None], out=gradient).exp_()
        if symmetric:
            gradient.add_(logits.sub_(column_lse).exp_())
        offset, low, high = _pairs_in_strip(start, stop, first_column, m)
        if high > low:
            gradient.diagonal(offset)[: high - low] = pair_gradient[low:high]
        # sum_ij G_ij (I_i . T_j) is sum_i I_i . (G T)_i and sum_j T_j . (G^T I)_j: a feature
        # gradient that is there anyway gives it for n * D.
        if needs_image or not needs_text:
            row_gradient = torch.mm(gradient, text)
            if needs_scale:
                scale_sum += torch.dot(image.reshape(-1), row_gradient.view(-1))
            if needs_image:
                image_grad[start:stop] = row_gradient.mul_(feature_weight)
        if needs_text:
            text_grad.addmm_(gradient.T, image)
    if needs_scale and needs_text and not needs_image:
        scale_sum += torch.dot(text.reshape(-1), text_grad.view(-1))
    text_grad = text_grad.mul_(feature_weight).to(grad_dtype)
    return image_grad, text_grad, scale_sum.mul_(weighted_grad)


def cyclic_statistics(
    image_features: Tensor, text_features: Tensor, direct: bool, with_cross: bool
) -> Tensor:
    """What both cyclic penalties and their gradients are made of, with U = I + T, V = I - T.

    direct: W = U V^T, shape (N, N). Otherwise the Gram matrices A = U^T U, B = V^T V and, if
    `with_cross`, C = V^T U, stacked to shape (2 or 3, D, D).

    U and V are formed in the accumulation dtype from the features as they came: V is small for
    well-aligned pairs, and a difference of rounded numbers would lose it.
    """
    dtype = accumulation_dtype(image_features.dtype)
    n, d = image_features.shape
    if direct:
        image, text = image_features.to(dtype), text_features.to(dtype)
        return (image + text) @ (image - text).T
    grams = torch.zeros(3 if with_cross else 2, d, d, dtype=dtype, device=image_features.device)
    for start, stop in _strips(n, strip_rows(d, image_features.device)):
        image, text = image_features[start:stop].to(dtype), text_features[start:stop].to(dtype)
        u, v = image + text, image - text
        grams[0].addmm_(u.T, u)
        grams[1].addmm_(v.T, v)
        if with_cross:
            grams[2].addmm_(v.T, u)
    return grams


def cyclic_grads(
    image_features: Tensor,
    text_features: Tensor,
    statistics: Tensor,
    coefficients: Tensor,
    direct: bool,
    with_cross: bool,
    needs: list[bool],
) -> tuple[Tensor, Tensor]:
    """Gradients of a * (p + q)/2 + b * (p - q)/2, p = ||U V^T||^2 and q = <U V^T, V U^T>.

    That is N * (lambda_inmodal * P_in + lambda_crossmodal * P_cross) for a and b the lambdas:

        direct:  H = (a+b) W + (a-b) W^T;  dU = H V;                      dV = H^T U
        Gram:                              dU = (a+b) U B + (a-b) V C^T;  dV = (a+b) V A + (a-b) U C
        dI = dU + dV,  dT = dU - dV

    statistics: as `cyclic_statistics` returned it, summed over all rows of the global batch;
    coefficients: (2,), [a + b, a - b], in the accumulation dtype. Without `with_cross`, a = b is
    known and the second coefficient is not read.

    Returns dI and dT, (N, D) in the features' dtype, empty where `needs` says not needed.
    """
    needs_image, needs_text = needs
    dtype = accumulation_dtype(image_features.dtype)
    n, d = image_features.shape
    total, difference = coefficients[0], coefficients[1]
    # Terms asked for apart and then added come back with a = b; on CPU a look costs nothing.
    if with_cross and difference.device.type == "cpu" and difference == 0:
        with_cross = False
    if direct:
        both_ways = statistics * total
        if with_cross:
            both_ways.addcmul_(statistics.T, difference)
        height = n
    else:
        weighted = statistics[:2] * total
        cross = statistics[2] * difference if with_cross else None
        height = strip_rows(d, image_features.device)
    image_grad = image_features.new_empty(image_features.shape if needs_image else (0,))
    text_grad = text_features.new_empty(text_features.shape if needs_text else (0,))
    for start, stop in _strips(n, height):
        image, text = image_features[start:stop].to(dtype), text_features[start:stop].to(dtype)
        u, v = image + text, image - text
        if direct:
            u_grad, v_grad = both_ways @ v, both_ways.T @ u
        else:
            u_grad, v_grad = u @ weighted[1], v @ weighted[0]
            if cross is not None:
                u_grad.addmm_(v, cross.T)
                v_grad.addmm_(u, cross)
        if needs_image:
            image_grad[start:stop] = u_grad + v_grad
        if needs_text:
            text_grad[start:stop] = u_grad.sub_(v_grad)
    return image_grad, text_grad
