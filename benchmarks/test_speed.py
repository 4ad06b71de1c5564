"""Times every competitor with pytest-benchmark: `pytest benchmarks --benchmark-only`.

README.md says how to compare two versions of the library. The record of `python -m benchmarks` is
more exact: its runs are interleaved.
"""

from typing import Any

import pytest
import torch

from benchmarks.compare.competitors import Competitor, competitors
from benchmarks.compare.cost import checked_step, make_leaves
from benchmarks.compare.plan import CPU, CUDA
from benchmarks.measure import milliseconds
from benchmarks.run import Run

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
(DTYPE,) = (CUDA if DEVICE.type == "cuda" else CPU).dtypes
D = 512


@pytest.mark.parametrize("n", [128, 512, 2048], ids="N{}".format)
@pytest.mark.parametrize("competitor", competitors(), ids=lambda competitor: competitor.name)
def test_forward_and_backward(benchmark: Any, competitor: Competitor, n: int) -> None:
    """One step. Its value and gradients are compared with the definition first."""
    run = Run(DEVICE)
    try:
        step, _ = checked_step(competitor, run, make_leaves(run, n, D, DTYPE), DTYPE)
    except ModuleNotFoundError as error:  # another library
        pytest.skip(str(error))
    benchmark.group = f"N = {n}, D = {D}"
    benchmark(milliseconds, step, DEVICE)  # it waits for the GPU
