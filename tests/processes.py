"""Python in a new process. Kernels are interpreted, and it sees no GPU."""

import gc
import os
import subprocess
import sys
from pathlib import Path

from interpreter import speed_up
from pool import fork_context

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
# A script finds the checkout, which may not be installed.
ENVIRONMENT["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])


def run_python(*arguments):
    """Run Python to its end, in the checkout."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=1200.0,
    )


def run_forked(program, *arguments, cwd):
    """Run the text of a program. The process is forked from one that has imported slow modules.

    What it prints to either stream is in `stdout`, and in `cwd` / "printed.txt".
    """
    process = fork_context().Process(target=_run, args=(program, arguments, cwd))
    process.start()
    process.join(1200.0)
    process.kill()
    printed = (cwd / "printed.txt").read_text()
    return subprocess.CompletedProcess(arguments, process.exitcode, printed)


def _run(program, arguments, cwd):
    gc.freeze()
    os.environ.update(ENVIRONMENT)
    os.chdir(cwd)
    sys.argv[1:] = arguments
    speed_up()
    sys.stdout = sys.stderr = open("printed.txt", "w")  # noqa: SIM115 (it has a traceback, too)
    exec(program, {"__name__": "__main__"})
