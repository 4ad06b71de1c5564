"""One version against another, by pytest-benchmark: `pytest benchmarks --benchmark-only`.

The loss, its parts, what a call costs when the batch is tiny, and each of the four functions of the
engine that the package chooses for the device. README.md says how to compare.
"""

from collections.abc import Callable
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
from cyclip_loss.ops import engine

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SIZES = ((512, 512), (2048, 512)) if DEVICE.type == "cpu" else ((8192, 512), (32768, 768))
DTYPE = torch.float32 if DEVICE.type == "cpu" else torch.bfloat16
GROUPS = {ours(DEVICE): "loss", OURS_CONTRASTIVE: "loss", OURS_PENALTIES: "penalties"}

sizes = pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")


def timed(benchmark: Any, group: str, call: Callable[[], object]) -> None:
    """Benchmark a call, to the end of what the device does for it."""
    benchmark.group = group

    def to_the_end() -> None:
        call()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    to_the_end()
    benchmark(to_the_end)


def step(name: str, n: int, d: int) -> Callable[[], object]:
    """A loss and its gradients as a function of nothing."""
    try:
        loss = BUILDERS[name](DEVICE).loss
    except UnavailableError as error:
        pytest.skip(str(error))
    run_step = step_of(loss, leaves_of(Run(dry_run=False, seed=0, device=DEVICE), n, d, DTYPE))
    return lambda: run_step(lambda: None)


@sizes
@pytest.mark.parametrize("name", GROUPS)
def test_forward_and_backward(benchmark: Any, name: str, size: tuple[int, int]) -> None:
    """Forward and backward of the whole loss and of its parts."""
    timed(benchmark, GROUPS[name], step(name, *size))


@pytest.mark.parametrize("name", [*GROUPS, DENSE, OPEN_CLIP])
def test_module_call(benchmark: Any, name: str) -> None:
    """Forward and backward at N = 8, D = 8, where only the calls cost, beside the alternatives."""
    timed(benchmark, "module call, N = 8, D = 8", step(name, 8, 8))


@sizes
@pytest.mark.parametrize(
    "name", ["contrastive_lse", "contrastive_grads", "cyclic_statistics", "cyclic_grads"]
)
@torch.no_grad()
def test_engine(benchmark: Any, name: str, size: tuple[int, int]) -> None:
    """Each function alone, for equal lambdas, with all gradients."""
    image, text = Run(dry_run=False, seed=0, device=DEVICE).pairs(*size, DTYPE)
    scale, grad = torch.tensor(14.3, device=DEVICE), torch.ones((), device=DEVICE)
    coefficients = torch.tensor([0.5, 0.0], device=DEVICE)
    functions, weight = engine("auto", image), 0.5 / size[0]
    sums = functions.contrastive_lse(image, text, scale, 0, True)  # of the right shapes
    grams = functions.cyclic_statistics(image, text, False, False)
    arguments = {
        "contrastive_lse": (scale, 0, True),
        "contrastive_grads": (scale, *sums, grad, weight, 0, True, [True] * 3, False),
        "cyclic_statistics": (False, False),
        "cyclic_grads": (grams, coefficients, False, False, [True] * 2),
    }[name]
    function = getattr(functions, name)
    timed(benchmark, name, lambda: function(image, text, *arguments))
