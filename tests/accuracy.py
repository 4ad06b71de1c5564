"""Exact results in float64, and how far rounding alone may move a result away from them.

The bounds are forward error bounds, not tolerances found by trial. A sum of products in a type of
precision eps is off by at most a small multiple of eps times the sum of the products' *absolute
values*. That is computed here for each element of each gradient, from the formulas of the loss in
float64. So only an element that is small because large terms cancel is allowed the rounding of
these terms; any other is checked to relative precision.

The small multiple is FACTOR where errors have either sign, as in rounding to nearest, and mostly
cancel (measured: at most 3.1 for sums of 100 terms, over 20,000 random inputs). A tensor core
truncates what it adds to the float32 sum: 8 products at a time, one bit below the sum's last
(A100), or 16, two bits below (H100; Khattak and Mikaitis 2025, arXiv 2512.07004). So D terms of one
sign lose up to D / 11 or D / 20 times eps times their sum. From D = 48 on, the multiple is D / 8.
"""

from math import log
from typing import Any, NamedTuple

import pytest
import torch
from conftest import set_strip_rows
from inputs import BY_NAME, NEGATIVES, VIEWS, Case, Device, loss_dtype
from torch import Tensor

from cyclip_loss import CyclicPenalty, CyCLIPLoss, numerics, reference

FLOAT64, FLOAT32 = torch.finfo(torch.float64).eps, torch.finfo(torch.float32).eps
TF32 = 2.0**-10
FACTOR = 6.0
TERMS = ("contrastive_loss", "inmodal_cyclic_loss", "crossmodal_cyclic_loss")
NAMES = ("value", "image", "text", "logit_scale")
Tensors = dict[str, Tensor]
Grads = dict[str, Tensor | None]


class Results(NamedTuple):
    """A value and its gradients."""

    value: Tensor
    image: Tensor
    text: Tensor
    logit_scale: Tensor


class Eps(NamedTuple):
    """Relative precision of each kind of rounding."""

    logits: float  # of products of features; a logit's error is its exponential's relative error
    stored: float  # of G as stored for the products with the features
    penalties: float  # of products of U and V


def eps_of(impl: str, features: Tensor, tf32: bool = False) -> Eps:
    """The precision with which an engine computes with these features.

    The eager engine widens 16-bit features to float32 or, where CUDA multiplies them as they are,
    stores G in 16 bits. The kernels multiply 16-bit features exactly and sum in float32, store G in
    16 bits, and round U and V to tf32. tf32: whether float32 matrices are multiplied in tf32.
    """
    dtype = features.dtype
    if impl == "triton" and dtype.itemsize == 2:
        return Eps(FLOAT32, torch.finfo(dtype).eps, TF32)
    eps = torch.finfo(loss_dtype(dtype)).eps
    if tf32 and dtype != torch.float64:
        eps = max(eps, TF32)
    return Eps(eps, torch.finfo(dtype).eps if numerics.has_wide_products(features) else eps, eps)


def growth(d: int, eps: float) -> float:
    """The multiple of FACTOR * eps by which a sum of d products may be off."""
    return max(1.0, d / 8 / FACTOR) if eps <= FLOAT32 else 1.0


