"""Reads, writes and merges `evaluation.json`."""

import json
import platform
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ..command_line import CannotStart
from ..files import check_writable, write_text
from .runs import describe_run

Result = dict[str, Any]  # what evaluation.json holds
PARTS = ("checkpoints", "data_sets", "failed", "absent", "results")


def start(out: Path, settings: dict[str, Any], command: str, device: torch.device) -> Result:
    """Returns the evaluation that a folder holds, or a new one.

    settings: the settings that the numbers depend on.

    Raises `CannotStart` if the folder's evaluation has other settings, or the folder cannot be
    written.
    """
    check_writable(out)
    if (out / "evaluation.json").exists():
        result = read_evaluation(out)
        for name, wanted in settings.items():
            stored = result.get("settings", {}).get(name)
            if stored != wanted:
                what = f"--out {out}: holds an evaluation with {name} = {stored}, not {wanted}"
                raise CannotStart(f"{what}: choose another --out")
        # A dict keeps the order of the commands, and each command once.
        commands = dict.fromkeys([*result["command"].splitlines(), command])
        return result | {"command": "\n".join(commands)}
    packages = ("torch", "torchvision", "open_clip_torch")
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command,
        "versions": {"python": platform.python_version(), **{p: version(p) for p in packages}},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "settings": settings,
        **{part: {} for part in PARTS},
    }


def read_evaluation(path: Path) -> Result:
    """Reads an evaluation.json. path: the file or its folder. Raises `CannotStart`."""
    file = path / "evaluation.json" if path.is_dir() else path
    try:
        result: Result = json.loads(file.read_text(encoding="utf-8"))
        if not all(isinstance(result[key], dict) for key in ("results", "data_sets")):
            raise ValueError("no results")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CannotStart(f"{file} is no evaluation.json: {error!r}") from error
    return add_losses_and_seeds(result)


def add_losses_and_seeds(result: Result) -> Result:
    """Adds the loss and the seed of each run to older evaluations, which did not store them.

    Runs are called [NAME-]LOSS-SEED or NAME-SEED. A number at the end is the seed if it has one
    digit or comes after a loss.
    """
    checkpoints = result.get("checkpoints", {})
    if isinstance(checkpoints, list):  # the oldest evaluations
        checkpoints = {checkpoint["title"]: checkpoint for checkpoint in checkpoints}
    for title in result["results"]:
        known = checkpoints.setdefault(title, {})
        if "loss" in known:
            continue
        if "seed" not in known:
            stem, _, last = title.rpartition("-")
            loss = describe_run(stem, {})["loss"]
            is_seed = last.isdigit() and (len(last) == 1 or loss is not None)
            known["seed"] = int(last) if is_seed else None
        known["loss"] = describe_run(title, {"seed": known["seed"]})["loss"]
    return result | {"checkpoints": checkpoints}


def save(result: Result, out: Path) -> None:
    """Writes `evaluation.json` to a folder."""
    out.mkdir(parents=True, exist_ok=True)
    write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", out / "evaluation.json")


def merge(records: Sequence[tuple[str, Result]], only: Sequence[str] | None) -> Result:
    """Merges several evaluations into one.

    Args:
        records: names and evaluations. If two evaluations have runs of the same title with other
            weights or other numbers, the name is added to the title.
        only: the names of the data sets to keep; None: all.

    Raises `CannotStart` if evaluations have different data sets under one name.
    """
    results_of_all = [result for _, result in records]
    merged = {**results_of_all[-1]}
    merged["command"] = "\n".join(result["command"] for result in results_of_all)
    for key in ("versions", "device"):
        merged[key] = value_or_values(result.get(key) for result in results_of_all)
    names = dict.fromkeys(n for result in results_of_all for n in result.get("settings", {}))
    merged["settings"] = {
        name: value_or_values(result.get("settings", {}).get(name) for result in results_of_all)
        for name in names
    }
    merged |= {part: {} for part in (*PARTS, "history")}
    for record, result in records:
        for name, data in result["data_sets"].items():
            if only is not None and name not in only:
                continue
            earlier = merged["data_sets"].setdefault(name, data)
            if (earlier["images"], earlier["classes"]) != (data["images"], data["classes"]):
                why = f"{name} is another data set there: leave it out with --only"
                raise CannotStart(f"{record}: {why}")
        for run, results in result["results"].items():
            title = run
            if run in merged["results"]:
                same_weights = have_same_weights(
                    merged["checkpoints"][run], result["checkpoints"][run]
                )
                if not same_weights or have_other_numbers(merged["results"][run], results):
                    title = f"{record}-{run}"
            merged["results"].setdefault(title, {}).update(results)
            merged["checkpoints"][title] = result["checkpoints"][run]
            if run in result.get("history", {}):
                merged["history"][title] = result["history"][run]
        for part in ("failed", "absent"):
            merged[part] |= result.get(part, {})
    return merged


def value_or_values(values: Iterable[Any]) -> Any:
    """The value, if all are equal, else a list of the different ones."""
    different: list[Any] = []
    for value in values:
        if value not in different:
            different.append(value)
    return different[0] if len(different) == 1 else different


def have_same_weights(first: dict[str, Any], second: dict[str, Any]) -> bool:
    """Whether two entries of "checkpoints" are of the same weights.

    A file is known by the time it was written, so it may have been moved.
    """
    key = "written" if "written" in first or "written" in second else "path"
    return all(first.get(name) == second.get(name) for name in ("model", key))


def have_other_numbers(first: dict[str, Any], second: dict[str, Any]) -> bool:
    """Whether two runs' results differ in a data set that both have."""
    return any(
        first[name][part] != second[name][part]
        for name in first.keys() & second.keys()
        for part in ("numbers", "groups")
    )
