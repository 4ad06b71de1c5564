"""Ranks for the tests: a few processes in one group, which many tests share.

A test sends the ranks a function from a module's top level. Every rank runs it, with tensors on its
`own_device()`, and returns the results on the CPU. The test fails if a rank raises an exception,
dies, or does not answer within `limit` seconds, which is far longer than any test takes.
"""

import faulthandler
import gc
import io
import multiprocessing
import pickle
import tempfile
import traceback
import warnings
from contextlib import suppress
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from processes import fork_context
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_own_device = torch.device("cpu")


def own_device():
    """The device of a rank's tensors; the CPU in the process of pytest."""
    return _own_device


class Ranks:
    """Processes. The first `world_size` of them form the default process group.

    backend, device: "nccl" and "cuda", one GPU each; "gloo" and "cuda:0", one GPU for all.
    timeout: of the group's collectives, in seconds, after which torch raises.
    """

    def __init__(self, backend="gloo", device="cpu", timeout=240.0):
        self.backend, self.device, self.timeout = backend, device, timeout
        self.limit = 1.25 * timeout  # of a task; a collective that hangs raises before that
        self._ranks = []
        self._group_size = 0  # of the current group
        self._group_count = 0  # groups so far
        self._folder = tempfile.TemporaryDirectory()

    def run(self, world_size, task, *arguments):
        """What `task(rank, world_size, *arguments)` returns on each of `world_size` ranks.

        Raises AssertionError. Processes are then replaced, unless every rank raised an exception.
        """
        if self.backend == "nccl" and world_size > torch.cuda.device_count():
            pytest.skip(f"needs {world_size} GPUs")
        if world_size != self._group_size:
            self.leave()
            while len(self._ranks) < world_size:
                self._start()
            self._group_count += 1
            self._group_size = world_size
            store = f"file://{self._folder.name}/store{self._group_count}"
            timeout = timedelta(seconds=self.timeout)
            self._run_on_all(_join_group, world_size, self.backend, store, timeout)
        return self._run_on_all(task, world_size, *arguments)

    def leave(self):
        """Leave the group: the next task runs in a new one."""
        self._run_on_all(_leave_group)
        self._group_size = 0

    def close(self):
        for process, connection in self._ranks:
            connection.close()
            process.kill()
            process.join()
        self._ranks, self._group_size = [], 0

    def _start(self):
        ours, theirs = multiprocessing.Pipe()
        context = fork_context() if self.device == "cpu" else multiprocessing.get_context("spawn")
        arguments = (len(self._ranks), self.device, theirs)
        process = context.Process(target=_serve, args=arguments, daemon=True)
        process.start()
        theirs.close()
        self._ranks.append((process, ours))

    def _run_on_all(self, command, *arguments):
        """Run command(rank, *arguments) on the ranks of the group."""
        message = pickle.dumps((command, arguments, self.limit))
        ranks = self._ranks[: self._group_size]
        for _, ours in ranks:
            with suppress(ConnectionError):  # the process has died, which is noticed below
                ours.send_bytes(message)
        results, errors, lost = [], [], False
        for rank, (process, ours) in enumerate(ranks):  # processes end themselves at the limit
            try:
                reply = io.BytesIO(ours.recv_bytes())
                succeeded, found = torch.load(reply, map_location="cpu", weights_only=False)
            except (EOFError, ConnectionError):
                process.join(60.0)
                succeeded, found, lost = False, f"died, exit code {process.exitcode}", True
            if succeeded:
                results.append(found)
            else:
                errors.append(f"rank {rank}: {found}")
        if lost or 0 < len(errors) < len(ranks):
            self.close()  # the group is unusable
        if errors:
            raise AssertionError("\n".join(errors))
        return results


class Collectives(TorchDispatchMode):
    """Records each collective: its name, and the bytes of its result (or of its input, for sends,
    reduce-scatters, and what DDP and FSDP2 do in place). `largest` is the most elements that the
    result of any operator has.
    """

    def __init__(self):
        super().__init__()
        self.found = []
        self.largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = result if isinstance(result, (tuple, list)) else [result]
        sizes = [tensor.numel() for tensor in tensors if isinstance(tensor, torch.Tensor)]
        self.largest = max([self.largest, *sizes])
        name = function.overloadpacket.__name__.removesuffix("_out")  # the same collective
        if "c10d" in function.namespace and name != "wait_tensor":
            takes_result = isinstance(result, torch.Tensor) and name != "reduce_scatter_tensor"
            tensor = result if takes_result else tree_leaves(args)[0]
            name = f"all_reduce {args[1]}" if name == "all_reduce" else name
            self.found.append((name, tensor.nbytes))
        return result


def _serve(rank, device, connection):
    """The main loop of a process: run commands until the connection is closed."""
    from support import fill_fresh_memory_with_nan

    gc.freeze()
    global _own_device
    _own_device = torch.device(f"cuda:{rank}" if device == "cuda" else device)
    if _own_device.type == "cuda":
        torch.cuda.set_device(_own_device)
    torch.set_num_threads(1)
    # As in pyproject.toml.
    warnings.filterwarnings("ignore", category=RuntimeWarning, module="triton")
    fill_fresh_memory_with_nan()
    while True:
        try:
            command, arguments, limit = pickle.loads(connection.recv_bytes())
        except EOFError:
            return
        # At the limit, show where the command hangs and end the process.
        faulthandler.dump_traceback_later(limit, exit=True)
        try:
            reply = (True, command(rank, *arguments))
        except Exception:
            reply = (False, traceback.format_exc())
        faulthandler.cancel_dump_traceback_later()
        # With torch.save, so that tensors of any device can be loaded on the CPU.
        buffer = io.BytesIO()
        torch.save(reply, buffer)
        connection.send_bytes(buffer.getvalue())


def _join_group(rank, world_size, backend, store, timeout):
    options = {"rank": rank, "world_size": world_size, "timeout": timeout}
    dist.init_process_group(backend, init_method=store, **options)


def _leave_group(rank):
    if dist.is_initialized():
        dist.destroy_process_group()
