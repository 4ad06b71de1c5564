"""Measures the time and the memory of a step.

Steps that are compared run in turn. The results are the median and the 20th and 80th percentile of
their times, and the peak of the memory that PyTorch allocates. A limit turns an allocation that is
too large into an error, so that the system does not end the process.
"""

import gc
import re
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from torch.autograd.profiler import profile

# A buffer of this size is overwritten before each timed call, to remove inputs from the L2 cache.
FLUSH_BYTES = 256 * 10**6
MAX_ROUNDS = 300
# Memory that is left to other processes when this process is limited to the available memory.
RESERVED_BYTES = 10**9
CONTAINER = Path("/sys/fs/cgroup")  # a container may use memory.max, and uses memory.current


def interleaved(
    steps: Mapping[str, Callable[[], object]],
    device: torch.device,
    seconds: float,
    min_rounds: int,
    agree: Callable[[float], float] = lambda value: value,
) -> dict[str, list[float]]:
    """The milliseconds of each step in each round. The caller has run each step at least once.

    A round runs every step once. Each round starts with another step, so that background load
    affects all steps equally. (PyTorch's `Timer` times only one function.) The first round decides
    how many fit into `seconds`: at least `min_rounds`, and at most `MAX_ROUNDS`.
    agree: makes its duration the same on all ranks, as they have to run as many rounds.
    """
    flush = torch.empty(FLUSH_BYTES // 4, device=device) if device.type == "cuda" else None
    times: dict[str, list[float]] = {name: [] for name in steps}
    names, rounds, start = list(steps), 1, time.perf_counter()
    while steps and len(times[names[0]]) < rounds:
        for name in names:
            if flush is not None:
                flush.zero_()
            times[name].append(milliseconds(steps[name], device))
        names = names[1:] + names[:1]
        if rounds == 1:
            fitting = seconds / agree(time.perf_counter() - start)
            rounds = round(min(MAX_ROUNDS, max(min_rounds, fitting)))
    return times


def milliseconds(step: Callable[[], object], device: torch.device) -> float:
    """The milliseconds of one run: CUDA events on a GPU, wall-clock time otherwise."""
    if device.type != "cuda":
        before = time.perf_counter()
        step()
        return 1e3 * (time.perf_counter() - before)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def time_columns(times: list[float]) -> dict[str, float | int]:
    """Columns of a row: the number of runs, their median and percentiles."""
    p20, median, p80 = np.percentile(times, (20, 50, 80)).tolist()
    return {"runs": len(times), "ms": median, "p20": p20, "p80": p80}


def allocated_peak(device: torch.device, work: Callable[[], object]) -> int:
    """The peak number of bytes that PyTorch allocates during `work`, without earlier allocations.

    On a CPU, memory that other libraries allocate without PyTorch is not counted.
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()  # free the memory that earlier work left cached
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    return max(accumulate(cpu_allocations(work), initial=0))


def cpu_allocations(work: Callable[[], object]) -> list[int]:
    """The bytes of each allocation during `work`, in order. Freed memory has a negative number.

    PyTorch's profiler reports them, also inside custom operators. What `work` returns is not freed.
    """
    # Not by `torch.profiler.profile`, whose start imports PyTorch's compiler.
    with profile(use_kineto=True, profile_memory=True) as profiler:
        result = work()  # has a name, so that it is alive at the end
        gc.collect()  # frees reference cycles
    del result
    events = [e for e in profiler.kineto_results.events() if e.name() == "[memory]"]
    return [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]


def limit_to_available() -> int | None:
    """Limit this process to the available memory, and return how many bytes it can still allocate.

    An allocation beyond the limit raises an error that Python can catch. If the system still has to
    end a process, it ends this one. Other systems than Linux have no limit, and the result is None.
    """
    if sys.platform != "linux":
        return None
    import resource

    free = _proc_bytes("meminfo", "MemAvailable")
    with suppress(OSError, ValueError):  # no such file, or "max": no limit
        limit, used = (int((CONTAINER / f"memory.{x}").read_text()) for x in ("max", "current"))
        free = min(free, limit - used)
    available = max(0, free - RESERVED_BYTES)
    limit = _proc_bytes("self/status", "VmData") + available
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    with suppress(OSError):  # some containers have a /proc that is read only
        Path("/proc/self/oom_score_adj").write_text("1000")
    return available


def _proc_bytes(file: str, name: str) -> int:
    """The value of the line `name: ... kB` in a file of /proc, in bytes."""
    found = re.search(rf"^{name}:\s*(\d+) kB$", Path("/proc", file).read_text(), re.MULTILINE)
    return int(found[1]) * 1024 if found else 0
