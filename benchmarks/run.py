"""One run of a benchmark command: its device, its clock, its results so far, and its record.

All tables and numbers of the benchmarks are formatted here. A record is a page, and rows that are
appended to `results.csv`.
"""

import argparse
import csv
import math
import os
import platform
import re
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from benchmarks import ROOT
from cyclip_loss import CyCLIPWarning, __version__

PACKAGES = ("triton", "numpy", "open_clip_torch", "memeff", "inf-cl", "siglip-kernel")
Row = dict[str, Any]  # a row of a table, by column
# Of results.csv. Each row is one loss in one case: first what was measured and on what, then how
# long the middle run and the runs at the 20th and 80th percentile took, memory, and errors.
CSV_COLUMNS = (
    *("date", "commit", "device", "torch", "triton", "section", "N", "D", "dtype", "ranks"),
    *("|T - I|", "loss", "computes", "outcome", "runs", "ms", "p20", "p80", "peak MB"),
    *("value", "gradient", "logit-scale gradient"),
)
SEED = 0
OK = "ok"
SUMMARY = {  # a column of the rows, and the title of its table
    "ms": "Forward and backward, ms",
    "peak MB": "Peak memory, MB",
    "pairs/s": "Pairs per second",
    "share of a step": "Share of a step",
    "gradient": "Relative error of the gradient",
}
# Parts of errors that mean "out of memory". "alloc_failed" is cuBLAS's: it cannot allocate when
# PyTorch's allocator has all memory of the GPU.
OUT_OF_MEMORY = (
    "t allocate memory|not enough memory|std::bad_alloc|out of memory|alloc_failed|MemoryError"
)


@dataclass
class Section:
    """The results of one part of a run: rows of a table, and notes."""

    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class Run:
    """The device, the clock, and the sections by name. Times of a dry run mean nothing."""

    def __init__(self, device: torch.device, dry_run: bool = False, quiet: bool = False) -> None:
        """quiet: print and write nothing, as all ranks but one."""
        torch.manual_seed(SEED)
        # The losses are as the paper writes them, and large batches are measured on purpose.
        warnings.filterwarnings("ignore", "lambda = ", CyCLIPWarning)
        self.device, self.dry_run, self.quiet = device, dry_run, quiet
        self.sections: dict[str, Section] = {}
        self.section = Section()
        self.failures = 0  # of all sections
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
        if not self.quiet:
            print(f"[{self.elapsed():6.1f} s] {text}", flush=True)

    @contextmanager
    def attempt(self, **values: Any) -> Iterator[Row]:
        """Add a row, which the block fills in. An exception in the block becomes its outcome."""
        row = {**values, "outcome": "interrupted"}
        self.section.rows.append(row)
        try:
            yield row
            row["outcome"] = OK
        except Exception as error:  # a failure must not end the run
            row["outcome"] = describe(error)

    def fail(self, text: str) -> None:
        """Note and print a failure."""
        self.failures += 1
        self.note(f"FAILED {text}")

    def note(self, text: str) -> None:
        """Note and print what the section left out, or why its results may be wrong."""
        self.section.notes.append(text)
        self.say(text)

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


