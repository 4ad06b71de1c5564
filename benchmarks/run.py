"""One run of a command: its device, its clock, and what it found so far."""

import math
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

SEED = 0
OK, OUT_OF_MEMORY = "ok", "out of memory"
# What errors say that mean it. The last two: CUDA's and Triton's own, and cuBLAS' when PyTorch's
# allocator holds the whole card.
SIGNS = ("can't allocate memory", "not enough memory", "std::bad_alloc", "out of memory",
         "alloc_failed")  # fmt: skip


@dataclass
class Section:
    """What one part of a run found: rows of a table, what they mean, failures and other notes.

    The first line of a failure says what failed, the others show it.
    """

    about: str = ""
    rows: list[dict[str, Any]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class Run:
    """Where, how long, and the sections by name. A dry run is tiny, and proves no speed."""

    def __init__(self, device: torch.device, dry_run: bool = False) -> None:
        torch.manual_seed(SEED)
        self.device, self.dry_run = device, dry_run
        self.sections: dict[str, Section] = {}
        self.section = Section()
        self.deadline = math.inf  # in seconds since the run began
        self.began, self._start = datetime.now(), time.perf_counter()

    def elapsed(self) -> float:
        """Seconds since the run began."""
        return time.perf_counter() - self._start

    def remaining(self) -> float:
        """Seconds left."""
        return self.deadline - self.elapsed()

    def say(self, text: str) -> None:
        """Print progress with the time."""
        print(f"[{self.elapsed():6.1f} s] {text}", flush=True)

    @contextmanager
    def part(self, name: str) -> Iterator[Section]:
        """Collect into a new section. An exception in it is a failure of it, not of the run."""
        outer, self.section = self.section, Section()
        self.sections[name] = self.section
        self.say(name)
        try:
            yield self.section
        except Exception as error:
            self.fail(f"{one_line(error)}\n{traceback.format_exc()}")
        self.section = outer

    def row(self, **values: Any) -> None:
        """Add a line to the section's table."""
        self.section.rows.append(values)

    @contextmanager
    def attempt(self, **values: Any) -> Iterator[dict[str, Any]]:
        """Add a line that the block completes. An exception in it is the line's outcome."""
        self.row(**values, outcome=OK)
        row = self.section.rows[-1]
        try:
            yield row
        except Exception as error:  # of any library: what ends one must not end the others
            row["outcome"] = outcome_of(error)

    def fail(self, text: str) -> None:
        """Note and print a failure."""
        self.section.failures.append(text)
        self.say(f"FAILED {text}")

    def note(self, text: str) -> None:
        """Note and print what was left out, or makes results doubtful."""
        self.section.notes.append(text)
        self.say(text)

    def failures(self) -> int:
        """Of all sections."""
        return sum(len(section.failures) for section in self.sections.values())

    def pairs(
        self, n: int, d: int, dtype: torch.dtype = torch.float32, distance: float | None = None
    ) -> tuple[Tensor, Tensor]:
        """Random unit rows, (n, d) twice; with a distance, texts are that near to their images."""
        generator = torch.Generator(self.device).manual_seed(SEED)
        image, text = (
            normalize(torch.randn(n, d, device=self.device, generator=generator)) for _ in range(2)
        )
        if distance is not None:
            text = normalize(image + distance * text)
        return image.to(dtype), text.to(dtype)


def one_line(error: BaseException) -> str:
    """The kind of an error, and the first line of what it says."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def outcome_of(error: Exception) -> str:
    """What went wrong, in one line; running out of memory is a result like any other."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or any(
        sign in str(error).lower() for sign in SIGNS
    ):
        return OUT_OF_MEMORY
    return one_line(error)
