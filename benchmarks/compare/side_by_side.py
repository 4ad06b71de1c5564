"""`python -m benchmarks`: the loss beside what one would use instead, on the machine at hand.

Time, memory, accuracy and the share of a training step, as a summary in the terminal and as a
record (JSON, Markdown, pictures) in `results/`. On CUDA if there is a device, else on the CPU.
"""

import argparse
from dataclasses import replace

import torch

from benchmarks.compare.accuracy import errors
from benchmarks.compare.competitors import competitors
from benchmarks.compare.cost import costs
from benchmarks.compare.plan import CPU, CUDA
from benchmarks.compare.report import draw, summary
from benchmarks.compare.training_step import training
from benchmarks.run import RESULTS, Run, carry_out


def main(options: argparse.Namespace) -> int:
    """Measure everything, write the record and the pictures, print the summary."""
    run = Run(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    plan = CUDA if run.device.type == "cuda" else CPU
    if options.sizes:
        n = min(max(options.sizes), plan.error_at[0])
        plan = replace(plan, sizes=tuple((n, 512) for n in options.sizes), error_at=(n, 512))
    found = competitors(run.device)
    sections = {
        "cost": lambda run: costs(run, found, plan),
        "error": lambda run: errors(run, found, plan),
        "training step": lambda run: training(run, found, plan),
    }
    record, file = carry_out(run, "side-by-side", sections, options.out or RESULTS, summary)
    print(f"\n{summary(record)}\n")
    draw(record, file)
    return 1 if run.failures() else 0
