"""How fast: the card's ceilings, each kernel, the sizes people train at, and the competitors."""

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.compare.competitors import COMPILED, EAGER, OURS, PARTS, build, competitors
from benchmarks.compare.cost import costs, leaves_of, matrix_rate, step_of
from benchmarks.compare.plan import CUDA
from benchmarks.measure import wall_seconds
from benchmarks.run import Run, outcome_of

KERNEL_SIZES = ((512, 512), (4096, 512), (65536, 768))
KERNELS_SHOWN = 12
NO_PROFILE = "PyTorch's profiler delivered nothing: launches and times of kernels are not known"
BATCHES = tuple((n, 512) for n in (512, 1024, 2048, 4096, 8192))
SECONDS_PER_STEP = 1.5  # compiled, captured and timed


def ceilings(run: Run) -> None:
    """What this very card multiplies and copies."""
    size = 256 if run.dry_run else 8192
    rate = matrix_rate(run, torch.bfloat16, size)
    run.row(what=f"bfloat16 product, {size} cubed", rate=rate / 1e12, unit="TFLOP/s")
    source = torch.empty(size * size * 8, dtype=torch.uint8, device=run.device)
    target = torch.empty_like(source)
    seconds = wall_seconds(lambda: target.copy_(source), 0.01 if run.dry_run else 2.0)
    what = f"copy of {source.numel() / 1e6:.0f} MB"
    run.row(what=what, rate=2 * source.numel() / seconds / 1e12, unit="TB/s")


def kernels(run: Run) -> None:
    """What one step of the loss launches, and how long each kernel takes."""
    for n, d in ((96, 32),) if run.dry_run else KERNEL_SIZES:
        step = step_of(build(OURS).loss, leaves_of(run, n, d, torch.bfloat16))
        for _ in range(3):
            step()
        spent = profiled(run, step)
        if spent:
            launches, microseconds = (sum(column) for column in zip(*spent.values(), strict=True))
            run.row(N=n, D=d, kernel="all", launches=launches, ms=microseconds / 1e3)
        for name, (count, own) in sorted(spent.items(), key=lambda x: -x[1][1])[:KERNELS_SHOWN]:
            run.row(N=n, D=d, kernel=name[:60], launches=count, ms=own / 1e3)


def profiled(run: Run, call: Callable[[], object]) -> dict[str, tuple[int, float]]:
    """By kernel, how often it is launched and its microseconds in all, as the profiler sees it.

    On CPU, where there are no launches: PyTorch's operators. Nothing where it may not look.
    """
    on_cuda = run.device.type == "cuda"
    kind, own = ("CUDA", "self_device_time_total") if on_cuda else ("CPU", "self_cpu_time_total")
    with profile(activities=[getattr(ProfilerActivity, kind)]) as profiler:
        call()
        if on_cuda:
            torch.cuda.synchronize()
    events = [e for e in profiler.key_averages() if e.device_type.name == kind and getattr(e, own)]
    if not events and NO_PROFILE not in run.section.notes:
        run.note(NO_PROFILE)
    return {e.key: (e.count, getattr(e, own)) for e in events}


def sizes(run: Run) -> None:
    """Wall time of a step, its time in a CUDA graph, and its launches.

    At these sizes a step is 20 to 200 microseconds of matrix products, so that the wall time is
    that of Python and launches; the graph's time is what is left without them.
    """
    left_out = (*PARTS, COMPILED) if run.dry_run else PARTS
    found = [c for c in competitors(run.device)[0] if c.name not in left_out]
    batches = ((64, 32),) if run.dry_run else BATCHES
    for dtype, (n, d) in product((torch.bfloat16, torch.float32), batches):
        leaves = leaves_of(run, n, d, dtype)
        for competitor in found:
            if dtype == torch.float32 and competitor.name not in (OURS, EAGER):
                continue  # which of them `impl="auto"` should be
            if run.remaining() < SECONDS_PER_STEP:
                run.note(f"{competitor.name}, N = {n}, D = {d} left out: no time")
                continue
            with run.attempt(N=n, D=d, dtype=str(dtype), loss=competitor.name) as row:
                wall_and_graph(run, step_of(competitor.loss, leaves), row)


def wall_and_graph(run: Run, step: Callable[[], object], row: dict[str, Any]) -> None:
    """Columns of one step: one after another as in training, launches, in a CUDA graph."""
    for _ in range(3):
        step()
    row["wall ms"] = 1e3 * wall_seconds(step, 0.01 if run.dry_run else 0.2)
    if spent := profiled(run, step):
        row["launches"] = sum(count for count, _ in spent.values())
    if run.device.type == "cuda":
        from triton.testing import do_bench_cudagraph

        try:
            row["graph ms"] = do_bench_cudagraph(step, rep=5, return_mode="median")
        except Exception as error:  # not every library can be captured
            row["outcome"] = f"no graph: {outcome_of(error)}"


def beside_competitors(run: Run) -> None:
    """What `compare` says of costs, in the time there is."""
    found, reasons = competitors(run.device)
    for reason in reasons:
        run.note(reason)
    plan = CUDA
    if run.dry_run:  # on CPU the compilation takes longer than all else
        found = [c for c in found if c.name != COMPILED]
        plan = replace(CUDA, sizes=((96, 32),), matrix=256, seconds=0.1)
    costs(run, found, plan)
