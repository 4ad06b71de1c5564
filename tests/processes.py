"""Python in a new process, in the checkout. Kernels are interpreted, and it sees no GPU."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
TIMEOUT = 1200.0
ENVIRONMENT = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
# A script finds the checkout, which may not be installed.
ENVIRONMENT["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])


def start_python(*arguments: str, **options: Any) -> "subprocess.Popen[str]":
    """Start Python. The test goes on while it runs, and may end it.

    options: of `Popen`; `env` is added to the environment.
    """
    options["env"] = os.environ | ENVIRONMENT | options.get("env", {})
    return subprocess.Popen([sys.executable, *arguments], text=True, cwd=ROOT, **options)


def run_python(*arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run Python to its end."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with start_python(*arguments, **pipes) as process:
        try:
            output = process.communicate(timeout=TIMEOUT)
        finally:
            process.kill()
    return subprocess.CompletedProcess(arguments, process.returncode, *output)
