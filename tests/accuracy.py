"""Exact results in float64, and how far rounding alone may carry a result from them.

The bounds are forward error bounds, not tolerances found by trial. A sum of products computed in a
type of precision eps differs from the exact one by at most a small multiple of eps times the sum of
the products' *absolute values*: the scale of the quantity. The scale of each element of each
gradient is worked out here from the formulas of the loss, in float64, so that a bound is never
wider than what the arithmetic makes unavoidable: an element that is small because its terms are
small is checked to relative precision, and only one that is small because large terms cancel is
allowed their rounding.

The small multiple is FACTOR where errors are of either sign, as those of rounding to nearest are,
and mostly cancel (measured: at most 3.1 for sums of 100 terms, over 20,000 random inputs). Errors
of one sign add up: a tensor core multiplies 16-bit numbers exactly, but what it adds it cuts off.
It adds 8 products to the float32 sum at a time and cuts each one bit below the sum's last (A100),
or 16 and two bits below (H100), and then the new sum (Khattak and Mikaitis 2025, arXiv 2512.07004).
So a dot product of D terms of one sign loses up to D / 11 or D / 20 times eps times their sum, and
its multiple is D / 8 where that is more than FACTOR, from D = 48 on. (It also covers float32
features, whose D products are added one by one: their errors grow as the root of D.) Where operands
are rounded to 8 or 11 bits first, G, U and V by the kernels, that is the larger error.

Everything is computed on the CPU, whatever device the results come from.
"""

from dataclasses import dataclass
from functools import partial
from math import log

import torch
from inputs import Case, Device, loss_dtype
from torch import Tensor

from cyclip_loss import CyCLIPLoss, cyclip_loss, eager, reference

contrastive_loss = partial(cyclip_loss, lambda_inmodal=0, lambda_crossmodal=0)

FLOAT64 = torch.finfo(torch.float64).eps
FLOAT32 = torch.finfo(torch.float32).eps
TF32 = 2.0**-10

FACTOR = 6.0
# Products in a sum of which each costs a whole eps.
PRODUCTS_PER_EPS = 8


def growth(d: int, eps: float) -> float:
    """How many times FACTOR a sum of d products may be off by, in units of eps."""
    return max(1.0, d / PRODUCTS_PER_EPS / FACTOR) if eps <= FLOAT32 else 1.0


@dataclass
class Results:
    """A value and its gradients, or their scales."""

    value: Tensor
    image: Tensor
    text: Tensor
    logit_scale: Tensor

    def __add__(self, other: "Results") -> "Results":
        return Results(*(getattr(self, name) + getattr(other, name) for name in NAMES))

    def __mul__(self, factor: float) -> "Results":
        return Results(*(getattr(self, name) * factor for name in NAMES))

    def times_upstream(self, factor: float) -> "Results":
        """The same value, and gradients of `factor` times it."""
        return Results(self.value, *(getattr(self, name) * factor for name in NAMES[1:]))


NAMES = ("value", "image", "text", "logit_scale")


@dataclass(frozen=True)
class Eps:
    """Relative precision of each kind of rounding.

    logits: of products of features, and of log-sum-exps. A logit's error is a relative one of its
        exponential.
    stored: of G as it is kept for the products with the features.
    penalties: of products of U and V.
    """

    logits: float
    stored: float
    penalties: float


def eps_of(impl: str, dtype: torch.dtype, tf32: bool = False, wide_products: bool = False) -> Eps:
    """Precision in which an engine computes with features of `dtype`.

    The eager engine widens 16-bit features to float32, or with `wide_products` keeps G in 16 bits.
    The kernels multiply 16-bit features exactly and sum in float32, keep G in 16 bits, and round U
    and V to tf32. The dense formula rounds everything to 16 bits. tf32: float32 matrices are
    multiplied so.
    """
    if dtype in (torch.float16, torch.bfloat16) and impl not in ("eager", "reference"):
        return Eps(FLOAT32, torch.finfo(dtype).eps, TF32)
    eps = torch.finfo(dtype if impl == "reference" else loss_dtype(dtype)).eps
    if tf32 and dtype != torch.float64:
        eps = max(eps, TF32)
    stored = torch.finfo(dtype).eps if impl == "eager" and wide_products else eps
    return Eps(eps, max(eps, stored), eps)


