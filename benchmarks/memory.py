"""Memory: the peak of a stretch of work, what autograd keeps, and a limit that ends in an error."""

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

OUT_OF_MEMORY = "out of memory"
# Left to everything else on the machine when a process is limited to what is available.
RESERVE = 512 * 10**6
# cgroups, version 2 and 1: what a container may hold, and what it holds.
CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
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
    for limit, usage in CGROUPS:
        if Path(limit).exists() and (most := Path(limit).read_text().strip()) != "max":
            available = min(available, int(most) - int(Path(usage).read_text()))
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
    if (
        isinstance(error, torch.OutOfMemoryError | MemoryError)
        or "can't allocate memory" in text
        or "not enough memory" in text
        or "std::bad_alloc" in text
    ):
        return OUT_OF_MEMORY
    return f"{type(error).__name__}: {(text.strip().splitlines() or [''])[0]}"


def environment_of_fresh_process() -> dict[str, str]:
    """The environment in which the resident set follows the allocations closely.

    glibc then gives every block of 256 KB or more back as soon as it is freed. (With a lower bound
    a training step takes several times as long.)
    """
    return {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**18)}
