"""Python in a separate process, in the checkout. Kernels are interpreted, and it sees no GPU."""

import gc
import multiprocessing
import os
import runpy
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

from interpreter import speed_up
from pool import fork_context

ROOT = Path(__file__).parents[1]
TIMEOUT = 1200.0


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python from its start, for tests of what is imported."""
    options = {"capture_output": True, "text": True, "timeout": TIMEOUT, "env": environment()}
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, **options)


@contextmanager
def held_by_another_process(folder: Path) -> Iterator[None]:
    """Another process holds the lock of a folder."""
    from reference_train import files

    lock = files.locked(folder)
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(1, context, lock.__enter__) as other:
        other.submit(os.getpid).result()  # returns when the process has the lock
        with patch.object(files, "PATIENCE", 0.1):
            yield


def run_forked(*arguments: str) -> subprocess.CompletedProcess[str]:
    """As `run_python`, but PyTorch and OpenCLIP are imported already, which saves seconds."""
    with TemporaryDirectory() as folder:
        output = [Path(folder) / name for name in ("stdout", "stderr")]
        process = start_forked(*arguments, output=output)
        process.join(TIMEOUT)
        process.kill()
        process.join()
        texts = [file.read_text() for file in output]
    return subprocess.CompletedProcess(arguments, process.exitcode, *texts)


def start_forked(*arguments: str, output: list[Path], **variables: str) -> BaseProcess:
    """Start what `run_forked` runs. The test goes on while it runs, and may end it.

    arguments: "-m" and a module, "-c" and code, or a script; then the arguments for it. output: the
    files for stdout and stderr. variables: added to the environment.
    """
    process = fork_context().Process(
        target=_run, args=(arguments, output, environment() | variables)
    )
    process.start()
    return process


def start(command: list[str], **streams: Any) -> "subprocess.Popen[str]":
    """Start a command. The test goes on while it runs, and may end it."""
    return subprocess.Popen(command, text=True, cwd=ROOT, env=environment(), **streams)


def environment() -> dict[str, str]:
    own = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return os.environ | own


def _run(arguments: tuple[str, ...], output: list[Path], variables: dict[str, str]) -> None:
    """Do what `python *arguments` does, in this process."""
    os.chdir(ROOT)
    os.environ.clear()
    os.environ |= variables
    multiprocessing.set_start_method("fork", force=True)  # for data loaders, as in a new process
    speed_up()
    gc.freeze()  # the benchmarks collect garbage often, and not what is imported
    for stream, file in enumerate(output, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), stream)
    option, *others = arguments
    if option == "-c":
        code, *others = others
        sys.argv = [option, *others]
        exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
    elif option == "-m":
        module, *others = others
        sys.argv = [module, *others]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    else:
        sys.argv = [option, *others]
        runpy.run_path(option, run_name="__main__")
