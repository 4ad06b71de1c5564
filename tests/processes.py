"""Python in new processes, in which kernels are interpreted, and which see no GPU."""

import gc
import multiprocessing
import os
import subprocess
import sys
from functools import lru_cache
from multiprocessing.forkserver import ensure_running
from pathlib import Path
from unittest.mock import patch

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
# A script finds the checkout, which may not be installed.
ENVIRONMENT["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
# What takes long to import. The first also imports Triton, and so its interpreter.
PRELOADED = (
    "torch._dynamo",
    "torch._inductor.config",
    "functorch.compile",
    "torch.export._trace",
    "torch.distributed.fsdp",
    "hypothesis",
    "pytest",
    "open_clip_train.main",
    "cyclip_loss",
)


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


@lru_cache
def fork_context():
    """A context that forks from a process which has imported slow modules and computed nothing.

    It sees no GPU either: FSDP2 would use it, and CUDA does not work in a fork.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    with patch.dict(os.environ, ENVIRONMENT):
        ensure_running()
    return context


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
    os.chdir(cwd)
    sys.argv[1:] = arguments
    sys.stdout = sys.stderr = open("printed.txt", "w")  # noqa: SIM115 (it has a traceback, too)
    exec(program, {"__name__": "__main__"})
