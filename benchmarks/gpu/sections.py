"""`python -m benchmarks gpu`: tests, times and candidates on the GPU at hand; all in one record.

Needs this checkout, torch, triton, numpy, pytest, pytest-xdist and hypothesis. Sections are
independent: if one fails, the record says so, the others go on, and the exit code is 1. What a
section has no time for is in the record. `--dry-run` goes the same way on a CPU, interpreted: a few
tests, and tiny sizes timed by the wall clock.
"""

import argparse
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from benchmarks.gpu import ablations, suite, sweep, timings
from benchmarks.record import RESULTS, carry_out
from benchmarks.run import Run

# Each with its seconds, of TOTAL, where all are run; what they leave is for the last. Those that
# the command names share the whole budget, first come, first served.
TOTAL = 440
SECTIONS: dict[str, tuple[Callable[[Run], None], float]] = {
    "cuda": (partial(suite.suite, suite.CUDA, 1), 100),
    "tests": (partial(suite.suite, suite.KERNELS, suite.SEVERAL), 75),
    "ceilings": (timings.ceilings, 8),
    "kernels": (timings.kernels, 10),
    "ablations": (ablations.ablations, 15),
    "sweep": (sweep.sweep, 110),
    "competitors": (timings.beside_competitors, 122),
    "slow": (partial(suite.suite, suite.SLOW, suite.SEVERAL), TOTAL),
    "ranks": (partial(suite.suite, suite.RANKS, 1), TOTAL),
}


def main(options: argparse.Namespace) -> int:
    """Run the sections, write the record; 1 if anything failed, 2 if nothing could run."""
    if not options.dry_run and not torch.cuda.is_available():
        print("no CUDA device: `python -m benchmarks gpu --dry-run` runs on CPU, and times nothing")
        return 2
    chosen = options.sections or list(SECTIONS)
    if unknown := [name for name in chosen if name not in SECTIONS]:
        print(f"--sections {' '.join(unknown)}: choose from {', '.join(SECTIONS)}")
        return 2
    # The interpreter computes on numpy arrays, whose overflows to infinity are intended.
    warnings.filterwarnings("ignore", category=RuntimeWarning, module=r"triton\.|numpy")

    def in_time(name: str, run: Run) -> None:
        measure, seconds = SECTIONS[name]
        share = options.budget if options.sections else seconds * options.budget / TOTAL
        run.deadline = min(options.budget, run.elapsed() + share)
        if run.remaining() > 0:
            measure(run)
        else:
            run.note("the budget is spent")

    run = Run(torch.device("cpu" if options.dry_run else "cuda"), options.dry_run)
    folder = options.out or (Path(tempfile.gettempdir()) if options.dry_run else RESULTS)
    carry_out(run, "gpu", {name: partial(in_time, name) for name in chosen}, folder)
    return 1 if run.failures() else 0
