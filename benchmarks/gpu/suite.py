"""Runs the project's tests on this device, in several processes with pytest-xdist.

If a test crashes its process, the test fails, and the remaining tests run in a new process.
"""

import math
import os
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

CUDA_TESTS = ("tests/test_cuda.py", "-m", "not slow")
SHARED_GPU = "tests/ranks/test_ranks.py::test_two_ranks_that_share_a_gpu_are_accurate"
CACHED_BACKWARD = "tests/trainers/test_cached_backward.py"
KERNEL_TESTS = ("tests/kernels", "tests/loss", SHARED_GPU, CACHED_BACKWARD, "-m", "not slow")
SLOW_TESTS = ("tests/test_cuda.py", "-m", "slow")
RANK_TESTS = ("tests/ranks", "-m", "nccl")
# A dry run only shows that tests can be started and their results read.
DRY_RUN_TESTS = ("tests/loss/test_loss.py", "-k", "eager")
CORES = len(os.sched_getaffinity(0))
# Several processes share the GPU, because the oracle takes most of the time, in float64 on the CPU.
PROCESSES = max(1, min(8, CORES // 2))
GRACE_SECONDS = 30.0  # for pytest to report when it is interrupted


def run_tests(tests: Sequence[str], processes: int, run: Run) -> None:
    """Run tests with tensors on the device, until the section's time is over.

    The row counts the tests by outcome, and notes say why tests were skipped. Each test that fails
    is a failure of the section.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "junit.xml")
        code = run_pytest(DRY_RUN_TESTS if run.dry_run else tests, processes, run, report)
        if code is None:
            run.note("interrupted: the time was over")
        # pytest's exit codes: 0 means that all tests passed, 1 that some failed, 5 that there were
        # no tests.
        elif code not in (0, 1, 5):
            run.fail(f"pytest ended with {code}")
        suites = [*ElementTree.parse(report).iter("testsuite")] if report.exists() else []
    for suite in suites:
        counts = {name: int(suite.get(name, 0)) for name in ("failures", "errors", "skipped")}
        passed = int(suite.get("tests", 0)) - sum(counts.values())
        run.add_row(passed=passed, **counts)
    skipped: Counter[str] = Counter()  # by reason
    for case in (case for suite in suites for case in suite.iter("testcase")):
        for result in case:
            if result.tag == "skipped":
                skipped[result.get("message", "")] += 1
            elif result.tag in ("failure", "error"):
                name = f"{case.get('classname')}.{case.get('name')}"
                run.fail(f"{name}: {result.tag}\n{result.text}")
    for reason, count in skipped.items():
        run.note(f"{count} skipped: {reason}")


def run_pytest(tests: Sequence[str], processes: int, run: Run, report: Path) -> int | None:
    """Run pytest, which prints its progress. Returns its exit code, or None at the deadline."""
    # After an illegal memory access all later tests of a process fail. Stop after 20 failures.
    options = ["-q", "--tb=short", "--maxfail=20", "--continue-on-collection-errors"]
    options += [f"--junitxml={report}", "-n", str(processes), "--dist=worksteal"]
    options += ["--device", run.device.type]
    environment = os.environ | {"OMP_NUM_THREADS": str(max(1, CORES // processes))}
    seconds = None if run.deadline == math.inf else max(1.0, run.remaining())
    command = [sys.executable, "-m", "pytest", *options, *tests]
    with subprocess.Popen(command, cwd=ROOT, env=environment) as process:
        try:
            return process.wait(seconds)
        except (subprocess.TimeoutExpired, KeyboardInterrupt) as stop:
            process.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                process.wait(GRACE_SECONDS)
            process.kill()  # does nothing if it has ended
            if isinstance(stop, KeyboardInterrupt):
                raise
            return None
