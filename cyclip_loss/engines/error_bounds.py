"""By how much rounding may move each element of an engine's results: the bounds of its check.

One function per function of an engine, with the same name. It takes how numbers are rounded, the
exact results and the arguments, all in float64, and returns a bound for each tensor of the results.
The bounds hold for features of random directions that products keep exactly, so a logit is rounded
only where its products are summed.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from cyclip_loss.engines import eager
from cyclip_loss.logits import BlockLse, Gradients, Logits, SavedStatistics
from cyclip_loss.numerics import float32_is_exact


class Rounding(NamedTuple):
    """The largest relative errors of rounding."""

    number: float  # of G, before its product with the features, and of a gradient
    product: float  # of U or V with each other or with gradients of Gram matrices


def rounding(dtype: torch.dtype) -> Rounding:
    """How an engine rounds, for features of this dtype and the setting of float32 products."""
    if dtype == torch.float32:
        unit = 2.0**-23 if float32_is_exact() else 2.0**-10  # PyTorch may truncate G to tf32
        return Rounding(unit, unit)
    # Both factors are rounded to the nearest tf32.
    return Rounding(torch.finfo(dtype).eps / 2, 2.0**-10)


def _of_sums(count: int) -> float:
    """Of a sum in float32, relative to the sum of absolute values: 2^-24 for each number.

    16 more are for what surrounds it: a scale, a bias, an exponential, a logarithm.
    """
    return (count + 16) * 2.0**-24


def _of_logits(logits: Logits, bias: Any = 0.0) -> Tensor:
    """Of a logit and of a log-sum-exp; relative, of an exponential and of sums of exponentials.

    A logit is s times a sum of D products. A log-sum-exp moves by at most as much as the logits,
    and an exponential by this factor.
    """
    rows, columns, scale = logits[:3]
    size: Tensor = scale * (rows.abs() @ columns.abs().T).max() + abs(bias)
    return size * _of_sums(rows.shape[1]) + _of_sums(len(rows) + len(columns))


def _of_rows(x: Tensor, of_factors: float | Tensor, of_results: float | Tensor) -> Tensor:
    """Of x = G T or another product with random vectors, from relative errors of G and of x.

    Elements of G T_j have either sign, so their squares add: the mean square of x_i is that of
    sum_j G_ij T_j, and errors of G move x_i by as large a part of it as G. Rounding to nearest errs
    by 0.4 of its largest error: three times the largest are seven standard deviations. What
    truncation or a sum does to all G is the same part of x as of G.
    """
    return 3 * of_factors * x.square().mean(dim=-1, keepdim=True).sqrt() + of_results * x.abs()


def contrastive_lse(_: Rounding, results: BlockLse, logits: Logits) -> list[Tensor]:
    """The error of a logit."""
    return [_of_logits(logits).expand_as(x) for x in results]


def contrastive_grads(
    given: Rounding, results: Gradients, logits: Logits, saved: SavedStatistics, *_: Any
) -> list[Tensor]:
    """G is off by as much as an exponential of a logit."""
    rows = eager.contrastive_grads(logits, saved, [True, False, False], True).rows
    return _of_gradients(given, results, rows, logits, _of_logits(logits))


def elementwise_terms(
    given: Rounding,
    results: tuple[Tensor, Gradients],
    logits: Logits,
    bias: Tensor,
    function: str,
    weight: float,
    *_: Any,
) -> list[Tensor]:
    """If x is off by e, f is off by e f' and f' by e f'', where f'' <= f' <= f; so are their sums.

    The sums themselves are off by as much again.
    """
    error = _of_logits(logits, bias)
    rows = eager.elementwise_terms(logits, bias, function, weight, [True, False, False])[1].rows
    of_sums = (2 * error * results[0][0]).expand(2)
    return [of_sums, *_of_gradients(given, results[1], rows, logits, error)]


def _of_gradients(
    given: Rounding, results: Gradients, rows: Tensor, logits: Logits, error: Tensor
) -> list[Tensor]:
    """Of dI = s G T, dT = s G^T I and ds = sum_i I_i . dI_i / s.

    rows: dI. error: of a logit and, relative, of G, which is also rounded for dI and dT.
    """
    unit = given.number + error
    of_scale = error * rows.norm(dim=1).sum() / logits.logit_scale
    return [
        _of_rows(results.rows, unit, unit) if results.rows.numel() else results.rows,
        _of_rows(results.columns, unit, unit) if results.columns.numel() else results.columns,
        of_scale.expand_as(results.scale),
    ]


def gram_matrices(given: Rounding, results: Tensor, features: Tensor, *_: Any) -> list[Tensor]:
    """sum_n |X_ni Y_nj| is at most |X_i| |Y_j|; the squares of these lengths are A_ii and B_ii."""
    u, v = (x.diagonal().sqrt() for x in results[:2])
    sizes = torch.stack((u.outer(u), v.outer(v), v.outer(u)))[: len(results)]
    return [(given.product + _of_sums(len(features))) * sizes]


def cyclic_grads(
    given: Rounding, results: tuple[Tensor, Tensor], features: Tensor, *_: Any
) -> list[Tensor]:
    """dI and dT are sums of up to four products, of D each, and then rounded."""
    error = given.product + _of_sums(4 * features.shape[1])
    return [_of_rows(x, error, error + given.number) for x in results]
