"""How fast and how much memory: the loss beside its competitors, and kernel by kernel."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.competitors import BUILDERS, COMPILED, Competitor, competitors, ours
from benchmarks.cost import (
    Attempt,
    add_fraction_of_rate,
    attempt,
    leaves_of,
    matrix_rate,
    measure,
    step_of,
    warm_up,
)
from benchmarks.run import Run
from benchmarks.timing import interleaved

# N, D: first what is most asked for; of the last two, only what needs no N x N matrix.
SIZES = ((4096, 512), (65536, 768), (16384, 1024), (32768, 768), (131072, 768), (262144, 768))
KERNEL_SIZES = ((512, 512), (4096, 512), (65536, 768))
DRY_RUN_SIZES = ((96, 32),)
FLOOR = "floor: 8 N^2 D flops at the measured matrix rate"
PUBLISHED_SIZE = (65536, 768)
# From the README of that version: forward and backward on a GH200 or H100, bfloat16.
PUBLISHED = {
    "loss": "siglip-kernel 0.1.2 on a Hopper GPU, published",
    "lacks": "softmax, penalties",
    "ms": 48.8,
    "peak MB": 1400.0,
}
DENSE_LIMIT = 65536
SECONDS_PER_SIZE = 6.0
KERNELS_SHOWN = 12


def ceilings(run: Run) -> None:
    """What this very card multiplies and copies."""
    size = 256 if run.dry_run else 8192
    rate = matrix_rate(run, torch.bfloat16, size)
    run.row(what=f"bfloat16 product, {size} cubed", rate=rate / 1e12, unit="TFLOP/s")
    source = torch.empty(size * size * 8, dtype=torch.uint8, device=run.device)
    target = torch.empty_like(source)

    def copy(end: Callable[[], None]) -> None:
        target.copy_(source)
        end()

    for _ in range(5):
        copy(lambda: None)
    best = min(spent for (spent,) in interleaved({"copy": copy}, run.device, 2.0)["copy"])
    bandwidth = 2 * source.numel() / best / 1e9
    run.row(what=f"copy of {source.numel() / 1e6:.0f} MB", rate=bandwidth, unit="TB/s")


def beside_competitors(run: Run) -> None:
    """Forward and backward of the whole loss, and its peak memory, over N and D."""
    found, reasons = competitors(run.device)
    for name, reason in reasons.items():
        run.skip(name, reason)
    rate = matrix_rate(run, torch.bfloat16, 256 if run.dry_run else 8192)
    for n, d in DRY_RUN_SIZES if run.dry_run else SIZES:
        candidates = [c for c in found if n <= DENSE_LIMIT or c.name == ours(run.device)]
        if run.dry_run:  # on CPU the compilation takes longer than all else
            candidates = [c for c in candidates if c.name != COMPILED]
        if run.remaining() < 3 * SECONDS_PER_SIZE:
            run.skip(f"N = {n}, D = {d}", "it would exceed the budget")
            continue
        run.say(f"N = {n:,}, D = {d}: {', '.join(c.name for c in candidates)}")

        def try_first(competitor: Competitor, n: int = n, d: int = d) -> Attempt:
            warm_up(run, competitor.loss, d, torch.bfloat16)
            return attempt(run, competitor.loss, leaves_of(run, n, d, torch.bfloat16))

        seconds, least = (0.5, 1) if run.dry_run else (SECONDS_PER_SIZE, 3)
        rows = measure(run, candidates, n, d, torch.bfloat16, try_first, seconds, least, most=30)
        add_fraction_of_rate(rows, rate)
        run.section.rows += rows
        floor = {"loss": FLOOR, "ms": 8e3 * n**2 * d / rate}
        for row in (floor, PUBLISHED) if (n, d) == PUBLISHED_SIZE else (floor,):
            run.row(N=n, D=d, **row)
            add_times_ours(run.section.rows[-1], rows, run.device)


def add_times_ours(row: dict[str, Any], rows: list[dict[str, Any]], device: torch.device) -> None:
    """To a row that was not measured here: how many times what our loss took."""
    for other in rows:
        if other["loss"] == ours(device) and "ms" in other:
            row["times ours"] = row["ms"] / other["ms"]


def profiled(call: Callable[[], object], device: torch.device) -> dict[str, tuple[int, float]]:
    """By kernel, how often it is launched and its microseconds in all, as the profiler sees it.

    On CPU, where there are no launches: PyTorch's operators.
    """
    on_cuda = device.type == "cuda"
    with profile(
        activities=[ProfilerActivity.CUDA if on_cuda else ProfilerActivity.CPU]
    ) as profiler:
        call()
        if on_cuda:
            torch.cuda.synchronize()
    own = "self_device_time_total" if on_cuda else "self_cpu_time_total"
    averages = profiler.key_averages()
    return {e.key: (e.count, getattr(e, own)) for e in averages if getattr(e, own) > 0}


def kernels(run: Run) -> None:
    """What one step of the loss launches, and how long each kernel takes."""
    loss = BUILDERS[ours(run.device)](run.device).loss
    for n, d in DRY_RUN_SIZES if run.dry_run else KERNEL_SIZES:
        step = step_of(loss, leaves_of(run, n, d, torch.bfloat16))
        for _ in range(3):
            step(lambda: None)
        spent = profiled(partial(step, lambda: None), run.device)
        times = sorted(spent.items(), key=lambda item: -item[1][1])
        total = sum(microseconds for _, microseconds in spent.values())
        launches = sum(count for count, _ in spent.values())
        run.row(N=n, D=d, kernel="all", launches=launches, ms=total / 1e3)
        for name, (count, microseconds) in times[:KERNELS_SHOWN]:
            run.row(N=n, D=d, kernel=name[:60], launches=count, ms=microseconds / 1e3)
