"""Processes that compute together: a group of a few ranks that serves many tests.

The processes start once and stay: a test sends them a function of a module's top level, every rank
runs it with tensors on its `own_device()`, and the results come back, on the CPU. What goes wrong
comes back too, in bounded time: an exception with its traceback, a rank that died, or ranks that do
not answer.

The ranks of a gloo group compute on the CPU, with interpreted kernels, also where other tests run
on a GPU.
"""

import faulthandler
import io
import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from functools import lru_cache
from multiprocessing.connection import Connection, wait
from multiprocessing.forkserver import ensure_running
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

_own_device = torch.device("cpu")


def own_device() -> torch.device:
    """Where a rank's tensors are; in the tests' own process, the CPU."""
    return _own_device


class RankError(AssertionError):
    """A rank raised, died or does not answer; the message says which."""


class Ranks:
    """Processes, the first of which form a process group, the default one of each.

    backend, device: "nccl" and "cuda", a GPU each; "gloo" and "cuda:0", one GPU for all.
    timeout: of the group's collectives in seconds, after which torch itself raises; patience: how
    much longer `run` waits.
    """

    def __init__(
        self,
        backend: str = "gloo",
        device: str = "cpu",
        *,
        timeout: float = 30.0,
        patience: float = 30.0,
    ) -> None:
        self.backend, self.device = backend, device
        self.timeout, self.patience = timeout, patience
        self._processes: list[Any] = []
        self._connections: list[Connection] = []
        self._grouped = 0  # the size of the group that they are in
        self._groups = 0
        self._folder = tempfile.TemporaryDirectory()

    def run(self, world_size: int, task: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What `task(rank, world_size, *arguments)` returns on each of `world_size` ranks.

        Raises RankError; the processes start anew then, unless every rank raised and so is done.
        """
        if self.backend == "nccl" and world_size > torch.cuda.device_count():
            pytest.skip(f"needs {world_size} GPUs")
        if world_size != self._grouped:
            self._form_group(world_size)
        return self._everywhere(_run, task, arguments)

    def close(self) -> None:
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            process.kill()
            process.join()
        self._processes, self._connections, self._grouped = [], [], 0

    def leave(self) -> None:
        """Gives up the group: the next task runs in a new one."""
        self._everywhere(_leave_group)
        self._grouped = 0

    def _form_group(self, world_size: int) -> None:
        self.leave()
        while len(self._processes) < world_size:
            self._start()
        self._groups += 1
        store = Path(self._folder.name) / f"store{self._groups}"
        self._grouped = world_size
        self._everywhere(_started, limit=120.0)
        self._everywhere(
            _join_group,
            world_size,
            self.backend,
            f"file://{store}",
            timedelta(seconds=self.timeout),
        )

    def _start(self) -> None:
        ours, theirs = multiprocessing.Pipe()
        context = _forks() if self.device == "cpu" else multiprocessing.get_context("spawn")
        process = context.Process(
            target=_serve, args=(len(self._processes), self.device, theirs), daemon=True
        )
        process.start()
        theirs.close()
        self._processes.append(process)
        self._connections.append(ours)

    def _everywhere(
        self, command: Callable[..., Any], *arguments: Any, limit: float | None = None
    ) -> list[Any]:
        """command(rank, *arguments) on the ranks of the group."""
        limit = limit or self.timeout + self.patience
        message = pickle.dumps((command, arguments, limit))
        waiting = dict(enumerate(self._connections[: self._grouped]))
        results: list[Any] = [None] * self._grouped
        errors: dict[int, str] = {}
        dead = False
        for connection in waiting.values():
            with suppress(ConnectionError):  # a process that died meanwhile: found below
                connection.send_bytes(message)
        deadline = time.monotonic() + limit
        while waiting and time.monotonic() < deadline:
            ready = wait(list(waiting.values()), deadline - time.monotonic())
            for rank, connection in list(waiting.items()):
                if connection not in ready:
                    continue
                del waiting[rank]
                try:
                    succeeded, result = torch.load(
                        io.BytesIO(connection.recv_bytes()), map_location="cpu", weights_only=False
                    )
                except (EOFError, ConnectionError):
                    self._processes[rank].join(5.0)
                    succeeded, result = False, f"died, exit code {self._processes[rank].exitcode}"
                    dead = True
                if succeeded:
                    results[rank] = result
                else:
                    errors[rank] = result
        errors |= {rank: f"did not answer in {limit:g} s" for rank in waiting}
        if dead or waiting or 0 < len(errors) < self._grouped:
            self.close()  # their group is of no use any more
        if errors:
            raise RankError("\n".join(f"rank {rank}: {errors[rank]}" for rank in sorted(errors)))
        return results


@lru_cache
def _forks() -> Any:
    """Starts processes as forks of one that has imported what takes long, and computed nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        [
            "torch._dynamo",
            "torch._inductor.config",
            "torch.distributed.fsdp",
            "hypothesis",
            "pytest",
        ]
    )
    before = dict(os.environ)
    os.environ |= {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
    ensure_running()
    os.environ.clear()
    os.environ |= before
    return context


def _serve(rank: int, device: str, connection: Connection) -> None:
    """What a process does: commands, until the connection is closed."""
    from conftest import fill_fresh_memory_with_nan

    global _own_device
    _own_device = torch.device(f"cuda:{rank}" if device == "cuda" else device)
    if _own_device.type == "cuda":
        torch.cuda.set_device(_own_device)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=RuntimeWarning, module="triton")  # as in pytest
    fill_fresh_memory_with_nan()
    while True:
        try:
            command, arguments, limit = pickle.loads(connection.recv_bytes())
        except EOFError:
            return
        # Shows where it hangs, and ends a process whose parent is gone.
        faulthandler.dump_traceback_later(limit, exit=True)
        try:
            reply = _bytes_of((True, command(rank, *arguments)))
        except Exception:
            reply = _bytes_of((False, traceback.format_exc()))
        faulthandler.cancel_dump_traceback_later()
        connection.send_bytes(reply)


def _bytes_of(reply: tuple[bool, Any]) -> bytes:
    """By torch.save, so that tensors of any device can be read on the CPU."""
    buffer = io.BytesIO()
    torch.save(reply, buffer)
    return buffer.getvalue()


def _run(rank: int, task: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    return task(rank, dist.get_world_size(), *arguments)


def _started(rank: int) -> None:
    """Nothing: the answer says that the process has started."""


def _join_group(rank: int, world_size: int, backend: str, store: str, timeout: timedelta) -> None:
    dist.init_process_group(
        backend, init_method=store, rank=rank, world_size=world_size, timeout=timeout
    )


def _leave_group(rank: int) -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
