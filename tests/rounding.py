"""How far rounding alone may move each element of a result away from its exact value.

The bounds are forward error bounds, not tolerances found by trial. A sum of products in a type of
precision eps is off by at most a small multiple of eps times the sum of the products' *absolute
values*. That sum is computed here for each element of each gradient, from the formulas of the loss
in float64. So only an element that is small because large terms cancel is allowed the rounding of
these terms. Every other element is checked to relative precision.

The small multiple is FACTOR where errors have either sign, as in rounding to nearest, and mostly
cancel. (Measured: at most 3.1 for sums of 100 terms, over 20,000 random inputs.) Tensor cores do
not round to nearest. They add several products to the float32 sum at a time, and truncate them.
An A100 adds 8 products, and keeps one bit more than the sum has; an H100 adds 16, and keeps two
bits more (Khattak and Mikaitis 2025, arXiv 2512.07004). So a sum of D terms of the same sign loses
up to D / 11 (A100) or D / 20 (H100) times eps times itself. From D = 48 on, the multiple is D / 8.
"""

from math import log
from typing import Any, NamedTuple

import torch
from inputs import FEATURES, NEGATIVES, TERMS, VIEWS, exact_on_host, loss_dtype

from cyclip_loss import reference

FLOAT64, FLOAT32 = torch.finfo(torch.float64).eps, torch.finfo(torch.float32).eps
TF32 = 2.0**-10
FACTOR = 6.0


class Eps(NamedTuple):
    """Relative precision of each kind of rounding."""

    logits: float  # in logits; a logit's absolute error is its exponential's relative error
    stored: float  # in G as it is stored for the products with the features
    penalties: float  # in products of U and V


def bounds(case, given, terms, impl, tf32):
    """The bounds of each term and of each gradient, by name: FACTOR times the rounding error.

    The gradients are those of the sum of all terms, each times its weight. terms: exact.
    """
    image = given["image_features"]
    eps = engine_eps(impl, image, tf32)
    g_is_rounded = impl == "eager" and has_wide_products(image)
    exact = {name: exact_on_host(tensor) for name, tensor in given.items()}
    found = dict.fromkeys((*TERMS, *given), torch.zeros((), dtype=torch.float64, device="cpu"))

    weight = abs(case.weights.get(TERMS[0], 0.0))
    found[TERMS[0]] = eps.logits * terms.get(TERMS[0], 0.0)
    for row_name, column_name, share in contrastive_terms(case, given):
        value, grads = contrastive_bound(case, exact, row_name, column_name, eps, g_is_rounded)
        found[TERMS[0]] = found[TERMS[0]] + share * value
        for name, grad in grads.items():
            found[name] = found[name] + share * weight * grad

    n = case.n
    penalty_weights = [x * (case.reference_batch_size or n) / n**2 for x in case.lambdas]
    pairs = [x * case.weights.get(y, 0.0) for x, y in zip(penalty_weights, TERMS[1:], strict=True)]
    features = (exact[name] for name in FEATURES)
    # With views, CLIP's loss and its error are halved.
    progress_error = found[TERMS[0]] * (1 + case.views) / case.chance_level * case.has_progress
    value, grad = penalty_bound(case, *features, *pairs, eps.penalties, progress_error)
    for name, penalty_weight in zip(TERMS[1:], penalty_weights, strict=True):
        found[name] = penalty_weight * value
    for name in FEATURES:
        found[name] = found[name] + grad
    found["loss"] = sum(found[name] for name in case.weights)
    return {name: FACTOR * bound for name, bound in found.items()}


def contrastive_terms(case, given):
    """For each contrastive term: the names of its features, and its share of the loss."""
    if VIEWS[0] in given:
        views = [(*names, 0.25) for names in zip(FEATURES, VIEWS, strict=True)]
        return [(*FEATURES, 0.5), *views]
    return [] if case.function == "penalties" else [(*FEATURES, 1.0)]


def has_wide_products(features):
    """Whether the eager engine may multiply these features in 16 bits, as CUDA can."""
    return features.is_cuda and features.dtype.itemsize == 2


def engine_eps(impl, features, tf32=False):
    """The precision with which an engine computes with these features.

    The eager engine widens 16-bit features to float32. Where CUDA multiplies 16-bit matrices into
    float32 ones, the eager engine does not widen them, but stores G in 16 bits. The kernels
    multiply 16-bit features exactly, sum in float32, store G in 16 bits, and round U and V to tf32.

    tf32: whether float32 matrices are multiplied in tf32.
    """
    dtype = features.dtype
    if impl == "triton" and dtype.itemsize == 2:
        return Eps(FLOAT32, torch.finfo(dtype).eps, TF32)
    eps = torch.finfo(loss_dtype(dtype)).eps
    if tf32 and dtype != torch.float64:
        eps = max(eps, TF32)
    return Eps(eps, torch.finfo(dtype).eps if has_wide_products(features) else eps, eps)


def growth(d, eps):
    """How many times FACTOR * eps a sum of d products may be off, relative to |its terms|."""
    return max(1.0, d / 8 / FACTOR) if eps <= FLOAT32 else 1.0


