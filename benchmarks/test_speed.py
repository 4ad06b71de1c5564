"""One version against another on a CPU, by pytest-benchmark; the README says how."""

from typing import Any

import pytest
import torch

from benchmarks.compare.cost import leaves_of, step_of
from benchmarks.run import Run
from cyclip_loss import CyCLIPLoss


@pytest.mark.parametrize("n", [8, 512, 2048])
def test_loss(benchmark: Any, n: int) -> None:
    """Forward and backward; at N = 8 only the calls cost."""
    leaves = leaves_of(Run(torch.device("cpu")), n, 512, torch.float32)
    benchmark(step_of(CyCLIPLoss(reference_batch_size=128), leaves))
