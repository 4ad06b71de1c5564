"""One run of a benchmark command: its device, its clock, its results so far, and its record.

All tables and numbers of the benchmarks are formatted here.
"""

import argparse
import json
import math
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from benchmarks import ROOT
from cyclip_loss import __version__

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("triton", "numpy", "open_clip_torch", "memeff", "inf-cl", "siglip-kernel")
Row = dict[str, Any]  # a row of a table, by column
SEED = 0
OK, OUT_OF_MEMORY = "ok", "out of memory"
# Parts of error messages that mean "out of memory". "alloc_failed" is cuBLAS's: it cannot allocate
# when PyTorch's allocator has all memory of the GPU.
OUT_OF_MEMORY_MESSAGES = (
    r"can't allocate memory|not enough memory|std::bad_alloc|out of memory|alloc_failed"
)


@dataclass
class Section:
    """The results of one part of a run: rows of a table, failures, and notes."""

    rows: list[Row] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)  # a summary in the first line, then details
    notes: list[str] = field(default_factory=list)


class Run:
    """The device, the clock, and the sections by name. Times of a dry run mean nothing."""

    def __init__(self, device: torch.device, dry_run: bool = False) -> None:
        torch.manual_seed(SEED)
        self.device, self.dry_run = device, dry_run
        self.sections: dict[str, Section] = {}
        self.section = Section()
        self.deadline = math.inf  # in seconds since the run began
        self.load = os.getloadavg()[0]
        self.date, self._start = datetime.now(), time.perf_counter()

    def elapsed(self) -> float:
        """Seconds since the run began."""
        return time.perf_counter() - self._start

    def remaining(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - self.elapsed()

    def say(self, text: str) -> None:
        """Print progress with the time."""
        print(f"[{self.elapsed():6.1f} s] {text}", flush=True)

    @contextmanager
    def start_section(self, name: str) -> Iterator[Section]:
        """Collect results in a new section. An exception ends the section, but not the run."""
        self.section = self.sections[name] = Section()
        self.say(name)
        try:
            yield self.section
        except Exception as error:
            self.fail(f"{describe(error)}\n{traceback.format_exc()}")

    def add_row(self, **values: Any) -> None:
        """Add a row to the section's table."""
        self.section.rows.append(values)

    @contextmanager
    def attempt(self, **values: Any) -> Iterator[Row]:
        """Add a row, which the block fills in. An exception in the block becomes its outcome."""
        row = {**values, "outcome": OK}
        self.section.rows.append(row)
        try:
            yield row
        except Exception as error:  # a failure must not end the run
            row["outcome"] = describe(error)

    def fail(self, text: str) -> None:
        """Note and print a failure."""
        self.section.failures.append(text)
        self.say(f"FAILED {text}")

    def note(self, text: str) -> None:
        """Note and print what the section left out, or why its results may be wrong."""
        self.section.notes.append(text)
        self.say(text)

    def failures(self) -> int:
        """How many failures all sections have."""
        return sum(len(section.failures) for section in self.sections.values())

    def pairs(
        self, n: int, d: int, dtype: torch.dtype = torch.float32, distance: float | None = None
    ) -> tuple[Tensor, Tensor]:
        """Random image and text features, both (n, d) with rows of unit length.

        distance: about how far apart the two features of a pair are. None: they are independent.
        """
        generator = torch.Generator(self.device).manual_seed(SEED)
        image, text = (
            normalize(torch.randn(n, d, device=self.device, generator=generator)) for _ in range(2)
        )
        if distance is not None:
            text = normalize(image + distance * text)
        return image.to(dtype), text.to(dtype)

    def record(self, versions: dict[str, str]) -> dict[str, Any]:
        """The results so far, with the machine and versions that they depend on."""
        return {
            "dry_run": self.dry_run,
            "device": device_name(self.device),
            "date": self.date.isoformat(timespec="minutes"),
            "command": " ".join(["python -m benchmarks", *sys.argv[1:]]),
            "seconds": self.elapsed(),
            "versions": versions,
            "load": self.load,
            "sections": {name: asdict(section) for name, section in self.sections.items()},
        }


def describe(error: Exception) -> str:
    """The outcome of a row with this error: "out of memory", or its type and first line."""
    is_memory_error = isinstance(error, torch.OutOfMemoryError | MemoryError)
    if is_memory_error or re.search(OUT_OF_MEMORY_MESSAGES, str(error), re.IGNORECASE):
        return OUT_OF_MEMORY
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def device_name(device: torch.device) -> str:
    """The name of the GPU, or the name of the CPU with PyTorch's number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name, processors = platform.machine(), Path("/proc/cpuinfo")
    if processors.exists() and (found := re.search(r"model name\s*: (.*)", processors.read_text())):
        name = found[1]
    return f"{name}, threads: {torch.get_num_threads()}"


def versions() -> dict[str, str]:
    """Versions of the packages that a measurement depends on, and git's commit if there is one."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    found |= {d.name: d.version for d in metadata.distributions() if d.name in PACKAGES}
    found["cyclip_loss"] = __version__
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    with suppress(OSError, subprocess.CalledProcessError):  # no git, or no repository
        found["commit"] = subprocess.check_output(git, text=True).strip()
    return found


def markdown(record: dict[str, Any], summary: str = "") -> str:
    """The record as a page: machine, versions, failures, the summary, and a table per section."""
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    parts = [
        f"# {record['device']}, {record['date']}",
        "**DRY RUN** on the CPU: its times mean nothing." if record["dry_run"] else "",
        f"`{record['command']}`, {record['seconds']:.0f} seconds; {versions}.",
        f"Load before the run: {record['load']:.2f}; above a quarter of the cores, distrust times.",
        "benchmarks/README.md explains the columns.",
    ]
    sections = record["sections"]
    for name, section in sections.items():
        parts += [f"## FAILED {name}\n\n```\n{failure}\n```" for failure in section["failures"]]
    parts += [f"## Summary\n\n{summary}"] if summary else []
    for name, section in sections.items():
        notes = [f"- {note}" for note in section["notes"]]
        parts += [f"## {name}", table(section["rows"]), "\n".join(notes)]
    return "\n\n".join(filter(None, parts)) + "\n"


def table(rows: list[Row]) -> str:
    """The rows as a Markdown table. Cells of missing values are empty. No rows: an empty text."""
    if not rows:
        return ""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [columns, *([format_number(row.get(key, "")) for key in columns] for row in rows)]
    head, *lines = (" | ".join(text.replace("|", r"\|") for text in line) for line in cells)
    rule = "|---" * len(columns) + "|"
    return "\n".join([f"| {head} |", rule, *(f"| {line} |" for line in lines)])


def format_number(value: Any) -> str:
    """A float with three significant digits and commas between thousands. Text stays as it is."""
    if isinstance(value, int):
        return f"{value:,}"
    if not isinstance(value, float):
        return str(value)
    if not 1e-3 <= abs(value) < 1e9:  # also 0, NaN and infinity
        return f"{value:.3g}"
    digits = 2 - math.floor(math.log10(abs(value)))
    return f"{round(value, digits):,.{max(0, digits)}f}"


def run_sections(
    run: Run,
    options: argparse.Namespace,
    sections: Mapping[str, Callable[[Run], None]],
    summary: Callable[[dict[str, Any]], str] = lambda record: "",
) -> tuple[dict[str, Any], Path]:
    """Run the sections one by one. Returns the record and its JSON file.

    This file and a Markdown file with the same name are written after each section, and when the
    command is interrupted. The JSON file may have NaN, which Python reads and the standard forbids.
    """
    folder = options.out or (Path(tempfile.gettempdir()) if run.dry_run else RESULTS)
    folder.mkdir(parents=True, exist_ok=True)
    name = options.name or f"{options.command}-{run.date:%Y-%m-%dT%H%M}"
    file = folder / f"{name}.json"
    found_versions = versions()

    def save() -> dict[str, Any]:
        record = run.record(found_versions)
        file.with_suffix(".md").write_text(markdown(record, summary(record)), encoding="utf-8")
        file.write_text(f"{json.dumps(record, indent=1)}\n")
        return record

    try:
        for section, measure in sections.items():
            with run.start_section(section):
                measure(run)
            save()
    except KeyboardInterrupt:
        run.fail("interrupted")
    run.say(f"{run.failures()} failures; record in {file.with_suffix('.md')}")
    return save(), file
