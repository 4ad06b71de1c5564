"""Is it right on this device: the project's own tests, in processes of their own."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from benchmarks import ROOT
from benchmarks.run import Run

CUDA = ("tests/test_cuda.py", "-m", "not slow")
KERNELS = ("tests/kernels", "tests/loss", "tests/ranks/test_ranks_gpu.py", "-m", "not slow")
SLOW = ("tests/test_cuda.py", "tests/kernels", "tests/loss", "-m", "slow")
RANKS = ("tests/ranks", "-m", "nccl")
# For a dry run, which shows that tests can be started and their results read.
FEW = ("tests/loss/test_loss.py", "-k", "eager")
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
# What takes time is the oracle, in float64 on the CPU.
SEVERAL = max(1, min(8, CORES // 2))
MOST_FAILURES = 20  # of a process: after an illegal access all that follows fails in it
GRACE = 10.0  # seconds for pytest to report when it is interrupted


def suite(which: Sequence[str], processes: int, run: Run) -> None:
    """Tests with tensors on the device, until the section's time is over.

    Each that fails is a failure of the section, with its full text. A row for each process; why
    tests were skipped is noted.
    """
    command = [sys.executable, "-m", "pytest", "-q", "-p", "benchmarks.gpu.plugin"]
    command += ["--device", run.device.type, "--maxfail", str(MOST_FAILURES)]
    command += ["--continue-on-collection-errors", *(FEW if run.dry_run else which)]
    with tempfile.TemporaryDirectory() as folder:
        started: dict[Path, subprocess.Popen[bytes]] = {}
        interrupted = False
        try:
            for share in range(processes):
                file = Path(folder, f"{share}.jsonl")
                environment = {"OMP_NUM_THREADS": str(max(1, CORES // processes))}
                environment |= {"TEST_SHARE": f"{share}/{processes}", "TEST_RESULTS": str(file)}
                with file.with_suffix(".log").open("w") as log:
                    started[file] = subprocess.Popen(
                        command, cwd=ROOT, env=os.environ | environment, stdout=log, stderr=log
                    )
            interrupted = wait(started, run)
        finally:  # also where this command is interrupted itself
            reasons: Counter[str] = Counter()
            for file, process in started.items():
                process.kill()
                reasons += read(run, file, process.wait(), interrupted)
            for reason, count in reasons.most_common():
                run.note(f"{count} skipped: {reason}")


def wait(started: dict[Path, "subprocess.Popen[bytes]"], run: Run) -> bool:
    """Until all have ended, or the time is over; whether they were interrupted for that."""
    interrupted, said = False, run.elapsed()
    while any(process.poll() is None for process in started.values()) and run.remaining() > 0:
        if run.remaining() < GRACE and not interrupted:
            interrupted = True
            for process in started.values():
                process.send_signal(signal.SIGINT)
        if run.elapsed() > said + 15:
            said = run.elapsed()
            run.say(f"{sum('outcome' in line for file in started for line in lines(file))} tests")
        time.sleep(0.1)
    return interrupted


def lines(file: Path) -> list[dict[str, str]]:
    """What the plugin wrote, whole lines of it."""
    text = file.read_text() if file.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def read(run: Run, file: Path, code: int, interrupted: bool) -> Counter[str]:
    """Add the row and the failures of a process that ended; the reasons of tests skipped."""
    counts: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    at = "its start"
    for line in lines(file):
        at, outcome = line["test"], line.get("outcome", "")
        counts[outcome] += 1
        if outcome == "failed":
            run.fail(f"{at}\n{line['text']}")
        elif outcome == "skipped":
            reasons[line["text"]] += 1
    run.row(process=file.stem, **{key: counts[key] for key in ("passed", "failed", "skipped")})
    # pytest's codes: 0 all passed, 1 some failed, 2 interrupted, 5 nothing to run.
    if code in (0, 5) or (code == 1 and counts["failed"]):
        if counts["failed"] >= MOST_FAILURES:
            run.note(f"process {file.stem} ended after so many failures")
    elif interrupted and code != -signal.SIGKILL:
        run.note(f"process {file.stem} was interrupted at {at}: no time")
    else:
        log = file.with_suffix(".log").read_text(errors="replace")
        run.fail(f"process {file.stem}: pytest ended with {code} at {at}\n{log[-5000:]}")
    return reasons
