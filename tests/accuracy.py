"""The loss and its gradients against the definition, by two oracles.

Both compare with `cyclip_loss.reference` in float64, which is dense and literal:

- `check`, for any input: no element's error exceeds the bound that `rounding.py` derives for it.
- `check_against_pytorch`, for ordinary inputs: no result's largest error exceeds TIMES_PYTORCH
  times the largest error of plain PyTorch, which computes the definition in the same dtype on the
  same input. ROUNDINGS times the rounding of the largest element is added, because a scalar that
  PyTorch computes may be exact by chance.

The second oracle does not use our formulas, so a mistake in the derived bounds cannot deceive it.
On inputs that are not ordinary, such as a few rows or equal rows, PyTorch's errors may all be 0.
"""

from typing import Any, NamedTuple

import pytest
import torch
from conftest import set_strip_rows
from inputs import (
    ARGUMENT_NAMES,
    NEGATIVES,
    TERMS,
    VIEWS,
    Case,
    Device,
    Grads,
    Tensors,
    exact_on_host,
    loss_dtype,
)
from rounding import bounds
from torch import Tensor
from torch.nn.functional import softplus

from cyclip_loss import CyclicPenalty, CyCLIPLoss, contrastive_logsumexp, reference

NAMES = ("value", "image", "text", "logit_scale")
TIMES_PYTORCH, ROUNDINGS = 3.0, 4.0


class Results(NamedTuple):
    """A value and its gradients."""

    value: Tensor
    image: Tensor
    text: Tensor
    logit_scale: Tensor


def results(loss, image: Tensor, text: Tensor, logit_scale: Tensor, upstream=1.0) -> Results:
    """The loss, and the gradients of `upstream` times the loss."""
    leaves = [tensor.detach().requires_grad_() for tensor in (image, text, logit_scale)]
    value = loss(*leaves)
    value.backward(torch.full_like(value, upstream))
    return Results(value.detach(), *(leaf.grad for leaf in leaves))


def evaluate(
    case: Case,
    features: Tensors,
    impl: str,
    device: Device,
    ids: Tensor | None = None,
    autocast: torch.dtype | None = None,
    **across_ranks: Any,
) -> tuple[Tensors, Grads]:
    """The loss's terms (or sum) and all gradients, by name. Asserts that no input is changed.

    autocast: the dtype of autocast in forward. Backward runs outside of it, as PyTorch advises.
    """
    given = features | {"logit_scale": case.scale(device)}
    leaves = {
        name: tensor.detach().requires_grad_(name not in case.frozen)
        for name, tensor in given.items()
    }
    copies = {name: leaf.detach().clone() for name, leaf in leaves.items()}
    enabled = {"dtype": autocast, "enabled": autocast is not None}
    with pytest.MonkeyPatch.context() as monkeypatch:
        set_strip_rows(monkeypatch, case.strip_rows)
        with torch.autocast(torch.device(device).type, **enabled):
            terms = forward(case, leaves, impl, ids, **across_ranks)
        weights = dict(zip(TERMS, case.weights, strict=True)) | {"loss": case.upstream[0]}
        found = {name: term.detach().clone() for name, term in terms.items()}
        for name, term in terms.items():
            term *= weights[name]  # in place, as some trainers do
        total = sum(terms.values())
        if total.requires_grad:
            total.backward()
    for name, leaf in leaves.items():
        assert torch.equal(leaf, copies[name]), f"{name} was changed"
    return found, {name: leaf.grad for name, leaf in leaves.items()}


def forward(
    case: Case, leaves: Tensors, impl: str, ids: Tensor | None, **across_ranks: Any
) -> Tensors:
    """The loss's terms (or sum), by name."""
    image, text, scale = (leaves[name] for name in NAMES[1:])
    others = {ARGUMENT_NAMES[name]: leaves[name] for name in ARGUMENT_NAMES.keys() & leaves}
    options = {"reference_batch_size": case.reference_batch_size, "impl": impl}
    if case.composed:
        options = {"ids": ids, "impl": impl, **others, **across_ranks}
        row, column, pair = contrastive_logsumexp(image, text, scale, **options)
        terms = (softplus(row - pair) + softplus(column - pair)).mean() / 2
    elif case.penalties_alone:
        terms = CyclicPenalty(*case.lambdas, **options)(image, text, case.output_dict)
    else:
        loss = CyCLIPLoss(*case.lambdas, **options, **case.id_options, **across_ranks)
        terms = loss(image, text, scale, None, case.output_dict, ids=ids, **others)
    return one_contrastive_term(terms) if case.output_dict else {"loss": terms}


def one_contrastive_term(terms: Tensors) -> Tensors:
    """The terms, with the in-modal contrastive term added to the cross-modal one."""
    found = dict(terms)
    if "inmodal_contrastive_loss" in found:
        found[TERMS[0]] = found[TERMS[0]] + found.pop("inmodal_contrastive_loss")
    return found


def defined_terms(case: Case, leaves: Tensors, with_views: bool) -> Tensors:
    """All terms by the definition, in the dtype and on the device of the leaves."""
    ids = case.ids(leaves["image"].device)
    options = {"reference_batch_size": case.reference_batch_size, "ids": ids, **case.id_options}
    names = (*NEGATIVES, *VIEWS) if with_views else NEGATIVES
    options |= {ARGUMENT_NAMES[name]: leaves[name] for name in names if name in leaves}
    image, text, scale = (leaves[name] for name in NAMES[1:])
    terms = reference.cyclip_loss(image, text, scale, *case.lambdas, **options)
    return one_contrastive_term(terms)


