"""`python -m benchmarks gpu`: tests, times and candidates on the GPU at hand; all in one record.

Needs this checkout, torch, triton, numpy, pytest and hypothesis. Sections are independent: one that
fails is recorded, the others go on, and the exit code is 1. What a section has no time for is in
the record. `--dry-run` goes the same way on CPU, interpreted: a few tests, and tiny sizes timed by
the wall clock.
"""

import argparse
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from benchmarks import record
from benchmarks.gpu import ablations, suite, sweep, timings
from benchmarks.run import Run

# Each with its seconds, of TOTAL, where all are run; what they leave is for the tests that come
# last. Those that the command names share the whole budget, first come, first served.
TOTAL = 440
SECTIONS: dict[str, tuple[Callable[[Run], None], float]] = {
    "tests": (partial(suite.suite, suite.FIRST), 100),
    "ceilings": (timings.ceilings, 8),
    "kernels": (timings.kernels, 10),
    "sizes": (timings.sizes, 60),
    "ablations": (ablations.ablations, 40),
    "sweep": (sweep.sweep, 115),
    "competitors": (timings.beside_competitors, 80),
    "more tests": (partial(suite.suite, suite.LATER), TOTAL),
}


def main(options: argparse.Namespace) -> int:
    """Run the sections, write the record; 1 if anything failed, 2 if nothing could run."""
    if not options.dry_run and not torch.cuda.is_available():
        print("no CUDA device: `python -m benchmarks gpu --dry-run` runs on CPU, and times nothing")
        return 2
    # The interpreter computes on numpy arrays, whose overflows to infinity are intended.
    warnings.filterwarnings("ignore", category=RuntimeWarning, module=r"triton\.|numpy")
    torch.manual_seed(options.seed)
    device = torch.device("cpu" if options.dry_run else "cuda")
    run = Run(device, options.seed, options.dry_run)
    for name in options.sections or SECTIONS:
        measure, seconds = SECTIONS[name]
        share = options.budget if options.sections else seconds * options.budget / TOTAL
        run.deadline = min(options.budget, run.elapsed() + share)
        with run.part(name):
            if run.remaining() > 0:
                measure(run)
            else:
                run.note("the budget is spent")
    described = record.describe(run)
    results = Path(tempfile.gettempdir()) if options.dry_run else record.RESULTS
    file = record.write(options.out or results, "gpu", described)
    failures = sum(len(section.failures) for section in run.sections.values())
    run.say(f"{failures} failures; record in {file} and {file.with_suffix('.md')}")
    return 1 if failures else 0
