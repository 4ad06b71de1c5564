"""Is it right on this device: the project's own tests, in a process of their own."""

import signal
import subprocess
import sys
from collections.abc import Sequence
from threading import Timer

from benchmarks import ROOT
from benchmarks.run import Run

# What a GPU decides, without the slow ones. Those, and what ranks and trainers do there, come when
# all is timed.
OF_A_GPU = ("tests/test_cuda.py", "tests/kernels", "tests/loss")
FIRST = (*OF_A_GPU, "-m", "not slow")
LATER = (*OF_A_GPU, "tests/ranks", "tests/trainers", "-m", "slow or gpu or nccl")
# In a dry run, which shows that tests can be started and their results read.
FEW = ("tests/loss/test_loss.py", "-k", "eager")
GRACE = 10.0  # seconds for pytest to report when it is interrupted
INTERRUPTED = 2  # pytest's exit code


def suite(which: Sequence[str], run: Run) -> None:
    """Tests with tensors on the device, until the section's time is over; their output is shown.

    Each that fails is a failure of the section; pytest's count of them all becomes its row.
    """
    which = FEW if run.dry_run else which
    command = [sys.executable, "-m", "pytest", "-q", "-rfE", "--device", run.device.type, *which]
    line = ""
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as tests:
        # One that hangs in a kernel does not see the interruption.
        ends = (Timer(max(0.0, run.remaining() - GRACE), tests.send_signal, [signal.SIGINT]),
                Timer(max(GRACE, run.remaining()), tests.kill))  # fmt: skip
        for end in ends:
            end.start()
        assert tests.stdout is not None
        for line in tests.stdout:
            print(line, end="", flush=True)
            if line.startswith(("FAILED", "ERROR")):
                run.fail(line.strip())
    for end in ends:
        end.cancel()
    run.row(tests=line.strip())
    if tests.returncode == INTERRUPTED:
        run.note("the tests did not end within their share of the time")
    elif tests.returncode and not run.section.failures:
        run.fail(f"pytest: exit code {tests.returncode}")
