"""The clock and the power of the GPU while something runs, as nvidia-smi sees them."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median
from threading import Event, Thread

import torch

Samples = list[tuple[float, float]]  # MHz of the SMs, watts
SECONDS = 0.1  # between two samples


@contextmanager
def clock_and_power(device: torch.device) -> Iterator[Samples]:
    """A list that fills while the block runs; it stays empty without nvidia-smi."""
    samples: Samples = []
    ended = Event()

    def watch() -> None:
        uuid = str(torch.cuda.get_device_properties(device).uuid).removeprefix("GPU-")
        command = ["nvidia-smi", f"--id=GPU-{uuid}", "--query-gpu=clocks.sm,power.draw"]
        command.append("--format=csv,noheader,nounits")
        while not ended.wait(SECONDS):
            try:
                answer = subprocess.run(command, capture_output=True, text=True, timeout=5)
                clock, power = answer.stdout.splitlines()[0].split(",")
                samples.append((float(clock), float(power)))
            except (OSError, subprocess.SubprocessError, ValueError, IndexError):
                return

    watcher = Thread(target=watch, daemon=True)
    if device.type == "cuda":
        watcher.start()
    try:
        yield samples
    finally:
        ended.set()
        if watcher.ident is not None:
            watcher.join()


def columns(samples: Samples) -> dict[str, float]:
    """Medians as columns of a row; none of them without samples."""
    if not samples:
        return {}
    clocks, powers = zip(*samples, strict=True)
    return {"MHz": median(clocks), "W": median(powers)}
