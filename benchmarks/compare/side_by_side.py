"""`python -m benchmarks`: compares the loss with its alternatives on this machine.

It measures time, memory and errors, on the GPU if there is one, and on the CPU otherwise. It prints
a summary, and leaves a record: a page, a figure, and rows in `results.csv`.
"""

import argparse

import torch
from torch import distributed as dist

from benchmarks.compare import ranks
from benchmarks.compare.accuracy import add_errors
from benchmarks.compare.competitors import competitors
from benchmarks.compare.cost import add_costs
from benchmarks.compare.plan import CPU, CUDA, chosen
from benchmarks.measure import limit_to_available
from benchmarks.run import Run, device_name, run_sections


def main(options: argparse.Namespace) -> int:
    """Measure everything, write the record and the figure, print the summary."""
    across_ranks = dist.is_torchelastic_launched()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if across_ranks:
        device = ranks.join()
        options.sizes = options.sizes or ranks.SIZES
    run = Run(device, quiet=across_ranks and dist.get_rank() > 0)
    plan = chosen(CUDA if device.type == "cuda" else CPU, options)
    losses = (ranks.competitors if across_ranks else competitors)(options.loss)
    if device.type == "cpu" and not across_ranks and (limit := limit_to_available()):
        run.say(f"a loss may allocate {limit / 1e9:.1f} GB")
    sections = {"cost": lambda run: add_costs(run, losses, plan, options.step_rate)}
    if not across_ranks:
        sections["error"] = lambda run: add_errors(run, losses, plan)
    page = run_sections(run, options, sections)
    if across_ranks:
        dist.destroy_process_group()
    elif rows := run.sections["cost"].rows:
        from benchmarks.compare.report import figures  # matplotlib, which ranks need not import

        for name, figure in figures(rows, device_name(device)).items():
            figure.savefig(page.with_name(f"{page.stem}-{name}.png"))
    return 1 if run.failures else 0
