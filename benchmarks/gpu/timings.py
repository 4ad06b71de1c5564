"""How fast: the card's ceilings, each kernel, and the loss compared with its competitors."""

from dataclasses import replace

import torch

from benchmarks.compare.competitors import COMPILED, EAGER, OURS, build, competitors
from benchmarks.compare.cost import LAUNCHES_UP_TO, costs, leaves_of, matrix_rate, step_of
from benchmarks.compare.plan import CUDA
from benchmarks.measure import profiled, wall_seconds
from benchmarks.run import Run

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
        step = step_of(build(OURS).loss, leaves_of(run, n, d, torch.bfloat16))
        for _ in range(3):
            step()
        spent = profiled(step, run.device)
        if not spent:
            run.note("PyTorch's profiler delivered nothing: kernels' times are not known")
        else:
            launches, microseconds = (sum(column) for column in zip(*spent.values(), strict=True))
            run.row(N=n, D=d, kernel="all", launches=launches, ms=microseconds / 1e3)
        for name, (count, own) in sorted(spent.items(), key=lambda x: -x[1][1])[:KERNELS_SHOWN]:
            run.row(N=n, D=d, kernel=name[:60], launches=count, ms=own / 1e3)


def beside_competitors(run: Run) -> None:
    """What `compare` says of costs, in the time there is; compiling takes too long on a CPU."""
    found = competitors(run, *([COMPILED] if run.dry_run else []))
    plan = DRY_RUN if run.dry_run else CUDA
    costs(run, found, plan)
    engines = [c for c in found if c.name in (OURS, EAGER)]  # which of them `impl="auto"` should be
    small = tuple((n, d) for n, d in plan.sizes if n <= LAUNCHES_UP_TO)
    costs(run, engines, replace(plan, dtype=torch.float32, sizes=small))
