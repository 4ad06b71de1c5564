"""Times the loss on a CPU with pytest-benchmark. README.md says how to compare two versions."""

from typing import Any

import pytest
import torch

from benchmarks.compare.cost import make_leaves, make_step
from benchmarks.run import Run
from cyclip_loss import CyCLIPLoss


@pytest.mark.parametrize("n", [8, 512, 2048])
def test_loss(benchmark: Any, n: int) -> None:
    """Forward and backward. At N = 8, Python and PyTorch's calls take nearly all the time."""
    leaves = make_leaves(Run(torch.device("cpu")), n, 512, torch.float32)
    benchmark(make_step(CyCLIPLoss(reference_batch_size=128), leaves))
