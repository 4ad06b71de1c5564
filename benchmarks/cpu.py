"""Time, peak memory and accuracy on this CPU, beside the dense formula and `open_clip.ClipLoss`.

All in float32. Times are medians of interleaved runs, forward and backward. Peak memory is the
largest resident set of a fresh process that computes one loss and its gradients, less its resident
set just before. The record goes to `results/`.
"""

import argparse
import json
import platform
import subprocess
import sys
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.competitors import OURS, Loss, competitors, dense_penalties
from benchmarks.record import table, versions, write_whole
from benchmarks.timing import interleaved
from cyclip_loss import cyclic_penalty

# (N, D): the paper's own batch and a small one, then one that fills memory when dense.
TIMED = ((128, 512), (128, 1024), (512, 512), (512, 1024), (8192, 512))
MEASURED = ((8192, 512), (32768, 512))
# Where the dense matrices (a dozen of them with autograd's) would not fit beside anything else.
DENSE_AT_MOST = 16384
ALIGNED = (4096, 512)
DISTANCES = (0.3, 0.03, 0.003)

CPU = torch.device("cpu")
CANDIDATES = (f"{OURS} (eager)", "dense", "open_clip.ClipLoss")


def features(n: int, d: int, seed: int, distance: float | None = None) -> tuple[Tensor, Tensor]:
    """Rows of unit length, (n, d) twice; with a distance, text is image plus that much noise."""
    generator = torch.Generator().manual_seed(seed)
    image = F.normalize(torch.randn(n, d, generator=generator), dim=1)
    text = F.normalize(torch.randn(n, d, generator=generator), dim=1)
    return image, text if distance is None else F.normalize(image + distance * text, dim=1)


def step_of(loss: Loss, n: int, d: int, seed: int) -> Callable[[], None]:
    """One loss and its three gradients, on inputs of its own."""
    image, text = (tensor.requires_grad_() for tensor in features(n, d, seed))
    logit_scale = torch.tensor(14.3, requires_grad=True)

    def step() -> None:
        for tensor in (image, text, logit_scale):
            tensor.grad = None
        loss(image, text, logit_scale).backward()

    return step


def times(n: int, d: int, seed: int, seconds: float) -> list[dict[str, Any]]:
    """Forward and backward of every candidate, in turn, and of our penalties alone."""
    found, _ = competitors(CPU)
    losses = {candidate.name: candidate.loss for candidate in found if candidate.name in CANDIDATES}
    losses["penalties alone"] = lambda image, text, scale: cyclic_penalty(image, text) + 0 * scale
    steps = {}
    for name, loss in losses.items():
        step = step_of(loss, n, d, seed)
        step()
        steps[name] = lambda done, step=step: (step(), done())
    measured = interleaved(steps, CPU, seconds, least=5, most=200)
    ours = measured[CANDIDATES[0]][0].median
    return [
        {
            "N": n,
            "D": d,
            "loss": name,
            "ms": stretches[0].median,
            "p20": stretches[0].p20,
            "p80": stretches[0].p80,
            "times ours": stretches[0].median / ours,
        }
        for name, stretches in measured.items()
    ]


def peak(name: str, n: int, d: int, seed: int) -> int:
    """Bytes that one loss and its gradients add at most, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks", "cpu", "--peak-of", name, str(n), str(d)]
    run = subprocess.run([*command, "--seed", str(seed)], capture_output=True, text=True)
    if run.returncode:
        lines = run.stderr.strip().splitlines() or [f"exit code {run.returncode}"]
        raise RuntimeError(f"{name} at N = {n}: {lines[-1]}")
    return int(run.stdout)


def print_peak(name: str, n: int, d: int, seed: int) -> None:
    """In the fresh process: measure and print the bytes."""
    loss = next(candidate.loss for candidate in competitors(CPU)[0] if candidate.name == name)
    step_of(loss, 64, d, seed)()  # what the libraries allocate once
    step = step_of(loss, n, d, seed)
    # Linux: the peak is reset to what is resident now. (`ru_maxrss` keeps the parent's.)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    step()
    print(_status("VmHWM") - before)


def _status(field: str) -> int:
    """Bytes, from /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    line = next(line for line in lines if line.startswith(field))
    return int(line.split()[1]) * 1024


def accuracy(n: int, d: int, seed: int) -> list[dict[str, Any]]:
    """Relative error of the penalties' gradient on nearly aligned pairs, against float64."""
    rows = []
    for distance in DISTANCES:
        image, text = features(n, d, seed, distance)
        wide = image.double().requires_grad_()
        dense_penalties(wide, text.double()).backward()
        row: dict[str, Any] = {"N": n, "D": d, "|T - I|": distance}
        for name, penalty in ((OURS, cyclic_penalty), ("dense", dense_penalties)):
            leaf = image.clone().requires_grad_()
            penalty(leaf, text).backward()
            row[name] = ((leaf.grad - wide.grad).norm() / wide.grad.norm()).item()
        row["dense / ours"] = row["dense"] / row[OURS]
        rows.append(row)
    return rows


def markdown(record: dict[str, Any]) -> str:
    """The record for people."""
    found = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    lines = [f"# CPU, {record['date']}", ""]
    lines.append(f"`{record['command']}`, {record['threads']} threads, {found}")
    for title, rows in record["sections"].items():
        lines += ["", f"## {title.capitalize()}", "", *table(rows)]
    return "\n".join(lines) + "\n"


def main(options: argparse.Namespace) -> int:
    """Measure everything, print it, write the record."""
    if options.peak_of:
        name, n, d = options.peak_of
        print_peak(name, int(n), int(d), options.seed)
        return 0

    record: dict[str, Any] = {
        "command": " ".join(["python -m benchmarks", *sys.argv[1:]]),
        "date": date.today().isoformat(),
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "seed": options.seed,
        "versions": versions(),
    }
    sections: dict[str, list[dict[str, Any]]] = {"time": [], "peak memory": []}
    for n, d in TIMED:
        print(f"timing N = {n}, D = {d}", file=sys.stderr)
        sections["time"] += times(n, d, options.seed, options.seconds)
    for n, d in MEASURED:
        for name in CANDIDATES:
            if name != CANDIDATES[0] and n > DENSE_AT_MOST:
                continue
            print(f"peak memory of {name} at N = {n}", file=sys.stderr)
            extra = peak(name, n, d, options.seed)
            row = {"N": n, "D": d, "loss": name, "extra MB": extra / 1e6}
            sections["peak memory"].append(row)
    print("accuracy", file=sys.stderr)
    sections["gradient error on nearly aligned pairs"] = accuracy(*ALIGNED, options.seed)

    record["sections"] = sections
    text = markdown(record)
    print(text)
    stem = Path(options.out) / f"cpu-{record['date']}"
    write_whole(stem.with_suffix(".json"), json.dumps(record, indent=1) + "\n")
    write_whole(stem.with_suffix(".md"), text)
    return 0