def contrastive_bound(
    rows: Tensor, columns: Tensor, more, scale, id_options, eps: Eps, symmetric: bool, g_is_rounded
) -> list[Tensor]:
    """eps * scale of a contrastive term of two features (n, D): value, dRows, dColumns, ds, and the
    gradients of `more`, negatives of the rows and of the columns.

    A logit's rounding error, at most eps times `size`, is a *relative* error of its exponential,
    and so of G, the gradient with respect to the logits: G of a pair is minus the sum of the others
    in its row. There the oracle subtracts probabilities from 1, and logits from their log-sum-exp.
    Its own error in float64 is added. (For float64 features, that is the whole error.)
    g_is_rounded: G is rounded before it is summed to ds. The kernels round it afterwards.
    """
    n, d = rows.shape
    left = [rows, columns] if symmetric else [rows]
    right = [torch.cat([x for x in both if x is not None]) for both in zip((columns, rows), more)]  # noqa: B905
    largest = max((x.abs() @ y.abs().T).max() for x, y in zip(left, right))  # noqa: B905
    # A whole row shares the error of its log-sum-exp, whose size is log n + the largest logit.
    most = max(len(y) for y in right[: len(left)])
    size = growth(d, eps.logits) * (1 + abs(scale) * largest) + log(most)
    value, of_scale = rows.new_zeros(()), rows.new_zeros(())
    sums = [torch.zeros_like(x) for x in (rows, columns)]
    of_more = [None if x is None else torch.zeros_like(x) for x in more]
    for side, (x, y) in enumerate(zip(left, right)):  # noqa: B905
        exact = _gradient_sizes(scale * x @ y.T, **id_options) / len(left)
        # Exponentials below the smallest normal number may be lost.
        of_logits = eps.logits * exact + (2.0**-126 if eps.logits > FLOAT64 else 2.0**-1022)
        of_logits[:, :n] += FLOAT64 * exact.new_ones(n).diag()
        of_logits *= size / n
        errors = of_logits + eps.stored * exact / n
        value += (eps.logits * exact.sum() / 2 / n + FLOAT64) * size
        of_scale += ((errors if g_is_rounded else of_logits) * (x.abs() @ y.abs().T)).sum()
        sums[side] += abs(scale) * errors @ y.abs()
        of_y = abs(scale) * errors.T @ x.abs()
        sums[1 - side] += of_y[:n]
        if of_more[side] is not None:
            of_more[side] += of_y[n:]
    options = dict(zip(("negative_text_features", "negative_image_features"), more, strict=True))
    if symmetric:
        loss = reference.contrastive_loss(rows, columns, scale, **id_options, **options)
    else:
        loss = reference.one_way_loss(scale * rows @ columns.T, **id_options)
    value += eps.logits * loss
    return [value, *sums, of_scale, *of_more]


def _gradient_sizes(logits: Tensor, ids: Tensor | None, same_ids: str) -> Tensor:
    """(n, m), the size of the terms that G_ij is the sum of: p of a negative; for a pair |p - 1|,
    computed as the sum of the others in the row; p + 1/k and 1 - 1/k more with k positives.
    """
    n = len(logits)
    targets = torch.eye(n, dtype=logits.dtype, device=logits.device)
    if same_ids == "positives":
        targets = (ids[:, None] == ids).to(logits)
        targets /= targets.sum(1, keepdim=True)
    else:
        logits = reference.without_same_ids(logits, ids)
    sizes = logits.softmax(dim=1)
    pair = sizes.sum(1) - sizes.diagonal()
    sizes.diagonal().copy_(pair + 1 - targets.diagonal())
    sizes[:, :n] += targets - targets.diag().diag()
    return sizes


def penalty_bound(image: Tensor, text: Tensor, a: float, b: float, eps: float) -> list[Tensor]:
    """eps * scale of N P_in and of N P_cross, and of dI and dT of a N P_in + b N P_cross.

    U and V are a sum and a difference of two given numbers, so each is exact except for its last
    bit. For nearly aligned pairs V is small, and so is every scale. The oracle subtracts products
    of I and T; its own error in float64 is added.
    """
    value = grad = 0.0
    sizes = image.abs() + text.abs()
    own = ((image + text).abs(), (image - text).abs(), eps * growth(image.shape[1], eps))
    for u, v, precision in (own, (sizes, sizes, FLOAT64)):
        w = u @ v.T
        value += precision * w.square().sum()
        equal, different = w @ v + w.T @ u, w.T @ v + w @ u
        grad += precision * ((abs(a) + abs(b)) * equal + abs(a - b) * different)
    return [value, grad]


