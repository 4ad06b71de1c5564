"""`python -m benchmarks`: compares the loss with its alternatives on this machine.

It measures time, memory and errors. It uses the GPU if there is one, and the CPU otherwise. It
prints a summary, and writes a record (JSON, Markdown, a figure) to `results/`.
"""

import argparse
from dataclasses import replace

import torch

from benchmarks.compare.accuracy import add_errors
from benchmarks.compare.competitors import competitors
from benchmarks.compare.cost import add_costs
from benchmarks.compare.plan import CPU, CUDA
from benchmarks.compare.report import draw, summary
from benchmarks.run import Run, run_sections


def main(options: argparse.Namespace) -> int:
    """Measure everything, write the record and the figure, print the summary."""
    run = Run(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    plan = CUDA if run.device.type == "cuda" else CPU
    if options.sizes:
        n = min(max(options.sizes), plan.error_size[0])
        plan = replace(plan, sizes=tuple((n, 512) for n in options.sizes), error_size=(n, 512))
    losses = competitors(run.device)
    sections = {
        "cost": lambda run: add_costs(run, losses, plan),
        "error": lambda run: add_errors(run, losses, plan),
    }
    record, file = run_sections(run, options, sections, summary)
    print(f"\n{summary(record)}\n")
    draw(record, file.with_name(f"{file.stem}-cost.png"))
    return 1 if run.failures() else 0