def describe(error: Exception) -> str:
    """The outcome of a row with this error: "out of memory", or its type and first line."""
    if re.search(OUT_OF_MEMORY, repr(error), re.IGNORECASE):
        return "out of memory"
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
    found = {
        "cyclip_loss": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    found |= {d.name: d.version for d in metadata.distributions() if d.name in PACKAGES}
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    with suppress(OSError, subprocess.CalledProcessError):  # no git, or no repository
        found["commit"] = subprocess.check_output(git, text=True).strip()
    return found


def markdown(run: Run, found_versions: dict[str, str]) -> str:
    """The record as a page: machine, versions, the summary, and what each section found."""
    shown = ", ".join(f"{name} {version}" for name, version in found_versions.items())
    allocator = [f"{name}={x}" for name, x in os.environ.items() if name.startswith("MALLOC_")]
    command = " ".join([*sorted(allocator), "python -m benchmarks", *sys.argv[1:]])
    parts = [
        f"# {device_name(run.device)}, {run.date.isoformat(timespec='minutes')}",
        "**DRY RUN** on the CPU: its times mean nothing." if run.dry_run else "",
        f"`{command}`, {run.elapsed():.0f} seconds; {shown}.",
        f"Load before the run: {run.load:.2f}; do not trust the times if this exceeds a quarter of "
        "the cores.",
        "benchmarks/README.md explains the columns.",
    ]
    if tables := summary(run.sections):
        parts.append(f"## Summary\n\n{tables}")
    for name, section in run.sections.items():
        notes = (f"```\n{note}\n```" if "\n" in note else f"- {note}" for note in section.notes)
        parts += [f"## {name}", table(section.rows), *notes]
    return "\n\n".join(filter(None, parts)) + "\n"


def summary(sections: dict[str, Section]) -> str:
    """A table for each column of SUMMARY, with the cases as columns and a line for each loss."""
    return "\n\n".join(
        f"{title}\n\n{table(compare_losses(section.rows, column))}"
        for section in sections.values()
        for column, title in SUMMARY.items()
        if any(column in row for row in section.rows)
    )


def compare_losses(rows: list[Row], column: str) -> list[Row]:
    """A line for each loss, with a cell for each case. Ratios are to the first line."""
    first = {case(row): row for row in rows if row["loss"] == rows[0]["loss"]}
    lines: dict[str, Row] = {}
    for row in rows:
        cell = "" if row["outcome"] == OK else row["outcome"]
        if column in row:
            cell = format_number(row[column])
            base = first.get(case(row), {})
            if column in base and base is not row:
                cell += f" ({format_number(row[column] / base[column])} ×)"
        lines.setdefault(row["loss"], {"loss": row["loss"]})[case(row)] = cell
    return list(lines.values())


def case(row: Row) -> str:
    """The heading of a row's case."""
    distance = f", {row['|T - I|']}" if "|T - I|" in row else ""
    return f"{row['N']:,} × {row['D']:,}, {row['dtype']}{distance}"


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
    """A number with three significant digits and commas between thousands. Text stays as it is."""
    if isinstance(value, float):
        value = float(f"{value:.3g}")
        return f"{value:,.0f}" if 1000 <= abs(value) < 1e9 else f"{value:g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def append(file: Path, run: Run, name: str, found_versions: dict[str, str]) -> None:
    """Append a section's rows of losses to a CSV file. Rows that are there are never changed."""
    common = {
        "date": run.date.isoformat(timespec="seconds"),
        "section": name,
        "device": device_name(run.device),
        **found_versions,
    }
    with file.open("a", newline="", encoding="utf-8") as opened:
        writer = csv.DictWriter(opened, CSV_COLUMNS, extrasaction="ignore", lineterminator="\n")
        if opened.tell() == 0:  # a new file
            writer.writeheader()
        for row in run.sections[name].rows:
            digits = {key: f"{x:.6g}" for key, x in row.items() if isinstance(x, float)}
            writer.writerow(common | row | digits)


def run_sections(
    run: Run, options: argparse.Namespace, sections: Mapping[str, Callable[[Run], None]]
) -> Path:
    """Run the sections one by one, and print the summary. Returns the record's page.

    The page and `results.csv` are written after each section, and when the command is interrupted.
    """
    name = options.name or f"{options.command}-{run.date:%Y-%m-%dT%H%M}"
    page, found_versions = options.out / f"{name}.md", versions()
    page.parent.mkdir(parents=True, exist_ok=True)  # the name may have folders
    for section, measure in sections.items():
        run.section = run.sections[section] = Section()
        run.say(section)
        try:
            measure(run)
        except KeyboardInterrupt:
            run.fail("interrupted")
            break
        except Exception as error:  # it ends the section, but not the run
            run.fail(f"{describe(error)}\n{traceback.format_exc()}")
        finally:
            if not run.quiet:
                page.write_text(markdown(run, found_versions), encoding="utf-8")
                if not run.dry_run:
                    append(page.with_name("results.csv"), run, section, found_versions)
    run.say(f"{run.failures} failures; record in {page}\n\n{summary(run.sections)}\n")
    return page
