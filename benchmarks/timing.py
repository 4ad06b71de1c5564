"""Times: candidates interleaved, medians with the 20th and 80th percentile."""

import time
from collections.abc import Callable
from statistics import quantiles

import torch

# Written between timed calls, so that none finds its inputs in the L2 cache.
FLUSH_BYTES = 256 * 10**6


def interleaved(
    steps: dict[str, Callable[[], object]],
    device: torch.device,
    seconds: float,
    least: int = 3,
    most: int = 30,
    ahead: int = 0,
) -> dict[str, list[float]]:
    """Milliseconds of each step, run by run, all steps in turn; to be warmed up by the caller.

    Each turn begins with another step, so that none always follows the same one. For about so many
    seconds, but `least` runs at least and `most` at most. ahead: see `milliseconds`.
    """
    flush = torch.empty(FLUSH_BYTES // 4, device=device) if device.type == "cuda" else None
    found: dict[str, list[float]] = {name: [] for name in steps}
    begun = time.perf_counter()
    for turn in range(most):
        if turn >= least and time.perf_counter() - begun > seconds:
            break
        names = list(found)
        first = turn % len(names) if names else 0
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
