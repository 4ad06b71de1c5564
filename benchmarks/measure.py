"""Time and memory of a step.

Steps that are compared run in turn, and the record has the median, the 20th and the 80th
percentile. Memory is the peak of what PyTorch's allocator holds. A limit turns too large an
allocation into an error, so that the system does not end the process.
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
RESERVED_BYTES = 10**9
# Files with the memory limit of a container: cgroups, version 2 and 1.
LIMIT_FILES = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def wall_seconds(call: Callable[[], object], min_seconds: float) -> float:
    """The median time of a call among others like it, as in training.

    Calls are repeated for `min_seconds` or longer.
    """
    timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    return float(timer.blocked_autorange(min_run_time=min_seconds).median)


def interleaved(
    steps: dict[str, Callable[[], object]],
    device: torch.device,
    seconds: float,
    min_rounds: int = 3,
    max_rounds: int = 30,
    sleep_cycles: int = 0,
) -> dict[str, list[float]]:
    """Milliseconds of each step in each round. A round runs all steps; the caller has warmed up.

    Each round begins with the next step, so that no step always follows the same one. (PyTorch's
    `Timer` measures one call only.) New rounds start until `seconds` are over, but at least
    `min_rounds` and at most `max_rounds`. sleep_cycles: see `milliseconds`.
    """
    flush = torch.empty(FLUSH_BYTES // 4, device=device) if device.type == "cuda" else None
    times: dict[str, list[float]] = {name: [] for name in steps}
    start = time.perf_counter()
    for index in range(max_rounds if steps else 0):
        if index >= min_rounds and time.perf_counter() - start > seconds:
            break
        names = list(steps)
        first = index % len(names)
        for name in names[first:] + names[:first]:
            if flush is not None:
                flush.zero_()
            times[name].append(milliseconds(steps[name], device, sleep_cycles))
    return times


def milliseconds(step: Callable[[], object], device: torch.device, sleep_cycles: int = 0) -> float:
    """The time of one run: of the device's work on CUDA, by the wall clock elsewhere.

    sleep_cycles: the device sleeps this long first, while Python launches what is timed.
    """
    if device.type != "cuda":
        begin = time.perf_counter()
        step()
        return 1e3 * (time.perf_counter() - begin)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    if sleep_cycles:
        torch.cuda._sleep(sleep_cycles)
    start.record()
    step()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def time_columns(times: list[float]) -> dict[str, float | int]:
    """Columns of a row: how many runs, their median and percentiles. One run has no percentiles."""
    if len(times) == 1:
        return {"runs": 1, "ms": times[0]}
    deciles = quantiles(times, n=10, method="inclusive")
    return {"runs": len(times), "ms": deciles[4], "p20": deciles[1], "p80": deciles[7]}


def launch_columns(step: Callable[[], object], device: torch.device) -> dict[str, float]:
    """Columns of a row: a step's wall time, its launches, and its time in a CUDA graph.

    In small batches the matrix products of a step take 20 to 200 microseconds, so the wall time is
    that of Python and launches. The graph's time is what remains without them.
    """
    row = {"wall ms": 1e3 * wall_seconds(step, 0.2)}
    if kernels := profiled(step, device):
        row["launches"] = sum(count for count, _ in kernels.values())
    if device.type == "cuda":
        from triton.testing import do_bench_cudagraph

        with suppress(Exception):  # not every library can be captured
            row["graph ms"] = do_bench_cudagraph(step, rep=5, return_mode="median")
    return row


def profiled(call: Callable[[], object], device: torch.device) -> dict[str, tuple[int, float]]:
    """For each kernel: how often the call launches it, and its microseconds in all.

    On a CPU, where nothing is launched, PyTorch's operators take the kernels' place. The result is
    empty where the profiler has no access.
    """
    on_cuda = device.type == "cuda"
    kind, field = ("CUDA", "self_device_time_total") if on_cuda else ("CPU", "self_cpu_time_total")
    with profile(activities=[getattr(ProfilerActivity, kind)]) as profiler:
        call()
        if on_cuda:
            torch.cuda.synchronize()
    return {
        event.key: (event.count, getattr(event, field))
        for event in profiler.key_averages()
        if event.device_type.name == kind and getattr(event, field)
    }


def allocated_peak(device: torch.device, work: Callable[[], object]) -> int:
    """The largest number of bytes that PyTorch allocates during `work`, beyond those before.

    On a CPU the profiler reports every allocation, also inside custom operators. Memory that other
    libraries allocate themselves is not counted.
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()  # drop what earlier work left in the cache
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
        gc.collect()  # frees reference cycles
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    if not events:
        raise RuntimeError("the profiler reports no memory")
    events.sort(key=lambda event: event.start_ns())
    return max(0, *accumulate(event.nbytes() for event in events))


def limit_to_available() -> int | None:
    """Let this process allocate what the machine can give and no more; returns those bytes.

    Linux only; None elsewhere. Beyond the limit an allocation raises an error that Python can
    catch. If the system must end a process all the same, it chooses this one.
    """
    if sys.platform != "linux":
        return None
    import resource

    limits = [Path(file).read_text().strip() for file in LIMIT_FILES if Path(file).exists()]
    limits_in_bytes = [int(limit) for limit in limits if limit.isdigit()]
    smallest = min([_proc_bytes("meminfo", "MemAvailable"), *limits_in_bytes])
    available = max(0, smallest - RESERVED_BYTES)
    limit = _proc_bytes("self/status", "VmData") + available
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    Path("/proc/self/oom_score_adj").write_text("1000")
    return available


def _proc_bytes(file: str, name: str) -> int:
    """The value of the line `name: ... kB` in a file of /proc, in bytes."""
    found = re.search(rf"^{name}:\s*(\d+) kB$", Path("/proc", file).read_text(), re.MULTILINE)
    return int(found[1]) * 1024 if found else 0
