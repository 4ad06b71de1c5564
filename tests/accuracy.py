"""The loss and its gradients against the definition.

No element's error, compared with `cyclip_loss.reference` in float64, which is dense and literal,
exceeds the bound that `rounding.py` derives for it.
"""

import torch
from inputs import (
    FEATURES,
    NEGATIVES,
    TERMS,
    VIEWS,
    exact_on_host,
    loss_dtype,
)
from rounding import bounds
from support import strips_of
from torch import Tensor
from torch.nn.functional import softplus

from cyclip_loss import CyclicPenalty, CyCLIPLoss, CySigLIPLoss, contrastive_logsumexp, reference

MODULES = {"cyclip": CyCLIPLoss, "siglip": CySigLIPLoss, "penalties": CyclicPenalty}


def results(loss, *inputs):
    """The loss and the gradients of all inputs that are tensors."""
    leaves = [x.detach().requires_grad_() if isinstance(x, Tensor) else x for x in inputs]
    value = loss(*leaves)
    if torch.is_grad_enabled():
        value.backward()
    return value.detach(), *(leaf.grad for leaf in leaves if isinstance(leaf, Tensor))


def value_and_grads(function, given, constants=()):
    """The result of `function(**given)`, under the name "value", and its gradients by name."""
    leaves = {
        name: x.detach().clone().requires_grad_(x.is_floating_point() and name not in constants)
        for name, x in given.items()
    }
    value = function(**leaves)
    inputs = {name: x for name, x in leaves.items() if x.requires_grad}
    options = {"allow_unused": True, "materialize_grads": True}
    grads = torch.autograd.grad(value, [*inputs.values()], **options)
    return {"value": value.detach(), **dict(zip(inputs, grads, strict=True))}


def graphs(
    loss,
    steps,
    backend="eager",
    fullgraph=True,
):
    """The number of graphs after each step of a compiled loss, which equals the eager one.

    A step has two lambdas and the inputs.
    """
    from torch._dynamo.testing import CompileCounterWithBackend  # slow

    torch._dynamo.reset()
    counter, counts = CompileCounterWithBackend(backend), []
    compiled = torch.compile(loss, fullgraph=fullgraph, backend=counter)
    for index, (lambdas, inputs) in enumerate(steps):
        loss.lambda_inmodal, loss.lambda_crossmodal = lambdas
        loss.reference_batch_size = 100 + index
        found, expected = results(compiled, *inputs), results(loss, *inputs)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
        counts.append(counter.frame_count)
    return counts


def evaluate(
    case,
    given,
    impl,
    autocast=None,
    wrap=lambda function: function,
    **across_ranks,
):
    """The loss's terms (or sum) and all gradients, by name. Asserts that no input is changed.

    given: `case.arguments(device)`, or a rank's rows of them. autocast: the dtype of autocast in
    forward. Backward runs outside of it, as PyTorch advises. wrap: compiles the function, say.
    """
    leaves = {
        name: x.detach().requires_grad_(name not in case.frozen and x.is_floating_point())
        for name, x in given.items()
    }
    copies = {name: leaf.detach().clone() for name, leaf in leaves.items()}
    enabled = {"dtype": autocast, "enabled": autocast is not None}
    with strips_of(case.strip_rows):
        with torch.autocast(given["image_features"].device.type, **enabled):
            terms = one_contrastive_term(wrap(function_of(case, impl, **across_ranks))(**leaves))
        found = {name: term.detach().clone() for name, term in terms.items()}
        for name, term in terms.items():
            weight = case.weights.get(name, [*case.weights.values()][-1])
            term *= weight / case.world_size  # in place, as some trainers do
        total = sum(terms.values())
        if total.requires_grad:
            total.backward()
    for name, leaf in leaves.items():
        assert torch.equal(leaf, copies[name]), f"{name} was changed"
    return found, {name: leaf.grad for name, leaf in leaves.items() if leaf.is_floating_point()}


def function_of(case, impl, **across_ranks):
    """The function under test, of `case.arguments`. From log-sum-exps: this rank's share."""
    if case.function in ("log-sum-exps", "one way"):
        one_way = case.function == "one way"
        factor = case.world_size / case.n / (1 if one_way else 2)

        def from_log_sum_exps(**given):
            row, column, pair = contrastive_logsumexp(
                **given, one_way=one_way, impl=impl, **across_ranks
            )
            margins = [x - pair for x in (row, column) if x is not None]
            return factor * sum(softplus(x, threshold=40.0).sum() for x in margins)

        return from_log_sum_exps
    options = {"impl": impl, "centered": case.centered}
    options["reference_batch_size"] = case.reference_batch_size
    if case.function != "penalties":
        options |= case.id_options | across_ranks
    if case.has_progress:
        options["lambda_progress"] = True
    module = MODULES[case.function](*case.lambdas, **options)
    return lambda **given: module(**given, output_dict=case.output_dict)


