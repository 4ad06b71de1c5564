"""What one loss costs: time of forward and backward, and peak memory."""

import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context

import torch
from torch import Tensor

from benchmarks import measure
from benchmarks.compare.competitors import COMPETITORS, LARGE, OURS, TERM, TEXTS, Competitor, Loss
from benchmarks.compare.plan import Plan
from benchmarks.run import OUT_OF_MEMORY, Row, Run, outcome_of

WARM_UP_ROWS = 96
MOST_RUNS = 300
# The largest N at which also parts of the loss run, and more than the loss; at which launches,
# rather than products, may take the time of a GPU.
ALL_UP_TO, LAUNCHES_UP_TO = 16384, 8192
LOGIT_SCALE = 14.3  # CLIP's at the start


def costs(run: Run, found: list[Competitor], plan: Plan) -> None:
    """Rows of time and memory, size by size, for as long as there is time."""
    rate = matrix_rate(run, plan.dtype, plan.matrix)
    for n, d in plan.sizes:
        if run.remaining() < 3 * plan.seconds:
            run.note(f"N = {n:,}, D = {d:,} left out: no time")
            continue
        run.say(f"N = {n:,}, D = {d:,}")
        chosen = [c for c in found if n <= ALL_UP_TO or c.name in LARGE]
        try:
            if n <= plan.timed_up_to:
                rows = measure_all(run, chosen, n, d, plan)
            else:
                rows = [measure_once(c.name, n, d, plan) for c in chosen]
                run.section.rows += rows
            add_ratios(rows, rate)
        except Exception as error:  # the other sizes go on
            run.fail(f"N = {n:,}, D = {d:,}: {outcome_of(error)}")


def leaves_of(run: Run, n: int, d: int, dtype: torch.dtype) -> list[Tensor]:
    """Random features (n, d) and the logit scale, all to be differentiated."""
    scale = torch.tensor(LOGIT_SCALE, device=run.device)
    return [tensor.requires_grad_() for tensor in (*run.pairs(n, d, dtype), scale)]


def step_of(loss: Loss, leaves: list[Tensor]) -> Callable[[], object]:
    """One loss and its gradients, where it has some."""
    return lambda: torch.autograd.grad(loss(*leaves), leaves, allow_unused=True)


def measure_all(run: Run, found: list[Competitor], n: int, d: int, plan: Plan) -> list[Row]:
    """A row for each competitor, also added to the section: its peak, and interleaved runs."""
    rows: dict[str, Row] = {}
    steps: dict[str, Callable[[], object]] = {}
    dtype = {"dtype": str(plan.dtype).removeprefix("torch.")}
    few, leaves = leaves_of(run, WARM_UP_ROWS, d, plan.dtype), leaves_of(run, n, d, plan.dtype)
    for competitor in found:
        with run.attempt(N=n, D=d, **dtype, loss=competitor.name, lacks=competitor.lacks) as row:
            step_of(competitor.loss, few)()  # what libraries load, compile and allocate once
            step = step_of(competitor.loss, leaves)
            row["peak MB"] = measure.allocated_peak(run.device, step) / 1e6
            if n <= LAUNCHES_UP_TO and (run.dry_run or run.device.type == "cuda"):
                row |= measure.launches_of(step, run.device)
            steps[competitor.name] = step
        rows[competitor.name] = row
    runs = measure.interleaved(steps, run.device, plan.seconds, plan.least, MOST_RUNS)
    for name, times in runs.items():
        rows[name] |= measure.columns(times)
    return list(rows.values())


def measure_once(name: str, n: int, d: int, plan: Plan) -> Row:
    """A row of one run on the CPU, in a process of its own: it may run out of memory."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        try:
            return pool.submit(_limited, name, n, d, plan).result()
        except BrokenProcessPool:  # the system's last resort, or an allocation nobody catches
            return {"N": n, "D": d, "loss": name, "outcome": OUT_OF_MEMORY}


def _limited(name: str, n: int, d: int, plan: Plan) -> Row:
    run, limit = Run(torch.device("cpu")), None
    (competitor,) = (c for c in COMPETITORS if c.name == name)
    with run.attempt(N=n, D=d, loss=name, lacks=competitor.lacks) as row:
        step = step_of(competitor.loss, leaves_of(run, WARM_UP_ROWS, d, plan.dtype))
        measure.allocated_peak(run.device, step)  # imports are not what is limited
        limit = measure.limit_to_available()
        step = step_of(competitor.loss, leaves_of(run, n, d, plan.dtype))
        begun = time.perf_counter()
        row["peak MB"] = measure.allocated_peak(run.device, step) / 1e6
        row |= measure.columns([1e3 * (time.perf_counter() - begun)])
    if row["outcome"] == OUT_OF_MEMORY and limit is not None:
        row["outcome"] += f" (had {limit / 1e9:.1f} GB)"
    return row


def add_ratios(rows: list[Row], rate: float) -> None:
    """To each row its time over ours, and that of its flops at `rate` over its time.

    8 N^2 D is what a contrastive loss takes that keeps no matrix (dense autograd: 6 N^2 D), twice
    that with N extra texts; the penalties alone have no such product.
    """
    ours = next((row["ms"] for row in rows if row["loss"] == OURS and "ms" in row), None)
    for row in (row for row in rows if "ms" in row):
        if ours is not None:
            row["times ours"] = row["ms"] / ours
        if row["lacks"] != TERM:
            flops = 8 * row["N"] ** 2 * row["D"] * (1 + (TEXTS in row["loss"]))
            row["of matrix rate"] = flops / rate / (1e-3 * row["ms"])


def matrix_rate(run: Run, dtype: torch.dtype, size: int) -> float:
    """Flops per second of a library product of square matrices."""
    a = torch.randn(size, size, device=run.device).to(dtype)
    return 2 * size**3 / measure.wall_seconds(lambda: torch.mm(a, a), 0.01 if run.dry_run else 2.0)
