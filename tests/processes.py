"""Python in a separate process, in the checkout."""

import multiprocessing
import os
import runpy
import subprocess
import sys
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pool import fork_context

ROOT = Path(__file__).parents[1]
TIMEOUT = 1200.0


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python, which has imported nothing yet."""
    options = {"capture_output": True, "text": True, "timeout": TIMEOUT}
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment(interpreted=True), **options
    )


def run_forked(*arguments: str, interpreted: bool = True) -> subprocess.CompletedProcess[str]:
    """As `run_python`, in a process that has imported PyTorch and OpenCLIP, which takes seconds.

    arguments: as of `start_forked`. interpreted: whether Triton interprets kernels, and the process
    sees no GPU.
    """
    with TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in ("stdout", "stderr")]
        process = start_forked(*arguments, output=files, interpreted=interpreted)
        process.join(TIMEOUT)
        process.kill()
        process.join()
        return subprocess.CompletedProcess(
            arguments, process.exitcode, *(file.read_text() for file in files)
        )


def start_forked(
    *arguments: str, output: list[Path], interpreted: bool = True, **variables: str
) -> BaseProcess:
    """Start a process that has imported PyTorch and OpenCLIP. The test may end it.

    arguments: "-m" and a module, "-c" and code, or a script; then its own arguments. output: the
    files of stdout and stderr. variables: of the environment.
    """
    arguments = (arguments, environment(interpreted) | variables, output)
    process = fork_context().Process(target=_run, args=arguments)
    process.start()
    return process


def environment(interpreted: bool) -> dict[str, str]:
    """The environment of a process that computes with one thread."""
    found = os.environ | {"TRITON_INTERPRET": str(int(interpreted)), "OMP_NUM_THREADS": "1"}
    return found | ({"CUDA_VISIBLE_DEVICES": ""} if interpreted else {})


def _run(arguments: tuple[str, ...], variables: dict[str, str], output: list[Path]) -> None:
    """Do what `python *arguments` does, in this process."""
    os.chdir(ROOT)
    os.environ.clear()
    os.environ |= variables
    multiprocessing.set_start_method("fork", force=True)  # for data loaders, as in a new process
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
        sys.argv = list(arguments)
        runpy.run_path(option, run_name="__main__")


def start(command: list[str], **streams: Any) -> "subprocess.Popen[str]":
    """Start a command. The test goes on while it runs, and may end it."""
    return subprocess.Popen(command, text=True, cwd=ROOT, env=environment(True), **streams)
