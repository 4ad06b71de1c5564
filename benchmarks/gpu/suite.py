"""Runs the project's tests on this device, in several processes with pytest-xdist.

If a test crashes its process, the test fails, and the remaining tests run in a new process.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence

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
# The exit codes of pytest and `timeout`; 137: pytest did not end in `GRACE_SECONDS`.
NO_TESTS, TIME_OVER = 5, (124, 137)
GRACE_SECONDS = 30  # for pytest to report when it is interrupted


def run_tests(tests: Sequence[str], processes: int, run: Run) -> None:
    """Run tests with tensors on the device, until the section's time is over.

    Notes have pytest's last line and why tests were skipped. A failure has pytest's output.
    """
    # After an illegal memory access all later tests of a process fail. Stop after 20 failures.
    options = ["-q", "-rs", "--tb=short", "--maxfail=20", "--continue-on-collection-errors"]
    options += ["-n", str(processes), "--dist=worksteal", "--device", run.device.type]
    command = [sys.executable, "-m", "pytest", *options]
    command += DRY_RUN_TESTS if run.dry_run else tests
    environment = os.environ | {"OMP_NUM_THREADS": str(max(1, CORES // processes))}
    # Coreutils' `timeout` interrupts pytest, which then reports. Ctrl-C reaches both.
    limit = ["timeout", "--foreground", "--signal=INT", f"--kill-after={GRACE_SECONDS}"]
    command = [*limit, str(max(1.0, run.remaining())), *command]
    with tempfile.TemporaryFile("w+") as output:  # a pipe would wait for workers that hang
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            code = process.wait()
        finally:
            process.terminate()  # `timeout` passes it on; nothing happens if it has ended
        output.seek(0)
        text = output.read()
    if code in TIME_OVER:
        run.note("interrupted: the time was over")
    *lines, last = text.splitlines() or [""]
    # When the time was over, only the output tells whether tests had failed.
    is_bad = code not in (0, NO_TESTS, *TIME_OVER)
    if is_bad or "= FAILURES =" in text or "= ERRORS =" in text:
        run.fail(f"pytest failed: {last}\n{text}")
    for line in (*(x for x in lines if x.startswith("SKIPPED")), last):
        run.note(line)
