"""`python -m benchmarks gpu`: the test suite on the GPU at hand, then times; both in one record.

Needs this checkout, torch, triton, numpy, pytest and hypothesis. Sections are independent: one that
fails is recorded, the others go on, and the exit code is 1. `--dry-run` goes the same way on CPU,
interpreted: a few tests, and tiny sizes timed by the wall clock.
"""

import argparse
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks import gpu_tests, gpu_timings, record
from benchmarks.run import Run

SECTIONS: dict[str, Callable[[Run], None]] = {
    "tests": gpu_tests.suite,
    "ceilings": gpu_timings.ceilings,
    "kernels": gpu_timings.kernels,
    "competitors": gpu_timings.beside_competitors,
}


def main(options: argparse.Namespace) -> int:
    """Run the sections, write the record; 1 if anything failed, 2 if nothing could run."""
    if not options.dry_run and not torch.cuda.is_available():
        print("no CUDA device: `python -m benchmarks gpu --dry-run` runs on CPU, and times nothing")
        return 2
    # The interpreter computes on numpy arrays, whose overflows to infinity are intended.
    warnings.filterwarnings("ignore", category=RuntimeWarning, module=r"triton\.|numpy")
    torch.manual_seed(options.seed)
    run = Run(options.dry_run, options.seed, options.budget)
    chosen = options.sections or SECTIONS
    kind = "DRY RUN on CPU" if run.dry_run else torch.cuda.get_device_name()
    run.say(f"{kind}: {', '.join(chosen)}, {run.budget:.0f} s at most")
    for name in chosen:
        with run.part(name):
            if run.remaining() > 0:
                SECTIONS[name](run)
            else:
                run.skip(name, "the budget is spent")

    folder = options.out or Path(tempfile.mkdtemp(prefix="cyclip-loss-dry-run-"))
    described = record.describe(run)
    stem = f"{described['card']}-{described['date']}"
    files = record.write(folder, stem, described, record.markdown(described))
    failures = sum(len(section.failures) for section in run.sections.values())
    run.say(f"{failures} failures; record in {' and '.join(map(str, files))}")
    return 1 if failures else 0
