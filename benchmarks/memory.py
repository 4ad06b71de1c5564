"""Memory: the peak of a stretch of work, and a limit whose excess is an error, not a kill."""

import gc
import json
import sys
import tempfile
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.run import one_line

OUT_OF_MEMORY = "out of memory"
# Left to everything else on the machine when a process is limited to what is available.
RESERVE = 10**9
# What a container may hold: of cgroups, version 2 and 1.
LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def allocations(work: Callable[[], object]) -> list[int]:
    """Bytes of each allocation on the CPU during `work`, in order; what is freed is negative.

    The profiler reports all that PyTorch's allocator does, also inside custom operators and in the
    middle of others, which hooks on outputs would miss. What libraries allocate themselves is not
    in it.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = work()  # bound to a name: alive at the end
        gc.collect()  # what lies in reference cycles
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(trace))
        del result
        events = json.loads(trace.read_text())["traceEvents"]
    events = sorted((e for e in events if e["name"] == "[memory]"), key=lambda e: e["ts"])
    if not events:
        raise RuntimeError("the profiler reports no memory")
    return [event["args"]["Bytes"] for event in events]


def peak_of(events: list[int]) -> int:
    """The most bytes held at a time, of `allocations`."""
    return max(0, *accumulate(events))


def allocated_peak(device: torch.device, work: Callable[[], object]) -> int:
    """The most bytes that PyTorch's allocator hands out during `work`, beyond those before."""
    if device.type != "cuda":
        return peak_of(allocations(work))
    torch.cuda.empty_cache()  # whatever the work before kept
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    work()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


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
    available = max(0, min([_field("meminfo", "MemAvailable"), *found]) - RESERVE)
    most = _field("self/status", "VmData") + available
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    Path("/proc/self/oom_score_adj").write_text("1000")
    return available


def _field(file: str, name: str) -> int:
    """Bytes, of a line `name: ... kB` of /proc."""
    lines = dict(line.split(":") for line in Path("/proc", file).read_text().splitlines())
    return int(lines[name].split()[0]) * 1024


def outcome_of(error: Exception) -> str:
    """What went wrong, in one line; running out of memory is a result like any other."""
    # The last two: CUDA's and Triton's own, and cuBLAS', when the allocator holds the whole card.
    signs = ("can't allocate memory", "not enough memory", "std::bad_alloc", "out of memory",
             "alloc_failed")  # fmt: skip
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or any(
        sign in str(error).lower() for sign in signs
    ):
        return OUT_OF_MEMORY
    return one_line(error)