def bounds(case: Case, features: Tensors, impl: str, tf32: bool) -> Tensors:
    """eps * scale of every term and of the gradients of their weighted sum, by name."""
    eps = eps_of(impl, features["image"], tf32)
    rounded = impl == "eager" and numerics.has_wide_products(features["image"])
    exact = {name: exact_on_host(tensor) for name, tensor in features.items()}
    weights = [case.world_size * weight for weight in case.weights]
    found = dict.fromkeys((*TERMS, *features, "logit_scale"), 0.0)
    parts = [("image", "text", 0.5 if case.views else 1.0)]
    parts += [("image", "image_view", 0.25), ("text", "text_view", 0.25)] if case.views else []
    id_options = {"ids": case.ids("cpu"), **case.id_options}
    for rows, columns, share in parts:
        symmetric = columns == "text"
        more = tuple(exact.get(name) if symmetric else None for name in NEGATIVES)
        inputs = (exact[rows], exact[columns], more, case.logit_scale, id_options)
        value, *grads = contrastive_bound(*inputs, eps, symmetric, rounded)
        found[TERMS[0]] += share * value
        for name, grad in zip((rows, columns, "logit_scale", *NEGATIVES), grads, strict=True):
            if grad is not None:
                found[name] += share * abs(weights[0]) * grad
    n = len(exact["image"])
    penalty_weights = [x * (case.reference_batch_size or n) / n**2 for x in case.lambdas]
    upstream = [w * u for w, u in zip(penalty_weights, weights[1:], strict=True)]
    value, grad = penalty_bound(exact["image"], exact["text"], *upstream, eps.penalties)
    for name, weight in zip(TERMS[1:], penalty_weights, strict=True):
        found[name] += weight * value
    return found | {name: found[name] + grad for name in ("image", "text")}


def exact_results(case: Case, features: Tensors) -> tuple[Tensors, dict[str, list[Tensor]]]:
    """Every term by the definition, and for each gradient the parts that sum to it."""
    leaves = {name: exact_on_host(tensor).requires_grad_() for name, tensor in features.items()}
    scale = torch.tensor(case.logit_scale, dtype=torch.float64, device="cpu", requires_grad=True)
    leaves["logit_scale"] = scale
    weights = [case.world_size * weight for weight in case.weights]

    def dense(*views: Tensor) -> Tensors:
        both = (leaves["image"], leaves["text"], scale)
        options = {"reference_batch_size": case.reference_batch_size, "ids": case.ids("cpu")}
        options |= case.id_options
        options |= {BY_NAME[name]: leaves[name] for name in NEGATIVES if name in leaves}
        return one_contrastive_term(reference.cyclip_loss(*both, *case.lambdas, *views, **options))

    terms = dense()
    parts = [weight * term for weight, term in zip(weights, terms.values(), strict=True)]
    if case.views:
        terms = dense(*(leaves[name] for name in VIEWS))
        parts[0] = parts[0] / 2
        parts.append(weights[0] * terms[TERMS[0]] - parts[0])
    options = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
    grads = [torch.autograd.grad(part, list(leaves.values()), **options) for part in parts]
    return terms, dict(zip(leaves, map(list, zip(*grads, strict=True)), strict=True))


def one_contrastive_term(terms: Tensors) -> Tensors:
    """The terms, with the in-modal contrastive term of augmented views in the cross-modal one."""
    found = dict(terms)
    if "inmodal_contrastive_loss" in found:
        found[TERMS[0]] = found[TERMS[0]] + found.pop("inmodal_contrastive_loss")
    return found


def exact_on_host(tensor: Tensor) -> Tensor:
    """The same numbers in float64 on the CPU, where exact results are computed."""
    return tensor.detach().to("cpu", torch.float64)


def results(loss, image: Tensor, text: Tensor, logit_scale: Tensor, upstream=1.0) -> Results:
    """loss(image, text, logit_scale) and its gradients times `upstream`, on fresh leaves."""
    leaves = [tensor.detach().requires_grad_() for tensor in (image, text, logit_scale)]
    value = loss(*leaves)
    value.backward(torch.full_like(value, upstream))
    return Results(value.detach(), *(leaf.grad for leaf in leaves))


