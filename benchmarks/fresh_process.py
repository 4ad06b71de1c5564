"""Measure in a process of its own, whose memory is its own and which may fail for want of it.

`python -m benchmarks.fresh_process TASK` is that process: TASK is JSON, and so is its answer.
"""

import json
import signal
import subprocess
import sys
from typing import Any

import torch

from benchmarks import cost, training_step
from benchmarks.checkout import ROOT
from benchmarks.competitors import BUILDERS
from benchmarks.memory import OUT_OF_MEMORY, environment_of_fresh_process, limit_to_available
from benchmarks.run import Run

TIMEOUT_SECONDS = 900


def answer_to(task: dict[str, Any]) -> dict[str, Any]:
    """Start the process, wait; its answer, or {"outcome": how it ended}."""
    command = [sys.executable, "-m", "benchmarks.fresh_process", json.dumps(task)]
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=environment_of_fresh_process(),
            capture_output=True,
            text=True,
            timeout=TIMEOUT_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return {"outcome": f"not done in {TIMEOUT_SECONDS} s"}
    if done.returncode == 0:
        answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return answer
    # The system's last resort, or an allocation in C++ that nobody catches.
    if done.returncode == -signal.SIGKILL or "std::bad_alloc" in done.stderr:
        return {"outcome": OUT_OF_MEMORY}
    lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
    return {"outcome": lines[-1]}


def attempt(run: Run, name: str, n: int, d: int) -> cost.Attempt:
    """`cost.attempt` of a competitor on the CPU, in float32, in a fresh process."""
    return cost.Attempt(**answer_to({"loss": name, "seed": run.seed, "n": n, "d": d}))


def training_peaks(run: Run, name: str, model: str, batch_size: int) -> dict[str, Any]:
    """`training_step.peaks` on the CPU, in a fresh process."""
    return answer_to({"loss": name, "seed": run.seed, "model": model, "batch_size": batch_size})


def main(task: dict[str, Any]) -> dict[str, Any]:
    """In the fresh process: measure what the task names."""
    run = Run(dry_run=False, seed=task["seed"], device=torch.device("cpu"))
    competitor = BUILDERS[task["loss"]](run.device)
    if "model" in task:
        trainer = training_step.Trainer(run, task["model"], task["batch_size"])
        return training_step.peaks(trainer, competitor.loss)
    cost.warm_up(run, competitor.loss, task["d"], torch.float32)
    leaves = cost.leaves_of(run, task["n"], task["d"], torch.float32)
    limit = limit_to_available()
    tried = vars(cost.attempt(run, competitor.loss, leaves, fresh=True))
    return {**tried, "limit": limit if tried["outcome"] == OUT_OF_MEMORY else None}


if __name__ == "__main__":
    torch.manual_seed(0)
    print(json.dumps(main(json.loads(sys.argv[1]))))
