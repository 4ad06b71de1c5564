"""Memory: the peak of a stretch of work, what autograd keeps, and a limit that ends in an error."""

import gc
import json
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

OUT_OF_MEMORY = "out of memory"
# Left to everything else on the machine when a process is limited to what is available.
RESERVE = 512 * 10**6
# cgroups, version 2 and 1: what a container may hold, what it holds, and of that, in its
# statistics, the cached files that it would give back.
CGROUPS = (
    ("/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    (
        "/sys/fs/cgroup/memory",
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        "total_inactive_file",
    ),
)


class Peak:
    """The most bytes held from now on, beyond those held now.

    On CUDA: what the allocator handed out. On CPU: the resident set of the process (Linux only,
    None elsewhere), which is the work's own only where nothing freed before can be used again: in
    a fresh process.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            self._before = torch.cuda.memory_allocated(device)
        elif sys.platform == "linux":
            # The peak becomes what is resident now. (`ru_maxrss` would keep the parent's.)
            Path("/proc/self/clear_refs").write_text("5")
            self._before = _status("VmRSS")

    def extra(self) -> int | None:
        """Bytes at the peak so far, less those at the start."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            return torch.cuda.max_memory_allocated(self._device) - self._before
        return _status("VmHWM") - self._before if sys.platform == "linux" else None


def _status(field: str) -> int:
    """Bytes, from /proc/self/status."""
    return _kilobytes("/proc/self/status", field)


def _kilobytes(file: str, field: str) -> int:
    lines = Path(file).read_text().splitlines()
    line = next(line for line in lines if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


@contextmanager
def kept_by_autograd(inputs: Iterable[Tensor]) -> Iterator[Callable[[], int]]:
    """Yields a function: bytes that the graph built inside keeps alive for its backward pass.

    Every storage counts once and whole, however many views of it were saved. The storages of
    `inputs` do not count: they are alive anyway. What an autograd function hides from
    `save_for_backward` is not seen.
    """
    own = {tensor.untyped_storage().data_ptr() for tensor in inputs}
    # Addresses, not tensors: a saved tensor must be freed when the backward pass is done with it.
    # None is used twice, because what is saved lives at least until the forward pass has ended.
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield lambda: sum(storages.values())


def available_bytes() -> int | None:
    """What the machine, or the container, can still give without swapping; None if unknown."""
    if sys.platform != "linux":
        return None
    available = _kilobytes("/proc/meminfo", "MemAvailable")
    for folder, limit, usage, cached in CGROUPS:
        where = Path(folder)
        if (where / limit).exists() and (most := (where / limit).read_text().strip()) != "max":
            statistics = dict(
                line.split() for line in (where / "memory.stat").read_text().splitlines()
            )
            held = int((where / usage).read_text()) - int(statistics.get(cached, 0))
            available = min(available, int(most) - held)
    return max(0, available)


def limit_to_available() -> int | None:
    """Let this process allocate what is available and no more; returns those bytes.

    Beyond them an allocation fails, which Python can catch, instead of the system ending some
    process to get memory. Should it come to that, this process is the first to go.
    """
    available = available_bytes()
    if available is None:
        return None
    import resource

    allowed = max(0, available - RESERVE)
    total = _status("VmData") + allowed
    resource.setrlimit(resource.RLIMIT_DATA, (total, total))
    Path("/proc/self/oom_score_adj").write_text("1000")
    return allowed


def outcome_of(error: Exception) -> str:
    """What went wrong, in one line; running out of memory is a result like any other."""
    text = str(error)
    # The last two: CUDA's and Triton's own, and cuBLAS', when the allocator holds the whole card.
    signs = ("can't allocate memory", "not enough memory", "std::bad_alloc", "out of memory",
             "alloc_failed")  # fmt: skip
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or any(
        sign in text.lower() for sign in signs
    ):
        return OUT_OF_MEMORY
    return f"{type(error).__name__}: {(text.strip().splitlines() or [''])[0]}"


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


def allocated_peak(device: torch.device, work: Callable[[], object]) -> int | None:
    """The most bytes that PyTorch's allocator hands out during `work`, beyond those before."""
    if device.type == "cpu":
        return peak_of(allocations(work))
    peak = Peak(device)
    work()
    return peak.extra()
