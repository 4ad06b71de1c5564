"""How the benchmarks measure time and memory, and format tables."""

import sys
from pathlib import Path

import pytest
import torch
from processes import run_python

from benchmarks import measure
from benchmarks.measure import time_columns
from benchmarks.run import table

CPU = torch.device("cpu")


def test_peak_counts_memory_until_it_is_freed() -> None:
    """One of three matrices is freed before a fourth one is allocated."""

    def work() -> tuple[torch.Tensor, ...]:
        a, b = torch.ones(1000, 100), torch.ones(1000, 100)
        c = a + b
        del a
        return b, c, torch.ones(1000, 100)

    assert measure.allocated_peak(CPU, work) == 3 * 400_000


MEASURE_WITH_LIMIT = """
import pathlib, sys, torch
from dataclasses import replace
from benchmarks import measure
from benchmarks.compare import cost
from benchmarks.compare.competitors import AUTHORS, COMPETITORS
from benchmarks.compare.plan import CPU
from benchmarks.run import Run
losses = [loss for loss in COMPETITORS if loss.name == AUTHORS]
run = Run(torch.device("cpu"))
plan = replace(CPU, seconds=0.0, timed_up_to=0)
arguments = (run, losses, 2000, 8, "float32", plan)
(row,) = cost.measure_in_turn(*arguments)
assert (row["outcome"], 5 * 16 < row["peak MB"] < 16 * 16) == ("ok", True), row
measure.CONTAINER = pathlib.Path(sys.argv[1])
limit, usage = (measure.CONTAINER / name for name in ("memory.max", "memory.current"))
limit.write_text(str(measure.RESERVED_BYTES + 10**9))
usage.write_text(str(10**9 - 10**7))
assert measure.limit_to_available() == 10**7
(row,) = cost.measure_in_turn(*arguments)
assert row["outcome"] == "out of memory" and "ms" not in row, row
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_loss_that_needs_more_than_the_available_memory_is_out_of_memory(tmp_path: Path) -> None:
    """The formula's matrices, about twelve of 16 MB, do not fit in 10 MB."""
    done = run_python("-c", MEASURE_WITH_LIMIT, str(tmp_path))
    assert done.returncode == 0, done.stderr


def test_time_columns_have_the_median_and_the_percentiles() -> None:
    assert time_columns([2.0]) == {"runs": 1, "ms": 2}
    assert time_columns([*range(11)]) == {"runs": 11, "ms": 5, "p20": 2, "p80": 8}


def test_table_shows_three_digits_and_leaves_missing_cells_empty() -> None:
    row = {"|n|": 12345, "ms": 1234.56, "share": 0.012345, "0": 0.0, "large": 1e9, "small": 1e-4}
    expected = "| \\|n\\| | ms | share | 0 | large | small | x |\n|---|---|---|---|---|---|---|\n"
    expected += "| 12,345 | 1,230 | 0.0123 | 0 | 1e+09 | 0.0001 |  |\n|  |  |  |  |  |  | a\\|b |"
    assert table([row, {"x": "a|b"}]) == expected
