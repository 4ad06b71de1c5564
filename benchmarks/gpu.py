"""`python -m benchmarks gpu`: check and time everything on the GPU at hand, and write a record.

Needs torch, triton, numpy and this checkout. Sections are independent: one that fails is recorded,
the others go on, and the exit code is 1. `--dry-run` goes the same way on CPU, interpreted, with
tiny sizes, and with the wall clock for events.
"""

import argparse
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks import gpu_checks, gpu_timings, gpu_torch, record
from benchmarks.run import Run

SECTIONS: dict[str, Callable[[Run], None]] = {
    "operators": gpu_checks.operators,
    "module": gpu_checks.module,
    "headline size": gpu_checks.headline_size,
    "determinism": gpu_checks.determinism,
    "torch.compile": gpu_torch.compiled,
    "CUDA graph": gpu_torch.cuda_graph,
    "autocast": gpu_torch.autocast,
    "second device": gpu_torch.second_device,
    "recompilation": gpu_torch.recompilation,
    "synchronisation": gpu_torch.synchronisation,
    "ceilings": gpu_timings.ceilings,
    "kernels": gpu_timings.kernels,
    "competitors": gpu_timings.beside_competitors,
}


def main(options: argparse.Namespace) -> int:
    """Run the sections, write the record; 1 if anything failed, 2 if nothing could run."""
    chosen = options.sections or list(SECTIONS)
    unknown = [name for name in chosen if name not in SECTIONS]
    if unknown:
        print(f"no such section: {', '.join(unknown)}; there are {', '.join(SECTIONS)}")
        return 2
    if not options.dry_run and not torch.cuda.is_available():
        print("no CUDA device: `python -m benchmarks gpu --dry-run` runs on CPU, and times nothing")
        return 2
    # The interpreter computes on numpy arrays, whose overflows to infinity are intended.
    warnings.filterwarnings("ignore", category=RuntimeWarning, module=r"triton\.|numpy")
    torch.manual_seed(options.seed)
    run = Run(options.dry_run, options.seed, options.budget)
    kind = "DRY RUN on CPU" if run.dry_run else torch.cuda.get_device_name()
    run.say(f"{kind}: {len(chosen)} sections, {run.budget:.0f} s at most")
    for name in chosen:
        if run.remaining() <= 0:
            with run.part(name):
                run.skip(name, "the budget is spent")
            continue
        with run.part(name):
            SECTIONS[name](run)

    folder = options.out or Path(tempfile.mkdtemp(prefix="cyclip-loss-dry-run-"))
    described = record.describe(run)
    stem = f"{described['card']}-{described['date']}"
    files = record.write(folder, stem, described, record.markdown(described))
    failures = sum(len(section.failures) for section in run.sections.values())
    run.say(f"{failures} failures; record in {' and '.join(map(str, files))}")
    return 1 if failures else 0
