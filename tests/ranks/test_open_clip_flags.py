"""What OpenCLIP's flags do to the loss and its gradients: the table in docs/distributed.md.

Gradients are averaged across ranks, as DDP does, and compared with the gradients of one process on
the whole batch. OpenCLIP's losses have no penalties, so CyCLIPLoss has none here, too.
"""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from inputs import normal
from pool import Ranks
from torch import Tensor

pytest.importorskip("open_clip")

from open_clip import ClipLoss

from cyclip_loss import CyCLIPLoss

RANKS, ROWS, WIDTH, D = 4, 8, 16, 6
WHOLE_BATCH, OWN_ROWS, OWN_ROWS_ALONE = "whole batch", "own rows, all columns", "own rows alone"


def step(rank: int, world_size: int, make) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of a rank's rows, and the gradients of two linear encoders and the logit scale."""
    inputs = normal(2, RANKS * ROWS, WIDTH, seed=1, device="cpu").chunk(world_size, dim=1)[rank]
    encoders = normal(2, WIDTH, D, device="cpu").requires_grad_()
    log_scale = torch.full((), 2.0, dtype=torch.float64, requires_grad=True)
    image, text = F.normalize(inputs @ encoders, dim=-1)
    loss = make(rank=rank, world_size=world_size)(image, text, log_scale.exp())
    return loss.detach(), *torch.autograd.grad(loss, (encoders, log_scale))


def without_flags(rank: int, world_size: int) -> ClipLoss:
    return ClipLoss()


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    ("make", "value", "factor", "rest", "scale_factor"),
    [
        # The encoders' gradient is `factor` times the exact gradient, plus an orthogonal part.
        # `rest` is the length of the orthogonal part as a fraction of the gradient's length.
        (without_flags, OWN_ROWS_ALONE, 0.879, 0.489, 0.668),
        (partial(ClipLoss), WHOLE_BATCH, 1 / RANKS, 0, 1),
        (partial(ClipLoss, gather_with_grad=True), WHOLE_BATCH, 1, 0, 1),
        (partial(ClipLoss, local_loss=True), OWN_ROWS, 0.484, 0.157, 1),
        (partial(ClipLoss, local_loss=True, gather_with_grad=True), OWN_ROWS, 1, 0, 1),
        (partial(CyCLIPLoss, 0, 0, dist_impl="gather"), WHOLE_BATCH, 1, 0, 1),
        (partial(CyCLIPLoss, 0, 0, dist_impl="ring"), WHOLE_BATCH, 1, 0, 1),
    ],
)
def test_each_flag_has_the_loss_and_gradients_in_the_docs_table(
    ranks: Ranks, make, value, factor, rest, scale_factor
) -> None:
    losses, encoders, scales = map(torch.stack, zip(*ranks.run(RANKS, step, make), strict=True))
    whole, exact, exact_scale = step(0, 1, ClipLoss)
    assert torch.allclose(losses.mean(), whole, rtol=1e-9) == (value != OWN_ROWS_ALONE)
    for loss in losses:
        assert torch.allclose(loss, whole, rtol=1e-9) == (value == WHOLE_BATCH)
    gradient = encoders.mean(dim=0)
    found_factor = (gradient * exact).sum() / exact.square().sum()
    found_rest = (gradient - found_factor * exact).norm() / gradient.norm()
    expected = {"abs": 5e-4 if rest else 1e-9}
    assert found_factor.item() == pytest.approx(factor, **expected)
    assert found_rest.item() == pytest.approx(rest, **expected)
    assert (scales.mean() / exact_scale).item() == pytest.approx(scale_factor, **expected)
