"""Python in a separate process, in the checkout."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def run_python(*arguments: str, interpreted: bool = True) -> subprocess.CompletedProcess[str]:
    """Run Python. interpreted: whether Triton interprets kernels, and the process sees no GPU."""
    environment = os.environ | {"TRITON_INTERPRET": str(int(interpreted)), "OMP_NUM_THREADS": "1"}
    if interpreted:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    options = {"capture_output": True, "text": True, "timeout": 1200}
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, **options)


def start(command: list[str], **streams: Any) -> "subprocess.Popen[str]":
    """Start a command. The test goes on while it runs, and may end it."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, text=True, cwd=ROOT, env=environment, **streams)
