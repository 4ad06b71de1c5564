"""How far rounding may carry a result from the exact one.

    |actual - exact| <= 2 * (largest error of the eager engine, PyTorch in the same dtype)
                        + 4 * (eps * scale, element by element)

The scale of an element is the sum of the absolute values of the terms that it is a sum of, so that
an element which is small because its terms are small is held to relative precision. Which eps goes
with which rounding:

    logits     products and log-sum-exps: float32's, or tf32's where float32 features are multiplied
               so; a logit's error is a relative one of its exponential
    stored     G as it is kept for the products with the features: the features' eps, or tf32's
    penalties  products of U and V: tf32's, but for float32 features multiplied exactly
    result     one rounding to the result's own dtype
"""

from dataclasses import dataclass

import torch
from torch import Tensor

EAGER_FACTOR, EPS_FACTOR = 2.0, 4.0
TF32 = 2.0**-10
FLOAT32 = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Eps:
    """Relative precision of each kind of rounding."""

    logits: float
    stored: float
    penalties: float

    @staticmethod
    def of(dtype: torch.dtype, tf32: bool) -> "Eps":
        """For features of a dtype."""
        if dtype == torch.float32:
            eps = TF32 if tf32 else FLOAT32
            return Eps(eps, eps, eps)
        return Eps(FLOAT32, torch.finfo(dtype).eps, TF32)


def contrastive_bounds(
    image: Tensor,
    text: Tensor,
    scale: float,
    weight: float,
    row_lse: Tensor,
    column_lse: Tensor | None,
    pair_gradient: Tensor,
    first_column: int,
    eps: Eps,
) -> dict[str, Tensor]:
    """eps * scale of dI, dT, ds, a log-sum-exp and the loss, for float64 features (n, D), (m, D).

    row_lse, column_lse, pair_gradient: as `cyclip_loss.eager.contrastive_grads` takes them.
    """
    logits = scale * image @ text.T
    cosines = image.abs() @ text.abs().T
    columns = torch.arange(len(text), device=image.device)
    rows = torch.arange(len(image), device=image.device)
    is_pair = columns == rows[:, None] + first_column
    gradient = (logits - row_lse[:, None]).exp()
    if column_lse is not None:
        gradient += (logits - column_lse).exp()
    gradient = torch.where(is_pair, pair_gradient.abs()[:, None], gradient)
    largest = 1 + torch.tensor(float(max(logits.shape))).log() + abs(scale) * cosines.max()
    # A logit's error is a relative one of its exponential, and so of every element of G: that of a
    # pair is minus the sum of its row's others.
    of_logits = eps.logits * largest * gradient
    errors = of_logits + eps.stored * gradient
    return {
        "lse": eps.logits * largest,
        # Of a pair's r_i - l_ii, which is log(1 + exp(a_i - l_ii)): as relative as its gradient.
        "value": weight * eps.logits * largest * pair_gradient.abs().sum(),
        "image": weight * abs(scale) * errors @ text.abs(),
        "text": weight * abs(scale) * errors.T @ image.abs(),
        "logit_scale": weight * (of_logits * cosines).sum(),
    }


def cyclic_bounds(
    image: Tensor, text: Tensor, total: float, difference: float, eps: Eps
) -> dict[str, Tensor]:
    """eps * scale of the penalties and their gradients, (a + b) and |a - b| given."""
    u, v = (image + text).abs(), (image - text).abs()
    w = u @ v.T
    grad = total * (w @ v + w.T @ u) + difference * (w.T @ v + w @ u)
    return {
        "value": eps.penalties * total * w.square().sum(),
        "image": eps.penalties * grad,
        "text": eps.penalties * grad,
    }


def excess(actual: Tensor, exact: Tensor, eager: Tensor, bound: Tensor) -> tuple[float, float]:
    """The largest error, and the largest quotient of error and bound: above 1 is wrong.

    NaN where a NaN or an infinity is not expected counts as wrong, too.
    """
    if actual.shape != exact.shape:
        raise AssertionError(f"shape {tuple(actual.shape)}, not {tuple(exact.shape)}")
    if actual.numel() == 0:
        return 0.0, 0.0
    exact = exact.double()
    error, eager_error = (actual.double() - exact).abs(), (eager.double() - exact).abs().max()
    rounding = torch.finfo(actual.dtype)
    scale = bound + rounding.eps * exact.abs() + rounding.tiny
    allowed = EPS_FACTOR * (scale + 1e-3 * FLOAT32 * scale.max()) + EAGER_FACTOR * eager_error
    quotient = (error / allowed).max().item()
    return error.max().item(), quotient if quotient == quotient else float("inf")
