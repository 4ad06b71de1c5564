"""One run of a benchmark command: its device, its clock, and what it found so far."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class Section:
    """What one part of a run found. `rows` become a table."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    seconds: float = 0.0


class Run:
    """Where, how long, and the sections by name. A dry run is on CPU, tiny, and proves no speed."""

    def __init__(
        self,
        dry_run: bool,
        seed: int,
        budget: float = math.inf,
        device: torch.device | None = None,
    ) -> None:
        self.dry_run, self.seed, self.budget = dry_run, seed, budget
        self.device = device or torch.device("cpu" if dry_run else "cuda")
        self.sections: dict[str, Section] = {}
        self.section = Section()
        self._start = time.perf_counter()

    def elapsed(self) -> float:
        """Seconds since the run began."""
        return time.perf_counter() - self._start

    def remaining(self) -> float:
        """Seconds left of the budget."""
        return self.budget - self.elapsed()

    def say(self, text: str) -> None:
        """Print progress with the time."""
        print(f"[{self.elapsed():6.1f} s] {text}", flush=True)

    @contextmanager
    def part(self, name: str) -> Iterator[Section]:
        """Collect into a new section. An exception in it is a failure of it, not of the run."""
        outer, self.section = self.section, Section()
        self.sections[name] = self.section
        self.say(name if self.budget == math.inf else f"{name} ({self.remaining():.0f} s left)")
        start = self.elapsed()
        try:
            yield self.section
        except Exception as error:
            lines = str(error).strip().splitlines() or [""]
            self.fail(f"{type(error).__name__}: {lines[0]}")
        self.section.seconds = self.elapsed() - start
        state = f"{len(self.section.failures)} FAILED" if self.section.failures else "ok"
        self.say(f"{name}: {state}, {len(self.section.rows)} results")
        self.section = outer

    def row(self, **values: Any) -> None:
        """Add a line to the section's table."""
        self.section.rows.append(values)

    def fail(self, text: str) -> None:
        """Note and print a failure."""
        self.section.failures.append(text)
        self.say(f"FAILED {text}")

    def warn(self, text: str) -> None:
        """Note and print what makes results doubtful."""
        self.section.warnings.append(text)
        self.say(f"WARNING {text}")

    def skip(self, what: str, why: str) -> None:
        """Note and print what was left out, and why."""
        self.section.skipped.append(f"{what}: {why}")
        self.say(f"skipped {what}: {why}")

    def pairs(
        self,
        n: int,
        d: int,
        dtype: torch.dtype = torch.float32,
        distance: float | None = None,
        sign: int = 1,
    ) -> tuple[Tensor, Tensor]:
        """Random unit rows, (n, d) twice. With a distance, texts are that near to sign * images."""
        generator = torch.Generator(self.device).manual_seed(self.seed)
        normal = (torch.randn(n, d, device=self.device, generator=generator) for _ in range(2))
        image, text = (torch.nn.functional.normalize(rows, dim=1) for rows in normal)
        if distance is not None:
            text = sign * torch.nn.functional.normalize(image + distance * text, dim=1)
        return image.to(dtype), text.to(dtype)
