"""The cost of a loss: time of the forward and backward pass, and peak memory."""

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context

import torch
from torch import Tensor

from benchmarks import measure
from benchmarks.compare.accuracy import assert_same_values
from benchmarks.compare.competitors import (
    COMPETITORS,
    EXTRA_TEXTS,
    OURS,
    PENALTIES,
    SIGLIP,
    Competitor,
    Loss,
)
from benchmarks.compare.plan import LOGIT_SCALE, Plan
from benchmarks.run import OUT_OF_MEMORY, Row, Run, describe

RATIO = f"ratio to {OURS}"
SMALL_BATCH = 128  # values are compared in a batch of this size


def add_costs(run: Run, losses: list[Competitor], plan: Plan) -> None:
    """Add rows of time and memory for one size after another, until the time is over."""
    rate = matmul_rate(run, plan)
    run.note(f"torch.mm, {plan.matrix} cubed: {rate / 1e12:.3g} TFLOP/s")
    for n, d in plan.sizes:
        if run.remaining() < 3 * plan.seconds:
            run.note(f"N = {n:,}, D = {d:,} left out: no time")
            continue
        run.say(f"N = {n:,}, D = {d:,}")
        chosen = [c for c in losses if n <= c.up_to]
        try:
            if n <= plan.timed_up_to or run.device.type != "cpu":
                rows = measure_in_rounds(run, chosen, n, d, plan)
            else:
                rows = [measure_once(c.name, n, d, plan) for c in chosen]
                run.section.rows += rows
            add_ratios(rows, rate)
        except Exception as error:  # go on with the other sizes
            run.fail(f"N = {n:,}, D = {d:,}: {describe(error)}")


def make_leaves(run: Run, n: int, d: int, dtype: torch.dtype) -> list[Tensor]:
    """Random image and text features (n, d) and the logit scale, all requiring gradients."""
    scale = torch.tensor(LOGIT_SCALE, device=run.device)
    return [tensor.requires_grad_() for tensor in (*run.pairs(n, d, dtype), scale)]


def make_step(loss: Loss, leaves: list[Tensor]) -> Callable[[], object]:
    """A function that computes the loss and its gradients."""
    return lambda: torch.autograd.grad(loss(*leaves), leaves, allow_unused=True)


def checked_step(competitor: Competitor, run: Run, leaves: list[Tensor]) -> Callable[[], object]:
    """The step of a competitor, whose values in a small batch were compared with its definition.

    The step has run once: libraries have loaded, compiled and allocated.
    """
    d, dtype = leaves[0].shape[1], leaves[0].dtype
    assert_same_values(competitor, make_leaves(run, SMALL_BATCH, d, dtype))
    step = make_step(competitor.loss, leaves)
    step()
    return step


def measure_in_rounds(run: Run, losses: list[Competitor], n: int, d: int, plan: Plan) -> list[Row]:
    """Add a row with peak memory and times for each competitor. Returns these rows.

    A competitor that fails in a small batch, or is wrong there, is not timed.
    """
    rows: dict[str, Row] = {}
    steps: dict[str, Callable[[], object]] = {}
    case = {"N": n, "D": d, "dtype": str(plan.dtype).removeprefix("torch.")}
    leaves = make_leaves(run, n, d, plan.dtype)
    for competitor in losses:
        with run.attempt(**case, loss=competitor.name, computes=competitor.computes) as row:
            step = checked_step(competitor, run, leaves)
            row["peak MB"] = measure.allocated_peak(run.device, step) / 1e6
            if run.dry_run or run.device.type == "cuda":
                row["wall ms"] = 1e3 * measure.wall_seconds(step, 0.2)
            steps[competitor.name] = step
        rows[competitor.name] = row
    times = measure.interleaved(steps, run.device, plan.seconds, plan.min_rounds)
    for name, milliseconds in times.items():
        rows[name] |= measure.time_columns(milliseconds)
    return list(rows.values())


def measure_once(name: str, n: int, d: int, plan: Plan) -> Row:
    """A row of one run on the CPU, in a separate process because it may run out of memory."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        try:
            return pool.submit(_measure_with_limit, name, n, d, plan).result()
        except BrokenProcessPool:  # the system or a library ended the process
            return {"N": n, "D": d, "loss": name, "outcome": OUT_OF_MEMORY}


def _measure_with_limit(name: str, n: int, d: int, plan: Plan) -> Row:
    run, limit = Run(torch.device("cpu")), None
    (competitor,) = (c for c in COMPETITORS if c.name == name)
    with run.attempt(N=n, D=d, loss=name, computes=competitor.computes) as row:
        # This first run also imports libraries, whose memory does not count towards the limit.
        assert_same_values(competitor, make_leaves(run, SMALL_BATCH, d, plan.dtype))
        limit = measure.limit_to_available()
        step = make_step(competitor.loss, make_leaves(run, n, d, plan.dtype))
        times: list[float] = []  # without the profiler's start, which takes seconds
        peak = measure.allocated_peak(
            run.device, lambda: times.append(measure.milliseconds(step, run.device))
        )
        row |= {"peak MB": peak / 1e6, **measure.time_columns(times)}
    if row["outcome"] == OUT_OF_MEMORY and limit is not None:
        row["outcome"] += f" (had {limit / 1e9:.1f} GB)"
    return row


def add_ratios(rows: list[Row], rate: float) -> None:
    """Add to each row its time divided by our time, and its fraction of the matmul rate.

    A softmax loss that keeps no N x N matrix needs 8 N^2 D flops, SigLIP's 6, and both need twice
    as many with N extra texts. The fraction is based on these flops also for dense autograd, which
    needs only 6 N^2 D. The penalties alone have no such products, so their rows have no fraction.
    """
    ours = next((row["ms"] for row in rows if row["loss"] == OURS and "ms" in row), None)
    for row in (row for row in rows if "ms" in row):
        if ours is not None:
            row[RATIO] = row["ms"] / ours
        if row["computes"] != PENALTIES:
            products = 6 if row["computes"].startswith(SIGLIP) else 8
            flops = products * row["N"] ** 2 * row["D"] * (2 if EXTRA_TEXTS in row["loss"] else 1)
            row["fraction of matmul rate"] = flops / rate / (1e-3 * row["ms"])


def matmul_rate(run: Run, plan: Plan) -> float:
    """Flops per second of `torch.mm` with two square matrices."""
    matrix = torch.randn(plan.matrix, plan.matrix, device=run.device).to(plan.dtype)
    seconds = measure.wall_seconds(lambda: torch.mm(matrix, matrix), plan.matrix_seconds)
    return 2 * plan.matrix**3 / seconds
