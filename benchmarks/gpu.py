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
from importlib import metadata
from pathlib import Path

import torch

from benchmarks import gpu_ablations, gpu_sizes, gpu_sweep, gpu_tests, gpu_timings, record
from benchmarks.run import Run
from cyclip_loss.ops import triton_version

# Each with its seconds, of TOTAL, where all are run; what they leave is for the tests that come
# last. Those that the command names share the whole budget, first come, first served.
TOTAL = 440
SECTIONS: dict[str, tuple[Callable[[Run], None], float]] = {
    "tests": (gpu_tests.first, 100),
    "ceilings": (gpu_timings.ceilings, 8),
    "kernels": (gpu_timings.kernels, 10),
    "sizes": (gpu_sizes.sizes, 60),
    "ablations": (gpu_ablations.ablations, 40),
    "sweep": (gpu_sweep.sweep, 115),
    "competitors": (gpu_timings.beside_competitors, 80),
    "more tests": (gpu_tests.later, TOTAL),
}


def interpreter_lacks(numpy: str, triton: tuple[int, int]) -> str | None:
    """Why the kernels cannot be interpreted with these versions; None if they can."""
    if triton < (3, 7) and tuple(map(int, numpy.split(".")[:2])) >= (2, 4):
        return (
            f"Triton {triton[0]}.{triton[1]}'s interpreter needs numpy < 2.4, and this is {numpy}: "
            'pip install "numpy<2.4", or a newer Triton. Only the dry run interprets.'
        )
    return None


def main(options: argparse.Namespace) -> int:
    """Run the sections, write the record; 1 if anything failed, 2 if nothing could run."""
    if not options.dry_run and not torch.cuda.is_available():
        print("no CUDA device: `python -m benchmarks gpu --dry-run` runs on CPU, and times nothing")
        return 2
    if options.dry_run and (why := interpreter_lacks(metadata.version("numpy"), triton_version())):
        print(why)
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
                measure, seconds = SECTIONS[name]
                if not options.sections:
                    share = seconds * options.budget / TOTAL
                    run.budget = min(options.budget, run.elapsed() + share)
                measure(run)
            else:
                run.skip(name, "the budget is spent")
        run.budget = options.budget

    folder = options.out or Path(tempfile.mkdtemp(prefix="cyclip-loss-dry-run-"))
    described = record.describe(run)
    stem = f"{described['card']}-{described['date']}"
    files = record.write(folder, stem, described, record.markdown(described))
    failures = sum(len(section.failures) for section in run.sections.values())
    run.say(f"{failures} failures; record in {' and '.join(map(str, files))}")
    return 1 if failures else 0
