"""How much of the machine others used meanwhile: times measured beside other work mean little.

Threads of one product wait for each other. If one of them has no core, all of them lose whole time
slices, and a median of such runs is as steady as it is wrong.
"""

import os
from pathlib import Path

STAT = Path("/proc/stat")
# Beyond this share of all cores a record says that the machine was busy.
BUSY = 0.1


class Contention:
    """From its creation on. Linux only; None elsewhere."""

    def __init__(self) -> None:
        self._before = _seconds()

    def share(self) -> float | None:
        """What other processes took of all cores' time, 0 to 1."""
        before, after = self._before, _seconds()
        if before is None or after is None:
            return None
        everyone, own, total = (late - early for early, late in zip(before, after, strict=True))
        return min(1.0, max(0.0, everyone - own) / total) if total > 0 else None


def _seconds() -> tuple[float, float, float] | None:
    """Of all cores: busy, busy for this process and its ended children, and altogether."""
    if not STAT.exists():
        return None
    first = STAT.read_text().splitlines()[0].split()[1:9]
    user, nice, system, idle, io_wait, *interrupts = (float(field) for field in first)
    busy = user + nice + system + sum(interrupts)  # the last: stolen by other virtual machines
    ticks = os.sysconf("SC_CLK_TCK")
    return busy / ticks, sum(os.times()[:4]), (busy + idle + io_wait) / ticks
