"""One version against another: `pytest benchmarks/operators --benchmark-only`; see README.md.

The loss, and each of the four functions of the engine that the package chooses for the device.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks.compare.cost import leaves_of, step_of
from benchmarks.run import Run
from cyclip_loss import CyCLIPLoss
from cyclip_loss.ops import engine

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SIZES = ((512, 512), (2048, 512)) if DEVICE.type == "cpu" else ((8192, 512), (32768, 768))
DTYPE = torch.float32 if DEVICE.type == "cpu" else torch.bfloat16


def to_the_end(call: Callable[[], object]) -> None:
    """A call, and what the device does for it."""
    call()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


@pytest.mark.parametrize("size", [(8, 8), *SIZES], ids=str)
def test_loss(benchmark: Any, size: tuple[int, int]) -> None:
    """Forward and backward; at N = 8, D = 8 only the calls cost."""
    benchmark(to_the_end, step_of(CyCLIPLoss(), leaves_of(Run(DEVICE), *size, DTYPE)))


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(
    "name", ["contrastive_lse", "contrastive_grads", "cyclic_statistics", "cyclic_grads"]
)
@torch.no_grad()
def test_engine(benchmark: Any, name: str, size: tuple[int, int]) -> None:
    """Each function alone, for equal lambdas, with all gradients."""
    image, text = Run(DEVICE).pairs(*size, DTYPE)
    scale, grad = torch.tensor(14.3, device=DEVICE), torch.ones((), device=DEVICE)
    functions, weight = engine("auto", image), 0.5 / size[0]
    sums = functions.contrastive_lse(image, text, scale, 0, True)  # of the right shapes
    grams = functions.cyclic_statistics(image, text, False)
    arguments = {
        "contrastive_lse": (scale, 0, True),
        "contrastive_grads": (scale, *sums, grad, weight, 0, True, [True] * 3, False),
        "cyclic_statistics": (False,),
        "cyclic_grads": (grams, [grad], [grad, grad], 1, [True] * 2),
    }[name]
    benchmark(to_the_end, lambda: getattr(functions, name)(image, text, *arguments))
