"""`python -m benchmarks gpu`: tests, times and tile sizes on this machine's GPU, in one record.

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

from benchmarks.compare.competitors import competitors
from benchmarks.compare.cost import add_costs, make_leaves, make_step
from benchmarks.compare.plan import CUDA
from benchmarks.gpu.suite import (
    CUDA_TESTS,
    KERNEL_TESTS,
    PROCESSES,
    RANK_TESTS,
    SLOW_TESTS,
    run_tests,
)
from benchmarks.measure import profiled
from benchmarks.run import Run, run_sections
from cyclip_loss import CyCLIPLoss
from cyclip_loss.tune import tune

KERNEL_SIZES = ((512, 512), (4096, 512), (65536, 768))
KERNELS_SHOWN = 12
DRY_RUN = replace(
    CUDA, sizes=((96, 32),), matrix=256, matrix_seconds=0.01, seconds=0.1, min_rounds=2
)


def kernels(run: Run) -> None:
    """List the kernels that one step of the loss launches, and the time of each kernel."""
    for n, d in DRY_RUN.sizes if run.dry_run else KERNEL_SIZES:
        step = make_step(CyCLIPLoss(), make_leaves(run, n, d, torch.bfloat16))
        for _ in range(3):
            step()
        spent = profiled(step, run.device)
        if not spent:
            run.fail("the profiler has no access to the GPU")
            return
        launches, microseconds = map(sum, zip(*spent.values(), strict=True))
        run.add_row(N=n, D=d, kernel="all", launches=launches, ms=microseconds / 1e3)
        longest = sorted(spent.items(), key=lambda item: -item[1][1])[:KERNELS_SHOWN]
        for name, (count, time) in longest:
            run.add_row(N=n, D=d, kernel=name[:60], launches=count, ms=time / 1e3)


def compare_with_competitors(run: Run) -> None:
    """Measure the costs that `compare` measures, until the time is over."""
    # To compile takes too long for a dry run.
    losses = competitors(run.device)
    if run.dry_run:
        losses = [competitor for competitor in losses if "torch.compile" not in competitor.name]
    add_costs(run, losses, DRY_RUN if run.dry_run else CUDA)


def sweep(run: Run) -> None:
    """Run `cyclip_loss.tune` in bfloat16. The rows have the tiles for kernels/configs.py."""
    n, d = (96, 128) if run.dry_run else (16384, 768)
    for key, shipped_ms, best_ms, tile in tune(run.device, [torch.bfloat16], n, d, run.remaining()):
        times = {"shipped ms": shipped_ms, "best ms": best_ms}
        run.add_row(N=n, D=d, kernel=key, **times, tile=str(tile))


# Each section with its seconds if all sections run with the default budget: the tests first. The
# last section may use all the time that is left. So may each section if the user chooses sections.
TOTAL = 540.0
SECTIONS: dict[str, tuple[Callable[[Run], None], float]] = {
    "cuda": (partial(run_tests, CUDA_TESTS, 1), 100),
    "tests": (partial(run_tests, KERNEL_TESTS, PROCESSES), 75),
    "ranks": (partial(run_tests, RANK_TESTS, 1), 50),
    "slow": (partial(run_tests, SLOW_TESTS, PROCESSES), 60),
    "kernels": (kernels, 12),
    "competitors": (compare_with_competitors, 130),
    "sweep": (sweep, TOTAL),
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
        share = options.budget if options.sections else seconds * options.budget / TOTAL
        run.deadline = min(options.budget, run.elapsed() + share)
        if run.remaining() > 0:
            measure(run)
        else:
            run.note("the budget is spent")

    run = Run(torch.device("cpu" if options.dry_run else "cuda"), options.dry_run)
    run_sections(run, options, {name: partial(measure_in_time, name) for name in chosen})
    return 1 if run.failures() else 0
