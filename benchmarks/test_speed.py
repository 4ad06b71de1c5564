"""Times every competitor with pytest-benchmark: `pytest benchmarks --benchmark-only`.

README.md says how to compare two versions of the library. The record of `python -m benchmarks` is
more exact: its runs are interleaved.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks.compare.competitors import OURS, Competitor, competitors
from benchmarks.compare.cost import RATIO, checked_step, make_leaves
from benchmarks.compare.plan import CPU, CUDA
from benchmarks.measure import allocated_peak
from benchmarks.run import Run

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PLAN = CUDA if DEVICE.type == "cuda" else CPU
SIZES = ((128, 512), (512, 512), (2048, 512))
our_medians: dict[int, float] = {}  # N -> the median of CyCLIPLoss, if it was timed


@pytest.mark.parametrize(("n", "d"), SIZES, ids=[f"N{n}" for n, _ in SIZES])
@pytest.mark.parametrize("competitor", competitors(DEVICE), ids=lambda competitor: competitor.name)
def test_forward_and_backward(benchmark: Any, competitor: Competitor, n: int, d: int) -> None:
    """One step. Its value and gradients are compared with the definition first."""
    run = Run(DEVICE)
    try:
        step = checked_step(competitor, run, make_leaves(run, n, d, PLAN.dtype))
    except ModuleNotFoundError as error:  # another library
        pytest.skip(str(error))
    benchmark.group = f"N = {n}, D = {d}"
    benchmark.extra_info["peak MB"] = allocated_peak(DEVICE, step) / 1e6
    benchmark(synchronised(step))
    if benchmark.stats:  # None with --benchmark-disable
        median = benchmark.stats.stats.median
        if competitor.name == OURS:
            our_medians[n] = median
        if n in our_medians:
            benchmark.extra_info[RATIO] = median / our_medians[n]


def synchronised(step: Callable[[], object]) -> Callable[[], None]:
    """A step that waits for the GPU."""

    def call() -> None:
        step()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    return call
