"""One version against another on a CPU, by pytest-benchmark; README.md says how."""

from typing import Any

import pytest
import torch

from benchmarks.compare.cost import make_leaves, make_step
from benchmarks.run import Run
from cyclip_loss import CyCLIPLoss


@pytest.mark.parametrize("n", [8, 512, 2048])
def test_loss(benchmark: Any, n: int) -> None:
    """Forward and backward; at N = 8 the calls take nearly all the time."""
    leaves = make_leaves(Run(torch.device("cpu")), n, 512, torch.float32)
    benchmark(make_step(CyCLIPLoss(reference_batch_size=128), leaves))
