"""How exact: the loss and its gradients against the definition in float64.

An error is relative: the norm of the difference over the norm of the exact result. Pairs are
random, or nearly aligned, as a trained model's are: text = image + a distance times a random
direction, normalised.
"""

from typing import Any

import torch
from torch import Tensor

from benchmarks.competitors import (
    CONTRASTIVE,
    OURS,
    PENALTIES,
    Competitor,
    Loss,
    dense_penalties,
)
from benchmarks.cost import LOGIT_SCALE, OK
from benchmarks.memory import outcome_of
from benchmarks.run import Run
from cyclip_loss import cyclic_penalty, reference

RESULTS = ("value", "image", "text", "logit_scale")
RANDOM = "random"
DENSE_MATRICES = 8  # N x N that the dense penalties hold at most, forward and backward


def results(loss: Loss, image: Tensor, text: Tensor, scale: Tensor) -> dict[str, Tensor | None]:
    """The value and the three gradients, None where a loss has none."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (image, text, scale)]
    value = loss(*leaves)
    value.backward()
    return dict(zip(RESULTS, (value.detach(), *(leaf.grad for leaf in leaves)), strict=True))


def relative_error(actual: Tensor, exact: Tensor) -> float:
    """The norm of the difference over the norm of the exact result."""
    return ((actual.double() - exact).norm() / exact.norm()).item()


def errors(actual: dict[str, Tensor | None], exact: dict[str, Tensor | None]) -> dict[str, float]:
    """Relative errors by name, of what both have."""
    return {
        name: relative_error(actual[name], exact[name])
        for name in RESULTS
        if actual[name] is not None and exact[name] is not None
    }


def definition(lacks: str) -> Loss:
    """What a competitor that lacks this should compute."""

    def loss(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        terms = reference.cyclip_loss(image, text, scale)
        contrastive = terms.pop("contrastive_loss")
        if PENALTIES in lacks:
            return contrastive
        return sum(terms.values()) + (0 if CONTRASTIVE in lacks else contrastive)

    return loss


def of_losses(
    run: Run,
    found: list[Competitor],
    n: int,
    d: int,
    dtype: torch.dtype,
    distances: tuple[float | None, ...],
) -> list[dict[str, Any]]:
    """Errors of every competitor, each against what it means to compute."""
    rows = []
    for distance in distances:
        image, text = run.pairs(n, d, dtype, distance)
        scale = torch.tensor(LOGIT_SCALE, device=run.device)
        wide = (image.double(), text.double(), scale.double())
        exact: dict[str, dict[str, Tensor | None]] = {}
        for competitor in found:
            if competitor.lacks not in exact:
                exact[competitor.lacks] = results(definition(competitor.lacks), *wide)
            row = {**_where(n, d, dtype, distance), "loss": competitor.name}
            row |= {"lacks": competitor.lacks, "outcome": OK}
            try:
                row |= errors(results(competitor.loss, image, text, scale), exact[competitor.lacks])
            except Exception as error:
                row["outcome"] = outcome_of(error)
            rows.append(row)
    return rows


def of_penalties(
    run: Run, n: int, d: int, dtype: torch.dtype, distances: tuple[float | None, ...]
) -> list[dict[str, Any]]:
    """Errors of the penalties' gradient (both features as one), ours and the dense formula's."""
    rows = []
    for distance in distances:
        image, text = run.pairs(n, d, dtype, distance)
        exact = penalty_gradient(dense_penalties, image.double(), text.double())
        row: dict[str, Any] = _where(n, d, dtype, distance)
        row[OURS] = relative_error(penalty_gradient(cyclic_penalty, image, text), exact)
        row["dense"] = relative_error(penalty_gradient(dense_penalties, image, text), exact)
        row["dense / ours"] = row["dense"] / row[OURS]
        rows.append(row)
    return rows


def penalty_gradient(penalty: Any, image: Tensor, text: Tensor) -> Tensor:
    """Gradients of penalty(image, text) with respect to both, (2, n, d)."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (image, text)]
    penalty(*leaves).backward()
    return torch.stack([leaf.grad for leaf in leaves])


def _where(n: int, d: int, dtype: torch.dtype, distance: float | None) -> dict[str, Any]:
    name = str(dtype).removeprefix("torch.")
    return {"N": n, "D": d, "dtype": name, "|T - I|": RANDOM if distance is None else distance}