def exact_results(case: Case, features: Tensors) -> tuple[Tensors, dict[str, list[Tensor]]]:
    """Every term in float64, and for each gradient the parts that sum to it."""
    leaves = {name: exact_on_host(tensor).requires_grad_() for name, tensor in features.items()}
    leaves["logit_scale"] = exact_on_host(case.scale("cpu")).requires_grad_()
    weights = [case.world_size * weight for weight in case.weights]
    terms = defined_terms(case, leaves, with_views=False)
    parts = [weight * term for weight, term in zip(weights, terms.values(), strict=True)]
    if case.views:
        terms = defined_terms(case, leaves, with_views=True)
        parts[0] = parts[0] / 2
        parts.append(weights[0] * terms[TERMS[0]] - parts[0])
    options = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
    grads = [torch.autograd.grad(part, list(leaves.values()), **options) for part in parts]
    terms["loss"] = sum(terms[name] for name in computed_terms(case))
    return terms, dict(zip(leaves, map(list, zip(*grads, strict=True)), strict=True))


def plain_results(case: Case, features: Tensors) -> tuple[Tensors, Tensors]:
    """Every term and gradient that plain PyTorch computes in the dtype of the features."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in features.items()}
    leaves["logit_scale"] = case.scale(features["image"].device).requires_grad_()
    terms = defined_terms(case, leaves, with_views=case.views)
    weights = [case.world_size * weight for weight in case.weights]
    sum(weight * term for weight, term in zip(weights, terms.values(), strict=True)).backward()
    terms["loss"] = sum(terms[name] for name in computed_terms(case))
    return terms, {name: leaf.grad for name, leaf in leaves.items()}


def computed_terms(case: Case) -> tuple[str, ...]:
    return TERMS[1:] if case.penalties_alone else TERMS


def check_loss(case: Case, impl: str, device: Device, tf32: bool = False) -> None:
    """Assert that terms and gradients are accurate in each element."""
    features = case.features(device)
    check(case, features, *evaluate(case, features, impl, device, case.ids(device)), impl, tf32)


def check(
    case: Case, features: Tensors, terms: Tensors, grads: Grads, impl: str, tf32: bool = False
) -> None:
    """Assert that terms and gradients have the right dtypes and are accurate in each element."""
    exact_terms, exact_grads = exact_results(case, features)
    bound = bounds(case, features, impl, tf32)
    bound["loss"] = sum(bound[name] for name in computed_terms(case))
    assert tuple(terms) == (computed_terms(case) if case.output_dict else ("loss",))
    for name, term in terms.items():
        assert term.dtype == loss_dtype(case.dtype)
        assert not term < 0  # NaN fails in check_bound
        check_bound(name, term, [exact_terms[name]], bound[name])
    for name, grad in grads.items():
        if name in case.frozen:
            assert grad is None, name
        elif grad is None:  # no term depends on this input
            assert not any(part.any() for part in exact_grads[name]), name
        else:
            assert grad.dtype == (loss_dtype(case.dtype) if name == "logit_scale" else case.dtype)
            check_bound(name, grad, exact_grads[name], bound[name])


def check_bound(name: str, actual: Tensor, exact: list[Tensor], bound: Tensor | float) -> None:
    """Assert |actual - sum of exact| <= bound + rounding of each part and partial sum."""
    exact = [exact_on_host(part) for part in exact]
    total, result = sum(exact), torch.finfo(actual.dtype)
    assert actual.shape == total.shape, f"{name}: {actual.shape}, not {total.shape}"
    rounding = sum(part.abs() + result.tiny for part in exact) * (len(exact) + 1) / 2
    bound = bound + result.eps * rounding
    error = (exact_on_host(actual) - total).abs()
    # Written with `not`, so that NaN fails.
    if not bool((error <= bound).all()):
        worst = (error / bound).max().item()
        raise AssertionError(f"{name}: error up to {error.max():.3g}, {worst:.2f} times the bound")


def check_loss_against_pytorch(case: Case, impl: str, device: Device) -> None:
    """Assert that no term or gradient is much less accurate than plain PyTorch's."""
    features = case.features(device)
    terms, grads = evaluate(case, features, impl, device, case.ids(device))
    check_against_pytorch(case, features, terms, grads)


def check_against_pytorch(case: Case, features: Tensors, terms: Tensors, grads: Grads) -> None:
    """Assert that each result's largest error is at most a small multiple of plain PyTorch's."""
    exact_terms, exact_grads = exact_results(case, features)
    plain_terms, plain_grads = plain_results(case, features)
    exact = exact_terms | {name: sum(parts) for name, parts in exact_grads.items()}
    plain = plain_terms | plain_grads
    for name, actual in (terms | grads).items():
        if actual is None:
            continue
        error, plain_error = (
            (exact_on_host(found) - exact[name]).abs().max().item()
            for found in (actual, plain[name])
        )
        rounding = torch.finfo(actual.dtype).eps * exact[name].abs().max().item()
        if not error <= TIMES_PYTORCH * plain_error + ROUNDINGS * rounding:
            message = f"{name}: the largest error is {error:.3g}, plain PyTorch's {plain_error:.3g}"
            raise AssertionError(message)
