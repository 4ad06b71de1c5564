"""Times: candidates interleaved, medians with the 20th and 80th percentile."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from statistics import quantiles

import torch

# Written between timed calls, so that none finds its inputs in the L2 cache.
FLUSH_BYTES = 256 * 10**6


@dataclass(frozen=True)
class Times:
    """Milliseconds."""

    median: float
    p20: float
    p80: float

    @staticmethod
    def of(milliseconds: list[float]) -> "Times":
        """From single measurements."""
        if len(milliseconds) == 1:
            return Times(*milliseconds * 3)
        deciles = quantiles(milliseconds, n=10, method="inclusive")
        return Times(deciles[4], deciles[1], deciles[7])


class Stopwatch:
    """Marks points in the device's work; events on CUDA, the wall clock elsewhere."""

    def __init__(self, device: torch.device) -> None:
        self.on_cuda = device.type == "cuda"
        self.flush = torch.empty(FLUSH_BYTES // 4, device=device) if self.on_cuda else None

    def mark(self) -> "torch.cuda.Event | float":
        """Now, in the order of the device's work."""
        if not self.on_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def clear(self) -> None:
        """Empty the caches."""
        if self.flush is not None:
            self.flush.zero_()

    def milliseconds(self, start: "torch.cuda.Event | float", end: object) -> float:
        """Between two marks."""
        if isinstance(start, float) and isinstance(end, float):
            return 1e3 * (end - start)
        end.synchronize()
        return start.elapsed_time(end)


# A step calls the function it is given at the end of each of its stretches.
Step = Callable[[Callable[[], None]], None]


def interleaved(
    steps: dict[str, Step],
    device: torch.device,
    seconds: float,
    least: int = 3,
    most: int = 30,
    failed: Callable[[str, Exception], None] | None = None,
) -> dict[str, list[tuple[float, ...]]]:
    """Milliseconds of the stretches of each step, run by run, all steps in turn.

    Each turn begins with another step, so that none always follows the same one. For about so many
    seconds, but `least` runs at least and `most` at most. Steps are warmed up by the caller. A step
    that raises is left out from then on, with all its runs, if there is `failed` to be told.
    """
    watch = Stopwatch(device)
    found: dict[str, list[tuple[float, ...]]] = {name: [] for name in steps}
    begun = time.perf_counter()
    for turn in range(most):
        if turn >= least and time.perf_counter() - begun > seconds:
            break
        names = list(found)
        first = turn % len(names) if names else 0
        for name in (*names[first:], *names[:first]):
            try:
                watch.clear()
                found[name].append(milliseconds(steps[name], watch))
            except Exception as error:
                if failed is None:
                    raise
                del found[name]
                failed(name, error)
    return found


def milliseconds(step: Step, watch: Stopwatch) -> tuple[float, ...]:
    """Of the stretches of one run."""
    marks = [watch.mark()]
    step(lambda: marks.append(watch.mark()))
    return tuple(watch.milliseconds(*ends) for ends in pairwise(marks))
