"""Measure in a process of its own, whose memory is its own and which may fail for want of it.

`python -m benchmarks.fresh_process TASK` is that process: TASK is JSON, and so is its answer.
"""

import json
import signal
import subprocess
import sys
from typing import Any

import torch

from benchmarks import cost
from benchmarks.checkout import ROOT
from benchmarks.competitors import BUILDERS
from benchmarks.memory import OUT_OF_MEMORY, limit_to_available
from benchmarks.run import Run

TIMEOUT_SECONDS = 900


def answer_to(task: dict[str, Any]) -> dict[str, Any]:
    """Start the process, wait; its answer, or {"outcome": how it ended}."""
    command = [sys.executable, "-m", "benchmarks.fresh_process", json.dumps(task)]
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
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


def main(task: dict[str, Any]) -> dict[str, Any]:
    """In the fresh process: measure what the task names."""
    run = Run(dry_run=False, seed=task["seed"], device=torch.device("cpu"))
    competitor = BUILDERS[task["loss"]](run.device)
    cost.warm_up(run, competitor.loss, task["d"], torch.float32)
    leaves = cost.leaves_of(run, task["n"], task["d"], torch.float32)
    limit = limit_to_available()
    tried = vars(cost.attempt(run, competitor.loss, leaves, fresh=True))
    return {**tried, "limit": limit if tried["outcome"] == OUT_OF_MEMORY else None}


if __name__ == "__main__":
    torch.manual_seed(0)
    print(json.dumps(main(json.loads(sys.argv[1]))))
