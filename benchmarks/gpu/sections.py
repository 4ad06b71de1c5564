"""`python -m benchmarks gpu`: tests, times and candidates on the GPU at hand; all in one record.

Sections are independent: if one fails, the record says so, the others go on, and the exit code is
1. What a section has no time for is in the record. `--dry-run` goes the same way on a CPU,
interpreted: a few tests, and tiny sizes timed by the wall clock.
"""

import argparse
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from benchmarks.compare.competitors import COMPILED, EAGER, OURS, competitors
from benchmarks.compare.cost import LAUNCHES_UP_TO, costs, leaves_of, matrix_rate, step_of
from benchmarks.compare.plan import CUDA
from benchmarks.gpu.ablations import ablations
from benchmarks.gpu.suite import CUDA_TESTS, KERNEL_TESTS, RANK_TESTS, SEVERAL, SLOW_TESTS, suite
from benchmarks.measure import profiled, wall_seconds
from benchmarks.run import RESULTS, Run, carry_out
from cyclip_loss import CyCLIPLoss
from cyclip_loss.kernels.configs import Config
from cyclip_loss.tune import tune

KERNEL_SIZES = ((512, 512), (4096, 512), (65536, 768))
KERNELS_SHOWN = 12
DRY_RUN = replace(CUDA, sizes=((96, 32),), matrix=256, seconds=0.1)


def ceilings(run: Run) -> None:
    """What this very card multiplies and copies."""
    size = (DRY_RUN if run.dry_run else CUDA).matrix
    rate = matrix_rate(run, torch.bfloat16, size)
    run.row(what=f"bfloat16 product, {size} cubed", rate=rate / 1e12, unit="TFLOP/s")
    source = torch.empty(size * size * 8, dtype=torch.uint8, device=run.device)
    target = torch.empty_like(source)
    seconds = wall_seconds(lambda: target.copy_(source), 0.01 if run.dry_run else 2.0)
    what = f"copy of {source.numel() / 1e6:.0f} MB"
    run.row(what=what, rate=2 * source.numel() / seconds / 1e12, unit="TB/s")


def kernels(run: Run) -> None:
    """What one step of the loss launches, and how long each kernel takes."""
    for n, d in DRY_RUN.sizes if run.dry_run else KERNEL_SIZES:
        step = step_of(CyCLIPLoss(), leaves_of(run, n, d, torch.bfloat16))
        for _ in range(3):
            step()
        spent = profiled(step, run.device)
        launches = sum(count for count, _ in spent.values())
        total = sum(own for _, own in spent.values())
        run.row(N=n, D=d, kernel="all", launches=launches, ms=total / 1e3)
        for name, (count, own) in sorted(spent.items(), key=lambda x: -x[1][1])[:KERNELS_SHOWN]:
            run.row(N=n, D=d, kernel=name[:60], launches=count, ms=own / 1e3)


def beside_competitors(run: Run) -> None:
    """What `compare` says of costs, in the time there is; compiling takes too long on a CPU."""
    found = competitors(run.device, *([COMPILED] if run.dry_run else []))
    plan = DRY_RUN if run.dry_run else CUDA
    costs(run, found, plan)
    engines = [c for c in found if c.name in (OURS, EAGER)]  # which of them `impl="auto"` should be
    small = tuple((n, d) for n, d in plan.sizes if n <= LAUNCHES_UP_TO)
    costs(run, engines, replace(plan, dtype=torch.float32, sizes=small))


def sweep(run: Run) -> None:
    """What `cyclip_loss.tune` chooses in bfloat16, as lines for kernels/configs.py."""
    n, d = (96, 128) if run.dry_run else (16384, 768)
    for row in tune(run.device, [torch.bfloat16], n, d, run.remaining()):
        tile, left_out = row.pop("tile"), row.pop("left out")
        run.row(N=n, D=d, **row, **{"line for configs.py": line_of(row["kernel"], tile)})
        for why in left_out:
            run.note(why)


def line_of(key: str, config: Config) -> str:
    """The line of kernels/configs.py that ships a configuration. key: in the file of tiles."""
    kernel, dtype, dot, _ = key.split()
    precision = "HALF" if dtype != "float32" and kernel.startswith("contrastive") else dot.upper()
    tile = {name: size for name, size in config.tile.items() if name != "GROUP"}
    parts = [tile.pop("PARTS")] if "PARTS" in tile else []
    numbers = [*tile.values(), config.num_warps, config.num_stages, *parts]
    maker = {"gram_matrices": "_gram", "cyclic_grads": "_cyclic"}.get(kernel, "_product")
    return f"{precision}: {maker}({', '.join(map(str, numbers))}),"


# Each with its seconds, of TOTAL, where all are run; what they leave is for the last. Those that
# the command names share the whole budget, first come, first served.
TOTAL = 440
SECTIONS: dict[str, tuple[Callable[[Run], None], float]] = {
    "cuda": (partial(suite, CUDA_TESTS, 1), 100),
    "tests": (partial(suite, KERNEL_TESTS, SEVERAL), 75),
    "ceilings": (ceilings, 8),
    "kernels": (kernels, 10),
    "ablations": (ablations, 15),
    "sweep": (sweep, 110),
    "competitors": (beside_competitors, 122),
    "slow": (partial(suite, SLOW_TESTS, SEVERAL), TOTAL),
    "ranks": (partial(suite, RANK_TESTS, 1), TOTAL),
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