def one_contrastive_term(terms):
    """The terms by name, with the in-modal contrastive term added to the cross-modal one."""
    found = dict(terms) if isinstance(terms, dict) else {"loss": terms}
    if "inmodal_contrastive_loss" in found:
        found[TERMS[0]] = found[TERMS[0]] + found.pop("inmodal_contrastive_loss")
    return found


def defined_terms(case, given):
    """The terms by the definition, in the dtype and on the device of the given tensors."""
    image = given["image_features"]
    given = {"logit_scale": image.new_ones(()), **given}
    bias, options = given.pop("logit_bias", None), {**given, **case.id_options}
    terms = reference.cyclip_loss(
        **options,
        lambda_inmodal=case.lambdas[0],
        lambda_crossmodal=case.lambdas[1],
        reference_batch_size=case.reference_batch_size,
        centered=case.centered,
    )
    if case.has_progress:
        clip = terms[TERMS[0]].detach() * (1 + case.views)  # with views, a half of it is there
        progress = (1 - clip / case.chance_level).clamp(0, 1)
        terms |= {name: progress * terms[name] for name in TERMS[1:]}
    if case.function == "siglip":
        terms[TERMS[0]] = reference.siglip_loss(**options, logit_bias=bias)
    elif case.function == "one way":
        columns = [x for name, x in given.items() if "text_features" in name]
        logits = given["logit_scale"] * image @ torch.cat(columns).T
        ids, negative_ids = given.get("ids"), given.get("negative_text_ids")
        terms[TERMS[0]] = reference.one_way_loss(logits, ids, negative_ids=negative_ids)
    terms = one_contrastive_term(terms)
    return {name: terms[name] for name in case.weights}


def exact_results(case, given):
    """Every term in float64, and for each gradient the parts that sum to it."""
    leaves = {name: exact_on_host(x) for name, x in given.items()}
    floats = {name: x.requires_grad_() for name, x in leaves.items() if x.is_floating_point()}
    terms = defined_terms(case, leaves)
    parts = [weight * terms[name] for name, weight in case.weights.items()]
    share = case.weights.get(TERMS[0], 0.0)
    without_views = {name: x for name, x in leaves.items() if name not in VIEWS}
    separate = []  # inputs whose contrastive loss is a part of its own
    if VIEWS[0] in given:
        share /= 2
        separate.append(without_views)
    if any(name in given for name in NEGATIVES):
        # What the features get as those of the pairs. In columns of their own, constants take their
        # place in the logits of the extra negatives.
        apart = dict(without_views)
        for index, name in enumerate((*FEATURES, *NEGATIVES)):
            if name in apart:
                x, zeros = leaves[name], torch.zeros_like(leaves[name])
                columns = [x, zeros, zeros]
                if index > 1:
                    columns = [zeros, x, zeros] if "text" in name else [zeros, zeros, x]
                else:
                    columns[1 + index] = x.detach()
                apart[name] = torch.cat(columns, dim=1)
        separate.append(apart)
    for inputs in separate:
        part = share * defined_terms(case, inputs)[TERMS[0]]
        parts = [part, parts[0] - part, *parts[1:]]
    options = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
    grads = [torch.autograd.grad(part, list(floats.values()), **options) for part in parts]
    terms = {name: term.detach() for name, term in terms.items()}
    terms["loss"] = sum(terms.values())
    return terms, dict(zip(floats, map(list, zip(*grads, strict=True)), strict=True))


def check_loss(case, impl, device, tf32=False):
    """Assert that terms and gradients are accurate in each element."""
    given = case.arguments(device)
    check(case, given, *evaluate(case, given, impl), impl, tf32)


def check(case, given, terms, grads, impl, tf32=False):
    """Assert that terms and gradients have the right dtypes and are accurate in each element."""
    exact_terms, exact_grads = exact_results(case, given)
    bound = bounds(case, given, exact_terms, impl, tf32)
    several = case.output_dict and len(case.weights) > 1
    assert tuple(terms) == (tuple(case.weights) if several else ("loss",))
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
            assert grad.dtype == given[name].dtype
            check_bound(name, grad, exact_grads[name], bound[name])


def check_bound(name, actual, exact, bound):
    """Assert |actual - sum of exact| <= bound + rounding of each part and partial sum."""
    exact = [exact_on_host(part) for part in exact]
    total, result = sum(exact), torch.finfo(actual.dtype)
    assert actual.shape == total.shape, f"{name}: {actual.shape}, not {total.shape}"
    rounding = sum(part.abs() + result.tiny for part in exact) * (len(exact) + 1) / 2
    bound = bound + result.eps * rounding
    error = (exact_on_host(actual) - total).abs()
    # A part that is too large for the dtype may make the sum infinite or NaN, as in float16.
    too_large = sum(part.abs() for part in exact) > result.max
    # Written with `not`, so that NaN fails.
    if not bool(((too_large & ~error.isfinite()) | (error <= bound)).all()):
        worst = (error / bound).max().item()
        raise AssertionError(f"{name}: error up to {error.max():.3g}, {worst:.2f} times the bound")
