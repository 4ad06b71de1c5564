"""Is it right on this device: the project's own tests, shared among processes by pytest-xdist.

A test that crashes its process fails, and the others go on in a new one.
"""

import os
import re
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from xml.etree import ElementTree

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
MOST_FAILURES = 20  # after an illegal access all that follows in a process fails
GRACE = 20.0  # seconds for pytest to report when it is interrupted


def suite(which: Sequence[str], processes: int, run: Run) -> None:
    """Tests with tensors on the device, until the section's time is over.

    Each that fails is a failure of the section, with its full text. How often tests were skipped
    for which reason is noted. If pytest leaves no report, its output is a failure.
    """
    command = [sys.executable, "-m", "pytest", "-v", "--device", run.device.type]
    command += ["-n", str(processes), "--dist", "worksteal"]
    command += ["--maxfail", str(MOST_FAILURES), "--continue-on-collection-errors"]
    command += ["-o", "junit_logging=all", "-o", "junit_log_passing_tests=false"]
    environment = os.environ | {"OMP_NUM_THREADS": str(max(1, CORES // processes))}
    with tempfile.TemporaryDirectory() as folder:
        report, log = Path(folder, "report.xml"), Path(folder, "log")
        command += ["--junitxml", str(report), *(FEW if run.dry_run else which)]
        with log.open("w") as file:
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=file, stderr=file, start_new_session=True
            )
        ended = False
        try:
            ended = wait(process, log, run)
        finally:  # also where this command is interrupted itself
            if not ended:
                os.killpg(process.pid, signal.SIGINT)  # pytest reports, and ends
                run.note(f"interrupted at: {last_line(log)}")
                with suppress(subprocess.TimeoutExpired):
                    process.wait(GRACE)
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            code = process.wait()
            if counts := re.findall(r"(\d+) (passed|failed|skipped|error)", last_line(log)):
                run.row(**{kind: int(count) for count, kind in counts})
            # pytest's codes: all passed, some failed, interrupted or too many failed, none to run.
            if report.exists() and code in (0, 1, 2, 5):
                read(run, report)
            else:
                run.fail(f"pytest ended with {code}\n{log.read_text(errors='replace')[-5000:]}")


def wait(process: "subprocess.Popen[bytes]", log: Path, run: Run) -> bool:
    """Until pytest has ended or the time is over; whether it has ended."""
    while (seconds := min(15.0, run.remaining() - GRACE)) > 0:
        with suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
            return True
        run.say(last_line(log))
    return False


def last_line(log: Path) -> str:
    """Where pytest is."""
    return (log.read_text(errors="replace").strip().splitlines() or ["its start"])[-1]


def read(run: Run, report: Path) -> None:
    """Add the failures, and the reasons why tests were skipped."""
    skipped: Counter[str] = Counter()
    for case in ElementTree.parse(report).iter("testcase"):
        skipped.update(element.get("message", "") for element in case.findall("skipped"))
        if case.find("failure") is not None or case.find("error") is not None:
            text = "\n".join(element.text or "" for element in case)
            run.fail(f"{case.get('classname')}::{case.get('name')}\n{text}")
    for reason, count in skipped.most_common():
        run.note(f"{count} skipped: {reason}")