def evaluate(
    case: Case, features: Tensors, impl: str, device: Device, ids=None, **across_ranks: Any
) -> tuple[Tensors, Grads]:
    """The loss's terms, or their sum, and all gradients, by name. Asserts that inputs are kept."""
    given = features | {"logit_scale": case.scale(device)}
    leaves = {
        name: tensor.detach().requires_grad_(name not in case.frozen)
        for name, tensor in given.items()
    }
    copies = {name: leaf.detach().clone() for name, leaf in leaves.items()}
    options = {"reference_batch_size": case.reference_batch_size, "impl": impl}
    image, text, scale = (leaves[name] for name in NAMES[1:])
    with pytest.MonkeyPatch.context() as monkeypatch:
        set_strip_rows(monkeypatch, case.strip_rows)
        if case.penalties_alone:
            terms = CyclicPenalty(*case.lambdas, **options)(image, text, case.output_dict)
        else:
            by_name = {BY_NAME[name]: leaf for name, leaf in leaves.items() if name in BY_NAME}
            loss = CyCLIPLoss(*case.lambdas, **options, **case.id_options, **across_ranks)
            terms = loss(image, text, scale, None, case.output_dict, ids=ids, **by_name)
        terms = one_contrastive_term(terms) if case.output_dict else {"loss": terms}
        weights = dict(zip(TERMS, case.weights, strict=True)) | {"loss": case.upstream[0]}
        found = {name: term.detach().clone() for name, term in terms.items()}
        for name, term in terms.items():
            term *= weights[name]  # in place, as trainers change and add up losses
        total = sum(terms.values())
        if total.requires_grad:
            total.backward()
    assert all(torch.equal(leaf, copies[name]) for name, leaf in leaves.items())
    return found, {name: leaf.grad for name, leaf in leaves.items()}


def check(
    case: Case, features: Tensors, terms: Tensors, grads: Grads, impl: str, tf32: bool = False
) -> None:
    """Assert that terms and gradients have the right dtypes and are accurate in each element."""
    exact_terms, exact_grads = exact_results(case, features)
    bound = bounds(case, features, impl, tf32)
    names = TERMS[1:] if case.penalties_alone else TERMS
    for of_terms in (exact_terms, bound):
        of_terms["loss"] = sum(of_terms[name] for name in names)
    assert tuple(terms) == (names if case.output_dict else ("loss",))
    for name, term in terms.items():
        assert term.dtype == loss_dtype(case.dtype)
        assert not term < 0  # NaN is compared below
        check_bound(name, term, [exact_terms[name]], bound[name])
    for name, grad in grads.items():
        if name in case.frozen:
            assert grad is None, name
        elif grad is None:  # nothing depends on it
            assert not any(part.any() for part in exact_grads[name]), name
        else:
            assert grad.dtype == (loss_dtype(case.dtype) if name == "logit_scale" else case.dtype)
            check_bound(name, grad, exact_grads[name], bound[name])


def check_loss(case: Case, impl: str, device: Device, tf32: bool = False) -> None:
    """Assert that terms and gradients are accurate."""
    features = case.features(device)
    check(case, features, *evaluate(case, features, impl, device, case.ids(device)), impl, tf32)


def check_bound(name: str, actual: Tensor, exact: list[Tensor], bound: Tensor | float) -> None:
    """Assert |actual - sum of exact| <= FACTOR * bound + rounding of each part and partial sum."""
    exact = [exact_on_host(part) for part in exact]
    total, result = sum(exact), torch.finfo(actual.dtype)
    assert actual.shape == total.shape, f"{name}: {actual.shape}, not {total.shape}"
    rounding = sum(part.abs() + result.tiny for part in exact) * (len(exact) + 1) / 2
    bound = FACTOR * bound + result.eps * rounding
    error = (exact_on_host(actual) - total).abs()
    # In this form, NaN fails.
    if not bool((error <= bound).all()):
        worst = (error / bound).max().item()
        raise AssertionError(f"{name}: error {worst:.2f} times the bound, {error.max():.3g}")
