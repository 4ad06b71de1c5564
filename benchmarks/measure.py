"""Time and memory of a step.

Times of several are interleaved: medians, with the 20th and 80th percentile. Memory is the peak of
what PyTorch hands out, and a limit makes too much of it an error, not a kill.
"""

import gc
import re
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import accumulate
from pathlib import Path
from statistics import quantiles

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.benchmark import Timer

# Written between timed calls, so that none finds its inputs in the L2 cache.
FLUSH_BYTES = 256 * 10**6
# Left to everything else on the machine when a process is limited to what is available.
RESERVE = 10**9
# What a container may hold: of cgroups, version 2 and 1.
LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def wall_seconds(call: Callable[[], object], least: float) -> float:
    """Of a call among others like it, as in training: the median over `least` seconds or more."""
    timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    return float(timer.blocked_autorange(min_run_time=least).median)


def interleaved(
    steps: dict[str, Callable[[], object]],
    device: torch.device,
    seconds: float,
    least: int = 3,
    most: int = 30,
    ahead: int = 0,
) -> dict[str, list[float]]:
    """Milliseconds of each step, run by run, all steps in turn; to be warmed up by the caller.

    Each turn begins with the next step, so that none always follows the same one. (PyTorch's
    `Timer` measures one at a time.) It takes about `seconds`, with `least` to `most` turns.
    ahead: see `milliseconds`.
    """
    flush = torch.empty(FLUSH_BYTES // 4, device=device) if device.type == "cuda" else None
    found: dict[str, list[float]] = {name: [] for name in steps}
    begun = time.perf_counter()
    for turn in range(most if steps else 0):
        if turn >= least and time.perf_counter() - begun > seconds:
            break
        names = list(found)
        first = turn % len(names)
        for name in (*names[first:], *names[:first]):
            if flush is not None:
                flush.zero_()
            found[name].append(milliseconds(steps[name], device, ahead))
    return found


def milliseconds(step: Callable[[], object], device: torch.device, ahead: int = 0) -> float:
    """Of one run: of the device's work on CUDA, by the wall clock elsewhere.

    ahead: cycles that the device sleeps before, while Python launches what is timed.
    """
    if device.type != "cuda":
        begun = time.perf_counter()
        step()
        return 1e3 * (time.perf_counter() - begun)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    if ahead:
        torch.cuda._sleep(ahead)
    start.record()
    step()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def columns(runs: list[float]) -> dict[str, float | int]:
    """Runs as columns of a row; a single one has no percentiles."""
    if len(runs) == 1:
        return {"runs": 1, "ms": runs[0]}
    deciles = quantiles(runs, n=10, method="inclusive")
    return {"runs": len(runs), "ms": deciles[4], "p20": deciles[1], "p80": deciles[7]}


def launches_of(step: Callable[[], object], device: torch.device) -> dict[str, float]:
    """Columns of one step: its wall time, its launches, its time in a CUDA graph.

    In small batches a step is 20 to 200 microseconds of matrix products, so that the wall time is
    that of Python and launches; the graph's time is what is left without them.
    """
    row = {"wall ms": 1e3 * wall_seconds(step, 0.2)}
    if spent := profiled(step, device):
        row["launches"] = sum(count for count, _ in spent.values())
    if device.type == "cuda":
        from triton.testing import do_bench_cudagraph

        with suppress(Exception):  # not every library can be captured
            row["graph ms"] = do_bench_cudagraph(step, rep=5, return_mode="median")
    return row


def profiled(call: Callable[[], object], device: torch.device) -> dict[str, tuple[int, float]]:
    """By kernel, how often it is launched and its microseconds in all, as the profiler sees it.

    On CPU, where there are no launches: PyTorch's operators. Nothing where it may not look.
    """
    on_cuda = device.type == "cuda"
    kind, own = ("CUDA", "self_device_time_total") if on_cuda else ("CPU", "self_cpu_time_total")
    with profile(activities=[getattr(ProfilerActivity, kind)]) as profiler:
        call()
        if on_cuda:
            torch.cuda.synchronize()
    events = [e for e in profiler.key_averages() if e.device_type.name == kind and getattr(e, own)]
    return {e.key: (e.count, getattr(e, own)) for e in events}


def allocated_peak(device: torch.device, work: Callable[[], object]) -> int:
    """The most bytes that PyTorch's allocator hands out during `work`, beyond those before.

    On the CPU the profiler reports each allocation, also inside custom operators and in the middle
    of others. What libraries allocate themselves is not in it.
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()  # whatever the work before kept
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
        gc.collect()  # what lies in reference cycles
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    if not events:
        raise RuntimeError("the profiler reports no memory")
    events.sort(key=lambda event: event.start_ns())
    return max(0, *accumulate(event.nbytes() for event in events))


def limit_to_available() -> int | None:
    """Let this process allocate what the machine can give and no more; returns those bytes.

    Linux only, None elsewhere. Beyond them an allocation fails, which Python can catch, instead of
    the system ending some process to get memory. Should it come to that, this one is the first.
    """
    if sys.platform != "linux":
        return None
    import resource

    limits = [Path(file).read_text().strip() for file in LIMITS if Path(file).exists()]
    found = [int(limit) for limit in limits if limit.isdigit()]
    available = max(0, min([_bytes("meminfo", "MemAvailable"), *found]) - RESERVE)
    most = _bytes("self/status", "VmData") + available
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    Path("/proc/self/oom_score_adj").write_text("1000")
    return available


def _bytes(file: str, name: str) -> int:
    """Of a line `name: ... kB` in /proc."""
    found = re.search(rf"^{name}:\s*(\d+) kB$", Path("/proc", file).read_text(), re.MULTILINE)
    return int(found[1]) * 1024 if found else 0
