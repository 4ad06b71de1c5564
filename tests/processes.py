"""Python in a new process, in the checkout. Kernels are interpreted, and it sees no GPU."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
# A script finds the checkout, which may not be installed.
ENVIRONMENT["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])


def run_python(*arguments: str, cwd: Path = ROOT) -> "subprocess.CompletedProcess[str]":
    """Run Python to its end."""
    options = {"capture_output": True, "text": True, "timeout": 1200.0, "check": False}
    command, environment = [sys.executable, *arguments], os.environ | ENVIRONMENT
    return subprocess.run(command, cwd=cwd, env=environment, **options)
