"""`python -m benchmarks`: the loss beside what one would use instead, on the machine at hand.

Time, memory, accuracy and the share of a training step, as a summary in the terminal and as a
record (JSON, Markdown, pictures) in `results/`. On CUDA if there is a device, else on the CPU.
"""

import argparse
import os
from collections.abc import Callable
from dataclasses import replace

import torch

from benchmarks import record
from benchmarks.compare import accuracy, cost, training_step
from benchmarks.compare.competitors import Competitor, competitors
from benchmarks.compare.plan import CPU, CUDA, Plan
from benchmarks.compare.report import draw, summary
from benchmarks.run import SEED, Run

BUSY = 0.25  # running processes a core, beyond which times mean little


def main(options: argparse.Namespace) -> int:
    """Measure everything, write the record and the pictures, print the summary."""
    run = Run(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    plan = CUDA if run.device.type == "cuda" else CPU
    if options.sizes:
        n = min(max(options.sizes), plan.error_at[0])
        plan = replace(plan, sizes=tuple((n, 512) for n in options.sizes), error_at=(n, 512))
    torch.manual_seed(SEED)
    found, reasons = competitors(run.device)
    sections: dict[str, tuple[str, Callable[[Run, list[Competitor], Plan], None]]] = {
        "cost": (cost.ABOUT, cost.costs),
        "error": (accuracy.ABOUT, accuracy.errors),
        "training step": (training_step.ABOUT, training_step.training),
    }
    try:
        for name, (about, measure) in sections.items():
            with run.part(name, about):
                if name == "cost":
                    look_around(run, reasons)
                measure(run, found, plan)
    except KeyboardInterrupt:  # what there is becomes a record that says so
        run.fail("interrupted")
    described = record.describe(run)
    text = summary(described)
    file = record.write(options.out or record.RESULTS, "side-by-side", described, text)
    print(f"\n{text}\n\nwrote {file} and {file.with_suffix('.md')}")
    draw(described, file)
    return 1 if any(section.failures for section in run.sections.values()) else 0


def look_around(run: Run, reasons: list[str]) -> None:
    """Note how busy the machine is already, and what is missing."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0  # Windows has none
    busy = load > BUSY * (os.cpu_count() or 1)
    run.note(f"load before: {load:.2f}{'; the machine was busy, do not trust the times' * busy}")
    for reason in reasons:
        run.note(reason)
