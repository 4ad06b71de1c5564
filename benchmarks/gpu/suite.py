"""Runs the project's tests on this device, in several processes with pytest-xdist.

If a test crashes its process, the test fails, and the remaining tests run in a new process.
"""

import math
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence

from benchmarks import ROOT
from benchmarks.run import Run

CUDA_TESTS = ("tests/test_cuda.py", "-m", "not slow")
SHARED_GPU = "tests/ranks/test_ranks.py::test_two_ranks_that_share_a_gpu_are_accurate"
KERNEL_TESTS = ("tests/kernels", "tests/loss", SHARED_GPU, "-m", "not slow")
SLOW_TESTS = ("tests/test_cuda.py", "-m", "slow")
RANK_TESTS = ("tests/ranks", "-m", "nccl")
# A dry run only shows that tests can be started and their results read.
DRY_RUN_TESTS = ("tests/loss/test_loss.py", "-k", "eager")
CORES = len(os.sched_getaffinity(0))
# Several processes share the GPU, because the oracle takes most of the time, in float64 on the CPU.
PROCESSES = max(1, min(8, CORES // 2))
GRACE_SECONDS = 30.0  # for pytest to report when it is interrupted
PROGRESS_SECONDS = 15.0  # between two lines of progress
TIMED_OUT = 124  # exit code of `timeout`
SHOWN_CHARACTERS = 30_000  # of the end of pytest's output, which describes all failures


def run_tests(tests: Sequence[str], processes: int, run: Run) -> None:
    """Run tests with tensors on the device, until the section's time is over.

    The row counts the tests by outcome, and notes say why tests were skipped. If any test fails,
    the section fails with pytest's output.
    """
    output, code = run_pytest(DRY_RUN_TESTS if run.dry_run else tests, processes, run)
    for count, reason in re.findall(r"^SKIPPED \[(\d+)\] (.*)", output, re.MULTILINE):
        run.note(f"{count} skipped: {reason}")
    summary = "".join(re.findall(r"^=+ (.*) in [\d.]+s", output, re.MULTILINE)[-1:])
    counts = re.findall(r"(\d+) (passed|failed|skipped|error)", summary)
    if counts:
        run.add_row(**{kind: int(count) for count, kind in counts})
    if code == TIMED_OUT:
        progress = re.split(r"^[=!]{5,} (?!test session)", output, flags=re.MULTILINE)[0]
        run.note(f"interrupted at: {''.join(progress.strip().splitlines()[-1:])}")
    # pytest's exit codes: 0 means that all tests passed, 5 that there were no tests.
    if code not in (0, 5, TIMED_OUT) or re.search("failed|error", summary):
        run.fail(f"pytest ended with {code}\n{output[-SHOWN_CHARACTERS:]}")


def run_pytest(tests: Sequence[str], processes: int, run: Run) -> tuple[str, int]:
    """Run pytest and print some of its progress. Returns its output and exit code."""
    # After an illegal memory access all later tests of a process fail. Stop after 20 failures.
    command = ["-m", "pytest", "-v", "-rs", "--maxfail", "20", "--continue-on-collection-errors"]
    command += ["-n", str(processes), "--dist", "worksteal", "--device", run.device.type, *tests]
    seconds = 0 if run.deadline == math.inf else max(1, run.remaining())  # 0: no limit
    limit = ["timeout", "--signal=INT", f"--kill-after={GRACE_SECONDS}", str(seconds)]
    environment = os.environ | {"OMP_NUM_THREADS": str(max(1, CORES // processes))}
    output, last_progress = [], run.elapsed()
    with subprocess.Popen(
        [*limit, sys.executable, *command], cwd=ROOT, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    ) as process:  # fmt: skip
        try:
            for line in process.stdout or ():
                output.append(line)
                if run.elapsed() > last_progress + PROGRESS_SECONDS:
                    last_progress = run.elapsed()
                    run.say(line.strip())
        except KeyboardInterrupt:
            process.send_signal(signal.SIGINT)  # `timeout` passes it on
            raise
    return "".join(output), process.returncode