def contrastive_bound(
    image: Tensor,
    text: Tensor,
    logit_scale: float,
    impl: str,
    symmetric: bool = True,
    tf32: bool = False,
) -> Results:
    """eps * scale of the contrastive term of features (n, D), (n, D) as given to the loss.

    A logit's rounding error, eps times `size` at most, is a *relative* error of its exponential,
    and so of every element of the gradient by the logits: that of a pair is minus the sum of the
    others in its row. The oracle subtracts there, probabilities from 1 and logits from their
    log-sum-exp; what that costs it in float64 is added. (For float64 features that is all of it.)
    """
    wide_products = impl == "eager" and eager.has_wide_products(image)
    eps = eps_of(impl, image.dtype, tf32, wide_products)
    image, text = exact_on_host(image), exact_on_host(text)
    n, d = image.shape
    logits = logit_scale * image @ text.T
    cosines = image.abs() @ text.abs().T
    # Errors of a log-sum-exp, of size log n + the largest logit, are common to a whole row.
    size = growth(d, eps.logits) * (1 + abs(logit_scale) * cosines.max()) + log(n)
    parts = [_gradient_sizes(logits.softmax(dim=1))]
    if symmetric:
        parts.append(_gradient_sizes(logits.softmax(dim=0).T).T)
    exact = sum(parts) / (len(parts) * n)
    of_logits = (eps.logits * exact + FLOAT64 / n * exact.new_ones(n).diag()) * size
    errors = of_logits + eps.stored * exact
    loss = reference.contrastive_loss if symmetric else reference.one_way_contrastive_loss
    value = (eps.logits * exact.trace() + FLOAT64) * size
    return Results(
        value + eps.logits * loss(image, text, logit_scale),
        abs(logit_scale) * errors @ text.abs(),
        abs(logit_scale) * errors.T @ image.abs(),
        # The kernels sum it up before G is rounded.
        ((errors if wide_products else of_logits) * cosines).sum(),
    )


def _gradient_sizes(probabilities: Tensor) -> Tensor:
    """|p - 1| for the pairs, which is the sum of the others in their row, and p for the others."""
    negatives = probabilities - probabilities.diag().diag()
    return negatives + negatives.sum(dim=1).diag()


def augmented_bound(
    image: Tensor, text: Tensor, logit_scale: float, views: tuple, impl: str
) -> Results:
    """eps * scale of the contrastive term with (fixed) augmented views, weighed as `reference`."""
    of_image = contrastive_bound(image, views[0], logit_scale, impl, symmetric=False)
    of_text = contrastive_bound(text, views[1], logit_scale, impl, symmetric=False)
    inmodal = Results(
        of_image.value + of_text.value,
        of_image.image,
        of_text.image,
        of_image.logit_scale + of_text.logit_scale,
    )
    return contrastive_bound(image, text, logit_scale, impl) * 0.5 + inmodal * 0.25


def cyclic_bound(
    image: Tensor,
    text: Tensor,
    inmodal: float,
    crossmodal: float,
    impl: str,
    tf32: bool = False,
) -> Results:
    """eps * scale of the weighted penalties of features (n, D), (n, D) as given to the loss.

    U and V are sums and differences of two given numbers, so each is exact but for its own last
    bit: where pairs are nearly aligned V is small, and so is every scale. The oracle subtracts
    products of I and T; what that costs it in float64 is added.
    """
    eps = eps_of(impl, image.dtype, tf32).penalties
    eps *= growth(image.shape[1], eps)
    image, text = exact_on_host(image), exact_on_host(text)
    own = _cyclic_scale((image + text).abs(), (image - text).abs(), inmodal, crossmodal)
    sizes = image.abs() + text.abs()
    return own * eps + _cyclic_scale(sizes, sizes, inmodal, crossmodal) * FLOAT64


def _cyclic_scale(u: Tensor, v: Tensor, inmodal: float, crossmodal: float) -> Results:
    n = len(u)
    w = u @ v.T
    total, difference = (inmodal + crossmodal) / n, abs(inmodal - crossmodal) / n
    grad = total * (w @ v + w.T @ u) + difference * (w.T @ v + w @ u)
    return Results(total * w.square().sum(), grad, grad, grad.new_zeros(()))


