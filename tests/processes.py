"""Python in a new process, in the checkout. Kernels are interpreted, and it sees no GPU."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

ROOT = Path(__file__).parents[1]
TIMEOUT = 1200.0
ENVIRONMENT = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
# A script finds the checkout, which may not be installed.
ENVIRONMENT["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
# Holds a lock until its input ends.
HOLD = """
import sys, filelock
lock = filelock.FileLock(sys.argv[1])
lock.acquire()
print(flush=True)
sys.stdin.read()
"""


def start_python(*arguments: str, **options: Any) -> "subprocess.Popen[str]":
    """Start Python. The test goes on while it runs, and may end it. options: of `Popen`."""
    command, environment = [sys.executable, *arguments], os.environ | ENVIRONMENT
    return subprocess.Popen(command, text=True, env=environment, **options)


def run_python(*arguments: str, cwd: Path = ROOT) -> "subprocess.CompletedProcess[str]":
    """Run Python to its end."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with start_python(*arguments, cwd=cwd, **pipes) as process:
        try:
            output = process.communicate(timeout=TIMEOUT)
        finally:
            process.kill()
    return subprocess.CompletedProcess(arguments, process.returncode, *output)


@contextmanager
def held_by_another_process(folder: Path) -> Iterator[None]:
    """Another process holds the lock of a folder."""
    from reference_train import files

    folder.mkdir(parents=True, exist_ok=True)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with start_python("-c", HOLD, f"{folder}/.lock", **pipes) as other:
        other.stdout.readline()  # returns when the process has the lock
        with patch.object(files, "PATIENCE", 0.1):
            yield
