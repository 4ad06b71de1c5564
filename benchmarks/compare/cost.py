"""The cost of a loss: time of the forward and backward pass, and peak memory."""

from collections.abc import Callable
from itertools import product

import torch
from torch import Tensor

from benchmarks import measure
from benchmarks.compare import ranks
from benchmarks.compare.accuracy import identify
from benchmarks.compare.competitors import Competitor
from benchmarks.compare.plan import DTYPES, LOGIT_SCALE, Plan
from benchmarks.run import Row, Run, describe

SMALL_BATCH = 128  # values are compared in a batch of this size


def add_costs(
    run: Run, losses: list[Competitor], plan: Plan, step_rate: float | None = None
) -> None:
    """Add rows of time and memory for one size after another, until the time is over.

    step_rate: pairs per second of the user's training; the rows then have the share of a step.
    """
    for (n, d), dtype in product(plan.sizes, plan.dtypes):
        name = f"N = {n:,}, D = {d:,}, {dtype}"
        if run.remaining() < 3 * plan.seconds:
            run.note(f"{name} left out: no time")
            continue
        run.say(name)
        try:
            rows = measure_in_turn(run, [c for c in losses if n <= c.up_to], n, d, dtype, plan)
            for row in rows:
                if "ms" in row:
                    row["pairs/s"] = 1e3 * n / row["ms"]
                    if step_rate:
                        row["share of a step"] = step_rate * ranks.size() / row["pairs/s"]
        except Exception as error:  # go on with the other sizes
            run.fail(f"{name}: {describe(error)}")


def make_leaves(run: Run, n: int, d: int, dtype: str) -> list[Tensor]:
    """Random image and text features (n, d) and the logit scale, all requiring gradients."""
    scale = torch.tensor(LOGIT_SCALE, device=run.device)
    return [tensor.requires_grad_() for tensor in (*run.pairs(n, d, DTYPES[dtype]), scale)]


def checked_step(
    competitor: Competitor, run: Run, leaves: list[Tensor], dtype: str
) -> tuple[Callable[[], object], Row]:
    """A function that computes the loss and its gradients; and what a small batch shows of it.

    The small batch has loaded libraries, and code that is compiled has been, at that size.
    """
    loss = competitor.under(dtype, run.device)
    small = make_leaves(run, SMALL_BATCH * ranks.size(), leaves[0].shape[1], dtype)
    found: Row = {}
    if ranks.size() == 1:
        found["computes"] = identify(competitor, loss, small)
    elif competitor.computes:
        found["gradient"] = ranks.gradient_error(competitor, loss, small)
    return lambda: torch.autograd.grad(loss(*leaves), leaves, allow_unused=True), found


def measure_in_turn(
    run: Run, losses: list[Competitor], n: int, d: int, dtype: str, plan: Plan
) -> list[Row]:
    """Add a row with peak memory and times for each competitor. Returns these rows.

    A competitor that fails in a small batch, or is wrong there, is not timed.
    """
    rows: dict[str, Row] = {}
    steps: dict[str, Callable[[], object]] = {}
    is_timed_often = n <= plan.timed_up_to
    leaves = make_leaves(run, n // ranks.size(), d, dtype)
    for competitor in losses:
        with run.attempt(N=n, D=d, dtype=dtype, loss=competitor.name) as row:
            step, found = checked_step(competitor, run, leaves, dtype)
            row |= found
            if is_timed_often:
                step()  # it compiles and allocates
            row["peak MB"] = ranks.largest(measure.allocated_peak(run.device, step)) / 1e6
            if ranks.size() > 1:
                row["ranks"] = ranks.size()
            steps[competitor.name] = step
        rows[competitor.name] = row
    min_rounds = plan.min_rounds if is_timed_often else 1
    times = measure.interleaved(steps, run.device, plan.seconds, min_rounds, ranks.largest)
    for name, milliseconds in times.items():
        rows[name] |= measure.time_columns([ranks.largest(x) for x in milliseconds])
    return list(rows.values())
