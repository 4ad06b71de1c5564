"""How exact: the loss and its gradients against the definition in float64.

Pairs are random, or near each other: text = image + a distance times a random direction,
normalised.
"""

from functools import partial
from itertools import product

import torch
from torch import Tensor

from benchmarks.compare.competitors import MORE, PENALTIES, TERM, Competitor, Loss
from benchmarks.compare.cost import LOGIT_SCALE
from benchmarks.compare.plan import DISTANCES, Plan
from benchmarks.run import Run
from cyclip_loss import reference

RANDOM = "random"


def results(loss: Loss, image: Tensor, text: Tensor, scale: Tensor) -> dict[str, Tensor]:
    """The value, the gradient of both features (2, N, D), and the logit scale's where it has one.

    A loss without a term leaves the scale no gradient; one that takes it out again leaves noise.
    """
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (image, text, scale)]
    value = loss(*leaves)
    *of_features, of_scale = torch.autograd.grad(value, leaves, allow_unused=True)
    found = {"value": value.detach(), "gradient": torch.stack(of_features)}
    return found if of_scale is None else found | {"logit-scale gradient": of_scale}


def definition(lacks: str, more: str, image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """What a competitor that lacks this, and is given more, should compute."""
    terms = reference.cyclip_loss(image, text, scale, **MORE[more](text))
    kind = {name: PENALTIES if "cyclic" in name else TERM for name in terms}
    return torch.stack([term for name, term in terms.items() if kind[name] not in lacks]).sum()


def errors(run: Run, found: list[Competitor], plan: Plan) -> None:
    """A row for each competitor, dtype and distance: against what it means to compute."""
    n, d = plan.error_at
    scale = torch.tensor(LOGIT_SCALE, device=run.device)
    for dtype, distance in product(dict.fromkeys((torch.float32, plan.dtype)), DISTANCES):
        image, text = run.pairs(n, d, dtype, distance)
        wide = (image.double(), text.double(), scale.double())
        kinds = dict.fromkeys((c.lacks, c.more) for c in found)
        exact = {kind: results(partial(definition, *kind), *wide) for kind in kinds}
        where = {"N": n, "D": d, "dtype": str(dtype).removeprefix("torch.")}
        where["|T - I|"] = RANDOM if distance is None else distance
        for competitor in found:
            with run.attempt(**where, loss=competitor.name, lacks=competitor.lacks) as row:
                actual = results(competitor.loss, image, text, scale)
                for what, right in exact[competitor.lacks, competitor.more].items():
                    if what in actual:
                        difference = actual[what].double() - right
                        row[what] = (difference.norm() / right.norm()).item()
