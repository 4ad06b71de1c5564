"""The loss, the penalties and a module's call: `pytest benchmarks --benchmark-only` (README.md)."""

from typing import Any

import pytest
import torch

from benchmarks.competitors import (
    BUILDERS,
    DENSE,
    OPEN_CLIP,
    OURS_CONTRASTIVE,
    OURS_PENALTIES,
    UnavailableError,
    ours,
)
from benchmarks.cost import leaves_of, step_of
from benchmarks.run import Run
from benchmarks.test_operators import DEVICE, DTYPE, SIZES, timed

GROUPS = {ours(DEVICE): "loss", OURS_CONTRASTIVE: "loss", OURS_PENALTIES: "penalties"}


def step(name: str, n: int, d: int) -> Any:
    """A loss and its gradients as a function of nothing."""
    try:
        loss = BUILDERS[name](DEVICE).loss
    except UnavailableError as error:
        pytest.skip(str(error))
    run_step = step_of(loss, leaves_of(Run(dry_run=False, seed=0, device=DEVICE), n, d, DTYPE))
    return lambda: run_step(lambda: None)


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
@pytest.mark.parametrize("name", GROUPS)
def test_forward_and_backward(benchmark: Any, name: str, size: tuple[int, int]) -> None:
    """Forward and backward of the whole loss and of its parts."""
    timed(benchmark, GROUPS[name], step(name, *size))


@pytest.mark.parametrize("name", [*GROUPS, DENSE, OPEN_CLIP])
def test_module_call(benchmark: Any, name: str) -> None:
    """Forward and backward at N = 8, D = 8, where only the calls cost, beside the alternatives."""
    torch.manual_seed(0)
    timed(benchmark, "module call, N = 8, D = 8", step(name, 8, 8))
