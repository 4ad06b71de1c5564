"""Is it right on this device: the project's own tests, shared among processes by pytest-xdist.

A test that crashes its process fails, and the others go on in a new one.
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
SHARED_GPU = "tests/ranks/test_ranks.py::test_two_ranks_on_one_gpu"
KERNEL_TESTS = ("tests/kernels", "tests/loss", SHARED_GPU, "-m", "not slow")
SLOW_TESTS = ("tests/test_cuda.py", "-m", "slow")
RANK_TESTS = ("tests/ranks", "-m", "nccl")
# For a dry run, which shows that tests can be started and their results read.
FEW = ("tests/loss/test_loss.py", "-k", "eager")
CORES = len(os.sched_getaffinity(0))
# What takes time is the oracle, in float64 on the CPU.
SEVERAL = max(1, min(8, CORES // 2))
GRACE = 30.0  # seconds for pytest to report when it is interrupted
PROGRESS = 15.0  # seconds
TIMED_OUT = 124  # exit code of `timeout`
SHOWN = 30_000  # characters at the end of pytest's output, with the failed tests' full text


def suite(which: Sequence[str], processes: int, run: Run) -> None:
    """Tests with tensors on the device, until the section's time is over.

    How many passed is a row, why some were skipped are notes. If any fails, what pytest says of it
    is a failure of the section.
    """
    # After an illegal access all that follows in a process fails: 20 failures are enough.
    command = ["-m", "pytest", "-v", "-rs", "--maxfail", "20", "--continue-on-collection-errors"]
    command += ["-n", str(processes), "--dist", "worksteal", "--device", run.device.type]
    command += FEW if run.dry_run else which
    seconds = 0 if run.deadline == math.inf else max(1, run.remaining())  # 0: no limit
    limit = ["timeout", "--signal=INT", f"--kill-after={GRACE}", str(seconds)]
    environment = os.environ | {"OMP_NUM_THREADS": str(max(1, CORES // processes))}
    output, told = [], run.elapsed()
    with subprocess.Popen(
        [*limit, sys.executable, *command], cwd=ROOT, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    ) as process:  # fmt: skip
        try:
            for line in process.stdout or ():
                output.append(line)
                if run.elapsed() > told + PROGRESS:
                    told = run.elapsed()
                    run.say(line.strip())
        except KeyboardInterrupt:
            process.send_signal(signal.SIGINT)  # `timeout` passes it on
            raise
    code, text = process.returncode, "".join(output)
    for count, reason in re.findall(r"^SKIPPED \[(\d+)\] (.*)", text, re.MULTILINE):
        run.note(f"{count} skipped: {reason}")
    summary = "".join(re.findall(r"^=+ (.*) in [\d.]+s", text, re.MULTILINE)[-1:])
    counts = re.findall(r"(\d+) (passed|failed|skipped|error)", summary)
    if counts:
        run.row(**{kind: int(count) for count, kind in counts})
    if code == TIMED_OUT:
        progress = re.split(r"^[=!]{5,} (?!test session)", text, flags=re.MULTILINE)[0]
        run.note(f"interrupted at: {''.join(progress.strip().splitlines()[-1:])}")
    # pytest's codes: 0 all passed, 5 nothing to run.
    if code not in (0, 5, TIMED_OUT) or re.search("failed|error", summary):
        run.fail(f"pytest ended with {code}\n{text[-SHOWN:]}")
