"""`python -m benchmarks`: the loss beside what one would use instead, on the machine at hand.

Time, memory, accuracy and the share of a training step, as a summary in the terminal and as a
record (JSON, Markdown, pictures) in `results/`. On CUDA if there is a device, else on the CPU.
`--dry-run` goes the same way on CPU with tiny sizes, and proves no speed.
"""

import argparse
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import accuracy, cost, fresh_process, plan, plot, record, report, training_step
from benchmarks.competitors import (
    DENSE,
    OPEN_CLIP,
    OURS_CONTRASTIVE,
    OURS_PENALTIES,
    Competitor,
    competitors,
    ours,
)
from benchmarks.memory import available_bytes, outcome_of
from benchmarks.run import Run, Section

PARTS = (OURS_CONTRASTIVE, OURS_PENALTIES)
# Beyond so many running processes for each core, times mean little.
BUSY = 0.25
# What it says meanwhile, and a function that measures: rows of the section.
Task = tuple[str, Callable[[], list[dict[str, Any]]]]


def main(options: argparse.Namespace) -> int:
    """Measure everything, write the record and the pictures, print the summary."""
    on_cuda = torch.cuda.is_available() and not options.dry_run
    run = Run(options.dry_run, options.seed, device=torch.device("cuda" if on_cuda else "cpu"))
    chosen = plan.DRY_RUN if options.dry_run else plan.CUDA if on_cuda else plan.CPU
    torch.manual_seed(options.seed)
    found, reasons = competitors(run.device)
    sections = {
        "machine": [("rate of a matrix product", lambda: machine(run, chosen))],
        "cost": cost_tasks(run, found, chosen),
        "error of losses": loss_error_tasks(run, found, chosen),
        "error of penalties": penalty_error_tasks(run, chosen),
        "training step": [(chosen.model, lambda: training(run, found, chosen))],
    }
    try:
        for name, tasks in sections.items():
            with run.part(name) as section:
                for competitor, reason in reasons.items() if name == "cost" else ():
                    run.skip(competitor, reason)
                for number, (what, measure) in enumerate(tasks, 1):
                    run.say(f"{number}/{len(tasks)} {what}")
                    try:
                        section.rows += measure()
                    except Exception as error:  # the other tasks go on
                        run.fail(f"{what}: {outcome_of(error)}")
    except KeyboardInterrupt:  # what there is becomes a record that says so
        run.fail("interrupted")
        for name in sections:
            run.sections.setdefault(name, Section())

    described = {**record.describe(run), "ours": ours(run.device)}
    folder = options.out or Path(tempfile.mkdtemp(prefix="cyclip-loss-dry-run-"))
    stem = f"side-by-side-{described['card']}-{described['date']}"
    files = record.write(folder, stem, described, report.markdown(described))
    print("\n".join(report.summary(described)))
    for file in (*files, *plot.draw(described, files[0])):
        print(f"wrote {file}")
    return 1 if any(section.failures for section in run.sections.values()) else 0


def machine(run: Run, chosen: plan.Plan) -> list[dict[str, Any]]:
    """Threads, how busy it was already, memory there is, how fast the library multiplies."""
    available = available_on(run.device)
    row: dict[str, Any] = {"threads": torch.get_num_threads()}
    if hasattr(os, "getloadavg"):
        row["load before"] = os.getloadavg()[0]
        if row["load before"] > BUSY * (os.cpu_count() or 1):
            run.warn(f"the machine was busy, load {row['load before']:.1f}; do not trust the times")
    if available is not None:
        row["available MB"] = available / 1e6
    row["dtype"] = str(chosen.dtype).removeprefix("torch.")
    row["product of"] = chosen.matrix
    return [{**row, "GFLOP/s": cost.matrix_rate(run, chosen.dtype, chosen.matrix) / 1e9}]


def cost_tasks(run: Run, found: list[Competitor], chosen: plan.Plan) -> list[Task]:
    """Time and memory, size by size."""

    def rows_of(n: int, d: int) -> list[dict[str, Any]]:
        candidates = [c for c in found if n <= chosen.parts_up_to or c.name not in PARTS]

        def try_first(competitor: Competitor) -> cost.Attempt:
            if (n, d) in chosen.fresh:
                return fresh_process.attempt(run, competitor.name, n, d)
            cost.warm_up(run, competitor.loss, d, chosen.dtype)
            leaves = cost.leaves_of(run, n, d, chosen.dtype)
            return cost.attempt(run, competitor.loss, leaves)

        most = cost.MOST_RUNS if n <= chosen.timed_up_to else 0
        rows = cost.measure(
            run, candidates, n, d, chosen.dtype, try_first, chosen.seconds, chosen.least, most
        )
        for measured in run.sections["machine"].rows:
            cost.add_fraction_of_rate(rows, 1e9 * measured["GFLOP/s"])
        return rows

    return [(f"N = {n:,}, D = {d:,}", lambda size=(n, d): rows_of(*size)) for n, d in chosen.costs]


def loss_error_tasks(run: Run, found: list[Competitor], chosen: plan.Plan) -> list[Task]:
    """Value and gradients of every loss against float64."""
    return [
        (
            f"N = {pairs.n:,}, D = {pairs.d:,}",
            lambda pairs=pairs: accuracy.of_losses(
                run, found, pairs.n, pairs.d, pairs.dtype, pairs.distances
            ),
        )
        for pairs in chosen.losses
    ]


def penalty_error_tasks(run: Run, chosen: plan.Plan) -> list[Task]:
    """The penalties' gradient against float64, where the dense formula in float64 has room."""

    def rows_of(pairs: plan.Accuracy) -> list[dict[str, Any]]:
        needed, available = accuracy.DENSE_MATRICES * 8 * pairs.n**2, available_on(run.device)
        if available is not None and needed > available:
            run.skip(
                f"N = {pairs.n:,}",
                f"the exact result takes {needed / 1e9:.1f} GB, {available / 1e9:.1f} are there",
            )
            return []
        return accuracy.of_penalties(run, pairs.n, pairs.d, pairs.dtype, pairs.distances)

    return [
        (f"N = {pairs.n:,}, D = {pairs.d:,}", lambda pairs=pairs: rows_of(pairs))
        for pairs in chosen.penalties
    ]


def available_on(device: torch.device) -> int | None:
    """Bytes of memory that are free, if known."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_bytes()


def training(run: Run, found: list[Competitor], chosen: plan.Plan) -> list[dict[str, Any]]:
    """The loss within a training step, beside plain CLIP and the dense formula."""
    try:
        trainer = training_step.Trainer(run, chosen.model, chosen.batch_size)
    except ImportError as error:
        run.skip("training step", f'{error}: pip install -e ".[train]"')
        return []
    names = (ours(run.device), OURS_CONTRASTIVE, OPEN_CLIP, DENSE)

    candidates = [competitor for competitor in found if competitor.name in names]
    return training_step.measure(run, trainer, candidates, chosen.seconds)