def contrastive_bound(case, exact, row_name, column_name, eps, g_is_rounded):
    """The rounding error of a contrastive term's value, and of its gradients by name.

    g_is_rounded: whether G is rounded before it is summed to the scale's gradient. (The kernels
    round it afterwards.)

    A logit's rounding error is at most eps times `size`. It is a *relative* error of the logit's
    exponential, and so of G, the gradient with respect to the logits. (G of a pair is minus the sum
    of the other elements of its row.) For the pairs, the oracle subtracts probabilities from 1, and
    logits from their log-sum-exp, so its own float64 error is added. (For float64 features, that is
    the whole error.)
    """
    scale, n = case.logit_scale, case.n
    siglip = case.function == "siglip"
    # For each direction: the queries, and the candidates among which each finds its partner.
    directions = [(row_name, [column_name])]
    if column_name == FEATURES[1]:
        directions[0][1].extend(name for name in NEGATIVES[:1] if name in exact)
        if case.function != "one way":
            directions.append((column_name, [row_name]))
            directions[1][1].extend(name for name in NEGATIVES[1:] if name in exact)
    candidates = [torch.cat([exact[name] for name in names]) for _, names in directions]
    products = [
        exact[queries].abs() @ x.abs().T
        for (queries, _), x in zip(directions, candidates, strict=True)
    ]
    # A whole row shares the error of its log-sum-exp, whose size is log n + the largest logit.
    largest = abs(scale) * max(x.max() for x in products) + siglip * abs(case.logit_bias)
    size = growth(case.d, eps.logits) * (1 + largest) + log(max(map(len, candidates)))

    value, grads = torch.zeros_like(products[0][0, 0]), dict[str, Any]()
    for index, (queries, names) in enumerate(directions):
        logits = scale * exact[queries] @ candidates[index].T + siglip * case.logit_bias
        negative_ids = exact.get(f"{names[-1].removesuffix('features')}ids")
        sizes = gradient_sizes(case, logits, exact.get("ids"), negative_ids, index == 0)
        sizes /= 1 if siglip else len(directions)
        # Exponentials below the smallest normal number may be lost.
        logit_errors = eps.logits * sizes
        logit_errors += 2.0**-126 if eps.logits > FLOAT64 else 2.0**-1022
        logit_errors[:, :n] += FLOAT64 * sizes.new_ones(n).diag()
        logit_errors *= size / n
        errors = logit_errors + eps.stored * sizes / n
        value += (eps.logits * sizes.sum() / (1 if siglip else 2) / n + FLOAT64) * size
        summed = errors if g_is_rounded else logit_errors
        found = {"logit_scale": (summed * products[index]).sum(), "logit_bias": summed.sum()}
        found[queries] = abs(scale) * errors @ candidates[index].abs()
        rows = abs(scale) * errors.T @ exact[queries].abs()
        found |= zip(names, rows.split([len(exact[name]) for name in names]), strict=True)
        for name, grad in found.items():
            if name in exact:
                grads[name] = grads.get(name, 0.0) + grad
    return value, grads


def gradient_sizes(case, logits, ids, negative_ids, has_pairs):
    """(n, m): N times the sum of the absolute values of the terms that each G_ij is computed from.

    This is N |G_ij|. Only if the row has k positives do terms cancel: G_ij is p - 1/k for the
    others, and 1 - p - (1 - 1/k) for the pair. has_pairs: of SigLIP's loss, whether all columns
    count, not only extra negatives.
    """
    n, options = case.n, case.id_options
    leaf = logits.requires_grad_()
    if case.function == "siglip":
        # These logits are their product with the rows of a unit matrix.
        unit = torch.eye(logits.shape[1], dtype=logits.dtype, device=logits.device)
        negatives = {"negative_text_features": unit[n:], "negative_text_ids": negative_ids}
        loss = reference.siglip_loss(leaf, unit[:n], 1, 0, ids, **options, **negatives)
    else:
        loss = reference.one_way_loss(leaf, ids, **options, negative_ids=negative_ids)
    (grad,) = torch.autograd.grad(n * loss, leaf)
    sizes = grad.abs()
    if not has_pairs and case.function == "siglip":
        sizes[:, :n] = 0.0
    elif options["same_ids"] == "positives" and case.function != "siglip":
        targets = (ids[:, None] == ids).to(grad)
        targets /= targets.sum(1, keepdim=True)
        sizes[:, :n] = grad[:, :n] + 2 * targets
        sizes.diagonal().copy_(2 - 2 * targets.diagonal() - grad.diagonal())
    return sizes


def penalty_bound(case, image, text, a, b, eps, factor_error):
    """The rounding error of N P_in and N P_cross, and of the gradients of a N P_in + b N P_cross.

    Each is multiplied by a factor from 0 to 1, which is off by at most `factor_error`.

    Each element of U and V is a sum or a difference of two given numbers, so only its last bit is
    inexact. For nearly aligned pairs V is small, and so are all errors. The oracle subtracts
    products of I and T instead, so its own float64 error is added. Centred features are rounded,
    and so are their means, of which all features have the same error.
    """
    value = grad = centering = 0.0
    sizes = image.abs() + text.abs()
    if case.centered:
        image, text, means = image - image.mean(dim=0), text - text.mean(dim=0), sizes.mean(dim=0)
        sizes = image.abs() + text.abs() + means
        centering = torch.finfo(loss_dtype(case.dtype)).eps
    u, v = (x.abs() + centering * sizes for x in (image + text, image - text))
    engine = (u, v, eps * growth(image.shape[1], eps) + factor_error)
    centered = [(sizes, v, centering), (u, sizes, centering)]
    oracle = (sizes, sizes, FLOAT64)
    for u, v, precision in (engine, *centered, oracle):
        w = u @ v.T
        value += precision * w.square().sum()
        equal, different = w @ v + w.T @ u, w.T @ v + w @ u
        grad += precision * ((abs(a) + abs(b)) * equal + abs(a - b) * different)
    return [value, grad]
