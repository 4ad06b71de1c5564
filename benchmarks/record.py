"""The record of a run: one JSON and one Markdown file, each written whole or not at all."""

import json
import math
import os
import platform
import re
import subprocess
import sys
import tempfile
from datetime import date
from importlib import metadata
from math import floor, log10
from pathlib import Path
from typing import Any

import torch

from benchmarks.checkout import ROOT
from benchmarks.run import Run


def card(device: torch.device) -> str:
    """The GPU's name as part of a file name, "cpu" without one."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's and how many threads PyTorch takes of it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name, information = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if information.exists() and (
        found := re.search(r"model name\s*: (.*)", information.read_text())
    ):
        name = found[1].strip()
    return f"{name}, {torch.get_num_threads()} threads"


def describe(run: Run) -> dict[str, Any]:
    """Everything about a run."""
    return {
        "dry_run": run.dry_run,
        "card": card(run.device),
        "device": device_name(run.device),
        "date": date.today().isoformat(),
        "command": " ".join(["python -m benchmarks", *sys.argv[1:]]),
        "seed": run.seed,
        "seconds": round(run.elapsed(), 1),
        "versions": versions(),
        "sections": {name: vars(section) for name, section in run.sections.items()},
    }


def _finite(value: Any) -> Any:
    """JSON has no infinity and no NaN: they become strings."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


# Of the competitors, named if they are there.
COMPETITORS = ("open_clip_torch", "inf_cl", "memeff")


def read(path: Path) -> dict[str, Any]:
    """A record as `write` wrote it, NaN and infinities numbers again."""
    found: dict[str, Any] = _numbers(json.loads(path.read_text()))
    return found


def _numbers(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_numbers(item) for item in value]
    return float(value) if value in ("nan", "inf", "-inf") else value


def versions() -> dict[str, str]:
    """Of everything that a measurement depends on."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("triton", "numpy", *COMPETITORS):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            if package not in COMPETITORS:
                found[package] = "not installed"
    found["cuda"] = str(torch.version.cuda or torch.version.hip)
    commands = {
        "driver": ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
        "commit": ["git", "-C", str(ROOT), "describe", "--always", "--dirty"],
    }
    for name, command in commands.items():
        try:
            answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
            found[name] = answer.stdout.splitlines()[0].strip()
        except (OSError, subprocess.SubprocessError, IndexError):
            found[name] = "unknown"
    return found


def heading(record: dict[str, Any]) -> list[str]:
    """First lines for people: the machine, the command, the versions, what failed."""
    lines = [f"# {record['device']}, {record['date']}", ""]
    if record["dry_run"]:
        lines += ["**DRY RUN**: on CPU at tiny sizes. No time in it means anything.", ""]
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    lines += [
        f"`{record['command']}`, seed {record['seed']}, {record['seconds']} s; {versions}.",
        "",
    ]
    failures = [
        f"- {name}: {failure}"
        for name, section in record["sections"].items()
        for failure in section["failures"]
    ]
    warnings = [
        f"- {name}: {warning}"
        for name, section in record["sections"].items()
        for warning in section.get("warnings", ())
    ]
    for what, listed in (("failures", failures), ("warnings", warnings)):
        if listed:
            lines += [f"**{len(listed)} {what}**", "", *listed, ""]
    return lines


def markdown(record: dict[str, Any]) -> str:
    """The record for people: a table for each section."""
    lines = heading(record)
    if not any(section["failures"] for section in record["sections"].values()):
        lines += ["No failures."]
    for name, section in record["sections"].items():
        lines += ["", f"## {name}", ""]
        lines += table(section["rows"])
        lines += [f"- skipped {skipped}" for skipped in section["skipped"]]
    return "\n".join(lines) + "\n"


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Rows as the lines of a Markdown table; no rows, no lines."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    if not columns:
        return []
    lines = [f"| {' | '.join(map(_cell, columns))} |", "|---" * len(columns) + "|"]
    for row in rows:
        lines.append(f"| {' | '.join(_cell(row.get(key, '')) for key in columns)} |")
    return lines


def _cell(value: Any) -> str:
    return number(value).replace("|", "\\|")


def number(value: Any) -> str:
    """Three significant digits, a comma for thousands; text as it is."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if value == 0 or not 1e-3 <= abs(value) < 1e9:
        return f"{value:.3g}"
    digits = 2 - floor(log10(abs(value)))
    return f"{round(value, digits):,.{max(0, digits)}f}"


def write_whole(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".") as unfinished:
        file = Path(unfinished, path.name)  # with the modes of any new file, unlike a temporary one
        file.write_text(text)
        os.replace(file, path)


def save_picture(figure: Any, path: Path, **options: Any) -> None:
    """Write a matplotlib figure as PNG, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}")
    try:
        figure.savefig(unfinished, format="png", **options)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def write(folder: Path, stem: str, record: dict[str, Any], text: str) -> tuple[Path, Path]:
    """Write the record as JSON and `text` as Markdown; a number follows a stem that is taken."""
    texts = {".json": json.dumps(_finite(record), indent=1, allow_nan=False) + "\n", ".md": text}
    stems = [stem, *(f"{stem}-{number}" for number in range(2, 1000))]
    stem = next(
        name for name in stems if not any(folder.joinpath(name + end).exists() for end in texts)
    )
    for ending, content in texts.items():
        write_whole(folder / f"{stem}{ending}", content)
    return folder / f"{stem}.json", folder / f"{stem}.md"
