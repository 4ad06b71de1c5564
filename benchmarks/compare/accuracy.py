"""Errors of a loss and its gradients, relative to its definition in float64.

Pairs are random, or the two features of a pair are close to each other:
text = normalize(image + distance * random unit vector).
"""

from collections.abc import Sequence
from itertools import product

import torch
from torch import Tensor

from benchmarks.compare.competitors import (
    CYCLIP,
    DEFINITIONS,
    OTHER,
    PENALTIES,
    Competitor,
    Loss,
)
from benchmarks.compare.plan import DISTANCES, DTYPES, LOGIT_SCALE, Plan
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


def exact_value_and_grads(computes: str, inputs: Sequence[Tensor]) -> dict[str, Tensor]:
    """The value and gradients of a definition in float64."""
    return value_and_grads(DEFINITIONS[computes], [tensor.double() for tensor in inputs])


def identify(competitor: Competitor, loss: Loss, inputs: Sequence[Tensor]) -> str:
    """What the loss computes: a name in `DEFINITIONS`, or OTHER for a loss of the user's.

    Raises an error if a competitor's value or gradient differs from its definition's. The gradient
    of the logit scale is not compared. With random pairs it is too small for a relative comparison.
    """
    actual = value_and_grads(loss, inputs)
    for computes in [competitor.computes] if competitor.computes else DEFINITIONS:
        errors = relative_errors(actual, exact_value_and_grads(computes, inputs))
        # Also true for NaN.
        wrong = [x for x in ("value", "gradient") if not errors[x] <= MAX_RELATIVE_ERROR]
        if not wrong:
            return computes
        if competitor.computes:
            percent = f"{100 * errors[wrong[0]]:.3g} %"
            raise AssertionError(f"the {wrong[0]} differs from {computes}'s by {percent}")
    return OTHER


def add_errors(run: Run, losses: list[Competitor], plan: Plan) -> None:
    """Add a row of errors for each dtype, distance, and loss of CyCLIP or the penalties."""
    n, d = plan.error_size
    scale = torch.tensor(LOGIT_SCALE, device=run.device)
    for dtype, distance in product(dict.fromkeys(("float32", *plan.dtypes)), DISTANCES):
        inputs = (*run.pairs(n, d, DTYPES[dtype], distance), scale)
        case = {"N": n, "D": d, "dtype": dtype}
        case["|T - I|"] = "random" if distance is None else distance
        for computes in (CYCLIP, PENALTIES):
            exact = exact_value_and_grads(computes, inputs)
            for loss in (loss for loss in losses if loss.computes == computes):
                with run.attempt(**case, loss=loss.name, computes=computes) as row:
                    row |= relative_errors(
                        value_and_grads(loss.under(dtype, run.device), inputs), exact
                    )
