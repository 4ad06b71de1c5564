"""Errors of a loss and its gradients, relative to its definition in float64.

Pairs are random, or the two features of a pair are close to each other:
text = normalize(image + distance * random unit vector).
"""

from collections.abc import Sequence
from itertools import product

import torch
from torch import Tensor

from benchmarks.compare.competitors import IN_ERRORS, Competitor, Loss
from benchmarks.compare.plan import DISTANCES, LOGIT_SCALE, Plan
from benchmarks.run import Run

# Rounding in bfloat16 causes much smaller errors. A missing term or factor causes larger ones.
MAX_RELATIVE_ERROR = 0.05


def value_and_grads(loss: Loss, inputs: Sequence[Tensor]) -> dict[str, Tensor]:
    """The loss, the stacked gradients of both features (2, N, D), and the gradient of the scale.

    The gradient of the scale is left out if the loss does not depend on the scale.
    inputs: image features, text features, logit scale.
    """
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    value = loss(*leaves)
    *feature_grads, scale_grad = torch.autograd.grad(value, leaves, allow_unused=True)
    tensors = {"value": value.detach(), "gradient": torch.stack(feature_grads)}
    return tensors if scale_grad is None else tensors | {"logit-scale gradient": scale_grad}


def relative_errors(actual: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """For each result: the norm of the difference, divided by the norm of the exact result."""
    return {
        name: ((actual[name].double() - exact_result).norm() / exact_result.norm()).item()
        for name, exact_result in exact.items()
        if name in actual
    }


def exact_value_and_grads(competitor: Competitor, inputs: Sequence[Tensor]) -> dict[str, Tensor]:
    """The value and gradients of the competitor's definition in float64."""
    return value_and_grads(competitor.definition, [tensor.double() for tensor in inputs])


def assert_same_values(competitor: Competitor, inputs: Sequence[Tensor]) -> None:
    """Raise an error if a competitor's value or gradient differs from its definition's.

    The gradient of the logit scale is not compared. With random pairs it is too small for a
    relative comparison.
    """
    actual = value_and_grads(competitor.loss, inputs)
    errors = relative_errors(actual, exact_value_and_grads(competitor, inputs))
    for name in ("value", "gradient"):
        if not errors[name] <= MAX_RELATIVE_ERROR:  # also true for NaN
            percent = f"{100 * errors[name]:.3g} %"
            raise AssertionError(f"the {name} differs from {competitor.computes}'s by {percent}")


def add_errors(run: Run, losses: list[Competitor], plan: Plan) -> None:
    """Add a row of errors for each competitor of `IN_ERRORS`, each dtype and each distance."""
    n, d = plan.error_size
    compared = {name for names in IN_ERRORS.values() for name in names}
    losses = [competitor for competitor in losses if competitor.name in compared]
    scale = torch.tensor(LOGIT_SCALE, device=run.device)
    for dtype, distance in product(dict.fromkeys((torch.float32, plan.dtype)), DISTANCES):
        inputs = (*run.pairs(n, d, dtype, distance), scale)
        exact: dict[str, dict[str, Tensor]] = {}
        case = {"N": n, "D": d, "dtype": str(dtype).removeprefix("torch.")}
        case["|T - I|"] = "random" if distance is None else distance
        for competitor in losses:
            computes = competitor.computes
            if computes not in exact:
                exact[computes] = exact_value_and_grads(competitor, inputs)
            with run.attempt(**case, loss=competitor.name, computes=computes) as row:
                row |= relative_errors(value_and_grads(competitor.loss, inputs), exact[computes])
