"""What one loss costs: time forward, backward and both, peak memory, and bytes kept in between.

On CPU memory is that of a fresh process which computes one loss and its gradients, limited to what
the machine has available: what does not fit is a result of that process, not the end of this one.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.competitors import CONTRASTIVE, Competitor, Loss, ours
from benchmarks.memory import OUT_OF_MEMORY, Peak, kept_by_autograd, outcome_of
from benchmarks.run import Run
from benchmarks.timing import Step, Stopwatch, Times, interleaved, milliseconds

OK = "ok"
WARM_UP_ROWS = 96
MOST_RUNS = 300
LOGIT_SCALE = 14.3  # CLIP's at the start


@dataclass(frozen=True)
class Attempt:
    """One run of a loss and its gradients: how it ended, milliseconds, bytes."""

    outcome: str
    forward: float | None = None
    backward: float | None = None
    peak: int | None = None
    kept: int | None = None
    limit: int | None = None  # bytes there were, where that bounded it


def leaves_of(run: Run, n: int, d: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Random features (n, d) and the logit scale, all to be differentiated."""
    scale = torch.tensor(LOGIT_SCALE, device=run.device)
    image, text, scale = (tensor.requires_grad_() for tensor in (*run.pairs(n, d, dtype), scale))
    return image, text, scale


def step_of(loss: Loss, leaves: tuple[Tensor, ...]) -> Step:
    """One loss and its gradients: a stretch forward, a stretch backward."""

    def step(end: Callable[[], None]) -> None:
        value = loss(*leaves)
        end()
        value.backward()
        end()
        for leaf in leaves:
            leaf.grad = None

    return step


def attempt(run: Run, loss: Loss, leaves: tuple[Tensor, ...], fresh: bool = False) -> Attempt:
    """Run once and look. The peak counts the three gradients, the kept bytes no input.

    fresh: in a fresh process. On CPU there is no peak otherwise: see `memory.Peak`.
    """
    try:
        if run.device.type == "cuda":
            # Whatever the one before kept: libraries and modules allocate for themselves.
            torch.cuda.empty_cache()
        watch = Stopwatch(run.device)
        peak = Peak(run.device) if fresh or run.device.type == "cuda" else None
        with kept_by_autograd(leaves) as kept:
            spent = milliseconds(step_of(loss, leaves), watch)
        return Attempt(OK, *spent, peak.extra() if peak else None, kept())
    except Exception as error:
        outcome = outcome_of(error)
    return failure(run, outcome)


def failure(run: Run, outcome: str) -> Attempt:
    """An attempt that ended so, with what memory there was if that was it.

    To be called when the error is gone: its traceback held on to every tensor.
    """
    limit = None
    if run.device.type == "cuda" and outcome == OUT_OF_MEMORY:
        torch.cuda.empty_cache()
        limit = torch.cuda.mem_get_info(run.device)[0]
    return Attempt(outcome, limit=limit)


def warm_up(run: Run, loss: Loss, d: int, dtype: torch.dtype) -> None:
    """A few rows: what libraries load, compile and allocate once. Errors come again later."""
    attempt(run, loss, leaves_of(run, WARM_UP_ROWS, d, dtype))


def measure(
    run: Run,
    found: list[Competitor],
    n: int,
    d: int,
    dtype: torch.dtype,
    try_first: Callable[[Competitor], Attempt],
    seconds: float,
    least: int = 3,
    most: int = MOST_RUNS,
) -> list[dict[str, Any]]:
    """One row for each competitor: interleaved runs of those that `try_first` could run.

    With `most` 0 the time is that of the first try.
    """
    leaves = leaves_of(run, n, d, dtype)
    attempts = {competitor.name: try_first(competitor) for competitor in found}
    steps = {}
    errors: dict[str, str] = {}
    for competitor in found:
        if attempts[competitor.name].outcome == OK and most > 0:
            step = step_of(competitor.loss, leaves)
            try:
                step(lambda: None)
                steps[competitor.name] = step
            except Exception as error:
                errors[competitor.name] = outcome_of(error)
    runs = interleaved(
        steps, run.device, seconds, least, most,
        failed=lambda name, error: errors.update({name: outcome_of(error)}),
    )  # fmt: skip
    attempts |= {name: failure(run, outcome) for name, outcome in errors.items()}
    rows = [
        row_of(n, d, competitor, attempts[competitor.name], runs.get(competitor.name, []))
        for competitor in found
    ]
    by_name = {row["loss"]: row for row in rows}
    reference_time = by_name.get(ours(run.device), {}).get("ms")
    for row in rows:
        if "ms" in row and reference_time:
            row["times ours"] = row["ms"] / reference_time
    return rows


def row_of(
    n: int, d: int, competitor: Competitor, tried: Attempt, runs: list[tuple[float, ...]]
) -> dict[str, Any]:
    """A row of the record. What could not be measured is not in it."""
    row: dict[str, Any] = {"N": n, "D": d, "loss": competitor.name, "lacks": competitor.lacks}
    row["outcome"] = tried.outcome
    if tried.limit is not None:
        row["limit MB"] = tried.limit / 1e6
    if tried.outcome != OK:
        return row
    if not runs and tried.forward is not None and tried.backward is not None:
        runs = [(tried.forward, tried.backward)]
    row["runs"] = len(runs)
    columns = {
        "forward ": [forward for forward, _ in runs],
        "backward ": [backward for _, backward in runs],
        "": [forward + backward for forward, backward in runs],
    }
    for name, values in columns.items():
        times = Times.of(values)
        row |= {f"{name}ms": times.median, f"{name}p20": times.p20, f"{name}p80": times.p80}
    for name, size in (("peak MB", tried.peak), ("kept MB", tried.kept)):
        if size is not None:
            row[name] = size / 1e6
    return row


def matrix_rate(run: Run, dtype: torch.dtype, size: int) -> float:
    """Flops per second of a library product of square matrices, at its fastest."""
    a = torch.randn(size, size, device=run.device).to(dtype)

    def product(end: Callable[[], None]) -> None:
        torch.mm(a, a)
        end()

    for _ in range(3):
        product(lambda: None)
    runs = interleaved({"product": product}, run.device, 2.0)["product"]
    return 2e3 * size**3 / min(spent for (spent,) in runs)


def add_fraction_of_rate(rows: list[dict[str, Any]], rate: float) -> None:
    """To each row the time of 8 N^2 D flops at the measured rate, over its time.

    8 N^2 D is what a contrastive loss takes that keeps no matrix (dense autograd: 6 N^2 D); the
    penalties alone have no such product.
    """
    for row in rows:
        if "ms" in row and row["lacks"] != CONTRASTIVE:
            row["of matrix rate"] = 8 * row["N"] ** 2 * row["D"] / rate / (1e-3 * row["ms"])
