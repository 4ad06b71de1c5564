"""By how much rounding may move each element of an engine's results: the bounds of its check.

One function per function of an engine, with the same name. It takes the exact results and the
arguments, all in float64, and returns a bound for each tensor of the results. The bounds hold for
features that the engine's products keep exactly, and for random numbers of either sign. So a logit
is rounded only where its products are summed.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cyclip_loss.engines import eager
from cyclip_loss.logits import BlockLse, Gradients, Logits, SavedStatistics
from cyclip_loss.numerics import float32_is_exact


class Rounding(NamedTuple):
    """The largest relative errors of a rounded number and of a product of two."""

    number: float  # of G, before its product with the features, and of a gradient
    product: float  # of U and V with each other, and with gradients of Gram matrices


def rounding(dtype: torch.dtype) -> Rounding:
    """How an engine rounds with features of this dtype, and the settings of float32 products."""
    if dtype == torch.float32:
        unit = 2.0**-23 if float32_is_exact() else 2.0**-10  # tf32 drops all but 11 bits
        return Rounding(unit, unit)
    # U and V are multiplied in tf32, each of them rounded to the nearest number.
    return Rounding(torch.finfo(dtype).eps / 2, 2.0**-10)


def _of_sums(count: int) -> float:
    """Of a sum of so many numbers in float32, relative to the sum of their absolute values.

    Tensor cores add at least 4 products at a time, and then drop what is below half of the last
    bit: at most count / 4 * 2^-24. The other 48 * 2^-26 are for what surrounds a sum: a scale, a
    bias, an exponential or a logarithm.
    """
    return (count + 48) * 2.0**-26


def _of_products(a: Tensor, b: Tensor, unit: float) -> Tensor:
    """Of a b, with an error of each product of at most `unit`, relative, and sums in float32.

    The errors of products have either sign, so their squares add. Three times the root is seven
    standard deviations, and also what 9 products are off if all are off by the most.
    """
    return 3 * unit * (a.square() @ b.square()).sqrt() + _of_sums(len(b)) * (a.abs() @ b.abs())


def _of_logits(logits: Logits, bias: float | Tensor = 0.0) -> Tensor:
    """Of a logit, and of a log-sum-exp; relative, of an exponential and of sums of n + m of them.

    A logit is a sum of D products in float32: s * sum_d |I_d T_d| times the error of a sum. A
    log-sum-exp moves by at most as much as the logits, and an exponential by a factor of about 1 +
    this.
    """
    rows, columns, scale = logits[:3]
    size = scale.abs() * (rows.abs() @ columns.abs().T).max() + abs(bias)
    return size * _of_sums(rows.shape[1]) + _of_sums(len(rows) + len(columns))


def contrastive_lse(_: Rounding, results: BlockLse, logits: Logits) -> list[Tensor]:
    """The error of a logit."""
    return [_of_logits(logits).expand_as(x) for x in results]


def contrastive_grads(
    given: Rounding, results: Gradients, logits: Logits, saved: SavedStatistics, *_: Any
) -> list[Tensor]:
    """G has the relative error of an exponential of a logit."""
    only_rows = [True, False, False]
    wide = eager.contrastive_grads(_with_unit_matrix(logits), saved, only_rows, True)
    return _of_gradients(given, results, logits, wide.rows, _of_logits(logits))


def elementwise_terms(
    given: Rounding,
    results: tuple[Tensor, Gradients],
    logits: Logits,
    bias: Tensor,
    function: str,
    weight: float,
    *_: Any,
) -> list[Tensor]:
    """If a logit is off by e, f is off by at most e f', and f' by e f'."""
    (loss, _), grads = results
    only_rows = [True, False, False]
    wide = eager.elementwise_terms(_with_unit_matrix(logits), bias, function, weight, only_rows)[1]
    error = _of_logits(logits, bias)
    of_g_sum = error * wide.rows[:, logits.row_features.shape[1] :].abs().sum()
    of_g_sum = of_g_sum / abs(weight * logits.logit_scale)
    of_sums = torch.stack((of_g_sum + error * loss, of_g_sum))
    return [of_sums, *_of_gradients(given, grads, logits, wide.rows, error)]


def _with_unit_matrix(logits: Logits) -> Logits:
    """The same logits of longer features, for which G T = (G T, G) shows G.

    Beside the column features is a unit matrix, beside the row features are zeros.
    """
    columns = logits.column_features
    unit_matrix = torch.eye(len(columns), dtype=columns.dtype, device=columns.device)
    return logits._replace(
        row_features=F.pad(logits.row_features, (0, len(columns))),
        column_features=torch.cat((columns, unit_matrix), dim=1),
    )


def _of_gradients(
    given: Rounding, results: Gradients, logits: Logits, wide: Tensor, error: Tensor
) -> list[Tensor]:
    """Of dI = G T, dT = G^T I and ds = sum_ij G_ij l_ij / s^2, where G has all factors.

    wide: (G T, G); error: of a logit and, relative, of G. dI and dT also have G's rounding before
    the product and their own. In tf32, G may be truncated, which makes a gradient that much
    smaller.
    """
    rows, columns, scale = logits[:3]
    g = wide[:, rows.shape[1] :]
    of_scale = error * (g.abs() * ((scale * rows @ columns.T).abs() + 1)).sum() / scale.square()
    errors = [
        _of_products(a, b, given.number) + error * (a.abs() @ b.abs()) + given.number * x.abs()
        if x.numel()
        else x
        for x, a, b in ((results.rows, g, columns), (results.columns, g.T, rows))
    ]
    return [*errors, of_scale if results.scale.numel() else results.scale]


def gram_matrices(given: Rounding, results: Tensor, features: Tensor, *_: Any) -> list[Tensor]:
    """sum_n |X_ni Y_nj| is at most |X_i| |Y_j|; the squares of these lengths are A_ii and B_ii."""
    u, v = (x.diagonal().sqrt() for x in results[:2])
    sizes = torch.stack((u.outer(u), v.outer(v), v.outer(u)))[: len(results)]
    return [(given.product + _of_sums(len(features))) * sizes]


def cyclic_grads(
    given: Rounding,
    results: tuple[Tensor, Tensor],
    image_features: Tensor,
    text_features: Tensor,
    gram_grads: list[Tensor],
    *_: Any,
) -> list[Tensor]:
    """dI and dT are the sum and the difference of two to four products, and rounded."""
    u, v = image_features + text_features, image_features - text_features
    a, b, *c = gram_grads
    factors = [a + a.T, b + b.T, *c, *(x.T for x in c)]
    products = torch.cat((u, v, v, u)[: len(factors)], dim=1), torch.cat(factors)
    error = _of_products(*products, given.product)
    return [error + given.number * x.abs() for x in results]