def exact_contrastive(image: Tensor, text: Tensor, logit_scale: float) -> Results:
    """The contrastive term's value and gradients, by the definition, in float64."""
    return _exact(image, text, logit_scale, reference.contrastive_loss)


def exact_augmented(image: Tensor, text: Tensor, logit_scale: float, views: tuple) -> list[Results]:
    """The same with augmented views, in its parts: cross-modal, of the images, of the texts."""
    one_way = reference.one_way_contrastive_loss
    views = tuple(exact_on_host(view) for view in views)
    return [
        exact_contrastive(image, text, logit_scale) * 0.5,
        _exact(image, text, logit_scale, lambda i, t, s: one_way(i, views[0], s) / 4 + 0 * t.sum()),
        _exact(image, text, logit_scale, lambda i, t, s: one_way(t, views[1], s) / 4 + 0 * i.sum()),
    ]


def exact_cyclic(image: Tensor, text: Tensor, inmodal: float, crossmodal: float) -> Results:
    """The weighted penalties' value and gradients, by the definition, in float64."""
    return _exact(
        image,
        text,
        1.0,
        lambda i, t, s: (
            inmodal * reference.inmodal_cyclic_penalty(i, t)
            + crossmodal * reference.crossmodal_cyclic_penalty(i, t)
            + 0 * s
        ),
    )


def _exact(image: Tensor, text: Tensor, logit_scale: float, loss) -> Results:
    scale = torch.tensor(logit_scale, dtype=torch.float64, device="cpu")
    return results(loss, exact_on_host(image), exact_on_host(text), scale)


def exact_on_host(tensor: Tensor) -> Tensor:
    """The same numbers, where and as the exact results are computed."""
    return tensor.detach().to("cpu", torch.float64)


def results(loss, image: Tensor, text: Tensor, logit_scale: Tensor, upstream=1.0) -> Results:
    """loss(image, text, logit_scale) and its gradients times `upstream`, on fresh leaves."""
    leaves = [tensor.detach().requires_grad_() for tensor in (image, text, logit_scale)]
    value = loss(*leaves)
    value.backward(torch.full_like(value, upstream))
    return Results(value.detach(), *(leaf.grad for leaf in leaves))


def assert_accurate(actual: Results, parts: list[Results], bound: Results) -> None:
    """Every element within FACTOR times the bound (eps * scale) of the sum of the exact parts.

    And one rounding, to the type of the result, of each part: autograd adds up gradients of
    16-bit features in 16 bits.
    """
    for name in NAMES:
        exact = [getattr(part, name) for part in parts]
        check_bound(name, getattr(actual, name), exact, getattr(bound, name))


def check_loss(case: Case, impl: str, device: Device, tf32: bool = False) -> Results:
    """Value and gradients of CyCLIPLoss are accurate; returns them."""
    image, text, scale = case.inputs(device)
    actual = results(CyCLIPLoss(*case.lambdas, impl=impl), image, text, scale)
    exact = [
        exact_contrastive(image, text, case.logit_scale),
        exact_cyclic(image, text, *case.lambdas),
    ]
    bound = contrastive_bound(image, text, case.logit_scale, impl, tf32=tf32)
    assert_accurate(actual, exact, bound + cyclic_bound(image, text, *case.lambdas, impl, tf32))
    return actual


def check_bound(name: str, actual: Tensor, exact: list[Tensor], bound: Tensor) -> None:
    """|actual - sum of exact| <= FACTOR * bound + one rounding of each part."""
    exact, bound = [exact_on_host(part) for part in exact], FACTOR * exact_on_host(bound)
    total = sum(exact)
    assert actual.shape == total.shape, f"{name}: {actual.shape}, not {total.shape}"
    result = torch.finfo(actual.dtype)
    for part in exact:
        bound = bound + result.eps * (part.abs() + result.tiny)
    error = (exact_on_host(actual) - total).abs()
    # A NaN compares false, so this form fails on one.
    if not bool((error <= bound).all()):
        worst = (error / bound).max().item()
        raise AssertionError(f"{name}: error {worst:.2f} times the bound, {error.max():.3g}")
