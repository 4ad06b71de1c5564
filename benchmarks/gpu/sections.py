"""`python -m benchmarks gpu`: tests and times on this machine's GPU, in one record.

Sections are independent. If a section fails, the record says so, the other sections still run, and
the exit code is 1. The record also says what a section had no time for. `--dry-run` runs the
sections on a CPU, with few tests and tiny sizes. Triton's interpreter runs the kernels there.
"""

import argparse
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.compare.competitors import COMPETITORS, competitors
from benchmarks.compare.cost import add_costs, checked_step, make_leaves
from benchmarks.compare.plan import CUDA
from benchmarks.gpu.suite import (
    CUDA_TESTS,
    KERNEL_TESTS,
    PROCESSES,
    RANK_TESTS,
    SLOW_TESTS,
    run_tests,
)
from benchmarks.run import Run, run_sections

KERNEL_SIZES = ((512, 512), (4096, 512), (65536, 768))
KERNELS_SHOWN = 12
SECONDS_ALONE = 540.0  # of each section, if the user chooses sections
DRY_RUN = replace(CUDA, sizes=((96, 32),), seconds=0.03, min_rounds=2)


def kernels(run: Run) -> None:
    """Show which kernels one step of the loss launches, and how long each takes."""
    kind = "cpu" if run.dry_run else "cuda"
    for n, d in DRY_RUN.sizes if run.dry_run else KERNEL_SIZES:
        leaves = make_leaves(run, n, d, "bfloat16")
        step, _ = checked_step(COMPETITORS[0], run, leaves, "bfloat16")
        for _ in range(3):
            step()
        with profile(activities=[getattr(ProfilerActivity, kind.upper())]) as profiler:
            step()
        spent = profiler.key_averages().table(
            sort_by=f"self_{kind}_time_total", row_limit=KERNELS_SHOWN
        )
        run.note(f"N = {n:,}, D = {d:,}\n{spent}")


def compare_with_competitors(run: Run) -> None:
    """Measure the costs that `compare` measures, until the time is over."""
    # To compile takes too long for a dry run.
    losses = [c for c in competitors() if not run.dry_run or "torch.compile" not in c.name]
    add_costs(run, losses, DRY_RUN if run.dry_run else CUDA)


# Each section with its seconds, if all sections run: the tests first.
SECTIONS: dict[str, tuple[Callable[[Run], None], float]] = {
    "cuda": (partial(run_tests, CUDA_TESTS, 1), 100),
    "tests": (partial(run_tests, KERNEL_TESTS, PROCESSES), 75),
    "ranks": (partial(run_tests, RANK_TESTS, 1), 50),
    "slow": (partial(run_tests, SLOW_TESTS, PROCESSES), 60),
    "kernels": (kernels, 12),
    "competitors": (compare_with_competitors, 240),
}


def main(options: argparse.Namespace) -> int:
    """Run the sections and write the record. Returns 1 after a failure, 2 if nothing could run."""
    if not options.dry_run and not torch.cuda.is_available():
        print("no CUDA device: `python -m benchmarks gpu --dry-run` runs here, without real times")
        return 2
    chosen = options.sections or list(SECTIONS)
    if unknown := [name for name in chosen if name not in SECTIONS]:
        print(f"--sections {' '.join(unknown)}: choose from {', '.join(SECTIONS)}")
        return 2
    # Triton's interpreter computes with NumPy, which warns of overflows that the kernels intend.
    warnings.filterwarnings("ignore", category=RuntimeWarning, module=r"triton\.|numpy")

    def measure_in_time(name: str, run: Run) -> None:
        measure, seconds = SECTIONS[name]
        run.deadline = run.elapsed() + (SECONDS_ALONE if options.sections else seconds)
        measure(run)

    run = Run(torch.device("cpu" if options.dry_run else "cuda"), options.dry_run)
    run_sections(run, options, {name: partial(measure_in_time, name) for name in chosen})
    return 1 if run.failures else 0
