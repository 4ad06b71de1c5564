"""Each operator alone, one group for each: `pytest benchmarks --benchmark-only` (README.md).

As autograd calls them: without grad mode, by the engine that the package chooses for the device.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.run import Run
from cyclip_loss import ops

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SIZES = ((512, 512), (2048, 512)) if DEVICE.type == "cpu" else ((8192, 512), (32768, 768))
DTYPE = torch.float32 if DEVICE.type == "cpu" else torch.bfloat16


def timed(benchmark: Any, group: str, call: Callable[[], object]) -> None:
    """Benchmark a call, to the end of what the device does for it."""
    benchmark.group = group

    def to_the_end() -> None:
        call()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    to_the_end()
    benchmark(to_the_end)


def inputs(n: int, d: int) -> tuple[Tensor, Tensor, Tensor]:
    """Features (n, d) and the logit scale."""
    run = Run(dry_run=False, seed=0, device=DEVICE)
    return *run.pairs(n, d, DTYPE), torch.tensor(14.3, device=DEVICE)


@pytest.fixture(params=SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def size(request: pytest.FixtureRequest) -> tuple[int, int]:
    """N, D."""
    return request.param


@pytest.fixture(autouse=True)
def no_grad() -> Any:
    """Operators run inside `autograd.Function`, where there is no grad mode."""
    with torch.no_grad():
        yield


def test_contrastive_lse(benchmark: Any, size: tuple[int, int]) -> None:
    """The sweep for the log-sum-exps."""
    features = inputs(*size)
    call = lambda: ops.contrastive_lse(*features, 0, True, "auto")  # noqa: E731
    timed(benchmark, "contrastive_lse", call)


def test_contrastive_grads(benchmark: Any, size: tuple[int, int]) -> None:
    """The sweep for all gradients."""
    features = inputs(*size)
    lse = ops.contrastive_lse(*features, 0, True, "auto")  # any values of the right shapes
    weight = torch.tensor(0.5 / size[0], device=DEVICE)
    flags = (0, True, True, True, True, False, "auto")
    call = lambda: ops.contrastive_grads(*features, *lse, weight, *flags)  # noqa: E731
    timed(benchmark, "contrastive_grads", call)


@pytest.mark.parametrize("with_cross", [False, True], ids=["equal lambdas", "unequal"])
def test_cyclic_statistics(benchmark: Any, size: tuple[int, int], with_cross: bool) -> None:
    """The Gram matrices."""
    features = inputs(*size)[:2]
    call = lambda: ops.cyclic_statistics(*features, False, with_cross, "auto")  # noqa: E731
    timed(benchmark, "cyclic_statistics", call)


@pytest.mark.parametrize("with_cross", [False, True], ids=["equal lambdas", "unequal"])
def test_cyclic_grads(benchmark: Any, size: tuple[int, int], with_cross: bool) -> None:
    """The penalties' gradients from the Gram matrices."""
    features = inputs(*size)[:2]
    statistics = ops.cyclic_statistics(*features, False, with_cross, "auto")
    coefficients = torch.tensor([0.5, 0.25], device=DEVICE)
    flags = (False, with_cross, True, True, "auto")
    call = lambda: ops.cyclic_grads(*features, statistics, coefficients, *flags)  # noqa: E731
    timed(benchmark, "cyclic_grads", call)
