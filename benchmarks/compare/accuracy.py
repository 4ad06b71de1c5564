"""Errors: a loss and its gradients compared with its definition in float64.

Pairs are random, or near each other: text = image + distance * random direction, normalised.
"""

from collections.abc import Sequence
from itertools import product

import torch
from torch import Tensor

from benchmarks.compare.competitors import Competitor, Loss
from benchmarks.compare.plan import DISTANCES, LOGIT_SCALE, Plan
from benchmarks.run import Run

RANDOM = "random"
# Far above what rounding in bfloat16 causes, far below a missing term or another factor.
LARGEST_DIFFERENCE = 0.05


def results(loss: Loss, inputs: Sequence[Tensor]) -> dict[str, Tensor]:
    """The value, the gradient of both features (2, N, D), and that of the scale if there is one.

    inputs: image features, text features, logit scale.
    """
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    value = loss(*leaves)
    *feature_grads, scale_grad = torch.autograd.grad(value, leaves, allow_unused=True)
    tensors = {"value": value.detach(), "gradient": torch.stack(feature_grads)}
    return tensors if scale_grad is None else tensors | {"logit-scale gradient": scale_grad}


def relative_errors(actual: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """The norm of each difference over the norm of the exact result."""
    return {
        name: ((actual[name].double() - right).norm() / right.norm()).item()
        for name, right in exact.items()
        if name in actual
    }


def exact_results(competitor: Competitor, inputs: Sequence[Tensor]) -> dict[str, Tensor]:
    """What the competitor's definition gives in float64."""
    return results(competitor.definition, [tensor.double() for tensor in inputs])


def assert_same_values(competitor: Competitor, inputs: Sequence[Tensor]) -> None:
    """Raise an error if a competitor computes something else than it means to.

    The logit scale's gradient is not compared: with random pairs it is too small.
    """
    errors = relative_errors(results(competitor.loss, inputs), exact_results(competitor, inputs))
    for name in ("value", "gradient"):
        if not errors[name] <= LARGEST_DIFFERENCE:  # also NaN
            raise AssertionError(f"the {name} is not that of {competitor.computes}, by "
                                 f"{100 * errors[name]:.3g} %")  # fmt: skip


def add_errors(run: Run, losses: list[Competitor], plan: Plan) -> None:
    """Add a row of errors for each competitor, dtype and distance."""
    n, d = plan.error_size
    scale = torch.tensor(LOGIT_SCALE, device=run.device)
    for dtype, distance in product(dict.fromkeys((torch.float32, plan.dtype)), DISTANCES):
        inputs = (*run.pairs(n, d, dtype, distance), scale)
        exact: dict[tuple[str, str], dict[str, Tensor]] = {}
        case = {"N": n, "D": d, "dtype": str(dtype).removeprefix("torch.")}
        case["|T - I|"] = RANDOM if distance is None else distance
        for competitor in losses:
            definition = (competitor.computes, competitor.extra)
            if definition not in exact:
                exact[definition] = exact_results(competitor, inputs)
            with run.attempt(**case, loss=competitor.name, computes=competitor.computes) as row:
                row |= relative_errors(results(competitor.loss, inputs), exact[definition])
