"""The record of a run: a JSON and a Markdown file, each written whole or not at all.

The only place that writes tables and formats numbers.
"""

import json
import os
import platform
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import cache
from importlib import metadata
from math import floor, log10
from pathlib import Path
from typing import Any

import torch
from torch.utils import collect_env

from benchmarks import ROOT
from benchmarks.run import Run

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("triton", "numpy", "open_clip_torch")


def describe(run: Run) -> dict[str, Any]:
    """Date, machine, versions and command of a run, and its sections."""
    return {
        "dry_run": run.dry_run,
        "device": device_name(run.device),
        "date": run.began.isoformat(timespec="minutes"),
        "command": " ".join(["python -m benchmarks", *sys.argv[1:]]),
        "versions": versions(),
        "sections": {name: asdict(section) for name, section in run.sections.items()},
    }


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's and how many threads PyTorch takes of it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    information = Path("/proc/cpuinfo").read_text() if sys.platform == "linux" else ""
    found = re.search(r"model name\s*: (.*)", information)
    threads = torch.get_num_threads()
    return f"{found[1] if found else platform.machine()}, threads: {threads}"


@cache
def versions() -> dict[str, str]:
    """Of what a measurement depends on, and is there."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    found |= {d.name: d.version for d in metadata.distributions() if d.name in PACKAGES}
    if torch.cuda.is_available():
        found["driver"] = str(collect_env.get_nvidia_driver_version(collect_env.run))
    _, commit, _ = collect_env.run(f"git -C {ROOT} describe --always --dirty")
    return {**found, "commit": commit or "unknown"}


def markdown(record: dict[str, Any], summary: str = "") -> str:
    """The record for people: where and how, what failed, the summary, a table for each section."""
    lines = [f"# {record['device']}, {record['date']}", ""]
    if record["dry_run"]:
        lines += ["**DRY RUN**: on CPU at tiny sizes. No time in it means anything.", ""]
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    lines += [f"`{record['command']}`; {versions}.", ""]
    for name, section in record["sections"].items():
        for failure in section["failures"]:
            lines += [f"## FAILED {name}", "", "```", failure, "```", ""]
    lines += ["## Summary", "", summary, ""] if summary else []
    for name, section in record["sections"].items():
        lines += [f"## {name}", ""]
        lines += [section["about"], ""] if section["about"] else []
        lines += [table(section["rows"]), ""] if section["rows"] else []
        lines += [*(f"- {note}" for note in section["notes"]), ""] if section["notes"] else []
    return "\n".join(lines)


def table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table; what a row lacks is left empty."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [columns, *([row.get(key, "") for key in columns] for row in rows)]
    head, *lines = (" | ".join(number(c).replace("|", r"\|") for c in row) for row in cells)
    return "\n".join([f"| {head} |", "|---" * len(columns) + "|", *(f"| {x} |" for x in lines)])


def number(value: Any) -> str:
    """Three significant digits, a comma for thousands; text as it is."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if not 1e-3 <= abs(value) < 1e9:  # also 0, NaN and infinity
        return f"{value:.3g}"
    digits = 2 - floor(log10(abs(value)))
    return f"{round(value, digits):,.{max(0, digits)}f}"


def carry_out(
    run: Run,
    kind: str,
    sections: Mapping[str, Callable[[Run], None]],
    folder: Path,
    summary: Callable[[dict[str, Any]], str] = lambda record: "",
) -> tuple[dict[str, Any], Path]:
    """Run the sections one by one; the record, and its JSON file, <kind>-<device>-<date>.

    It is written after each section, and when the command is interrupted, with a Markdown file
    beside it. NaN is as Python reads it.
    """
    device = re.sub(r"[^a-z0-9]+", "-", device_name(run.device).split(",")[0].lower())
    file = folder / f"{kind}-{device}-{run.began:%Y-%m-%dT%H%M}.json"
    folder.mkdir(parents=True, exist_ok=True)

    def save() -> dict[str, Any]:
        record = describe(run)
        write_whole(markdown(record, summary(record)), file.with_suffix(".md"))
        write_whole(json.dumps(record, indent=1) + "\n", file)
        return record

    try:
        for name, measure in sections.items():
            with run.part(name):
                measure(run)
            save()
    except KeyboardInterrupt:
        run.fail("interrupted")
    run.say(f"{run.failures()} failures; record in {file} and {file.with_suffix('.md')}")
    return save(), file


def write_whole(content: str | bytes, path: Path) -> None:
    """Write a file whole, or leave it as it was."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        unfinished.write_bytes(content if isinstance(content, bytes) else content.encode())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
