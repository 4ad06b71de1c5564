"""`results.json`: everything a run, and a folder of runs, has to say in numbers."""

import json
import platform
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..files import write_json
from ..losses import LOSSES
from .train import RunConfig

HISTORY_POINTS = 200


def evaluated(folder: Path, split: str) -> bool:
    """Whether a run's folder holds its results on `split`."""
    path = folder / "results.json"
    return path.exists() and json.loads(path.read_text(encoding="utf-8"))["split"] == split


def save_run(
    folder: Path,
    config: RunConfig,
    split: str,
    seconds: float,
    device: torch.device,
    results: dict[str, Any],
) -> None:
    """Writes a run's `results.json`."""
    run = {
        "config": asdict(config),
        "split": split,
        "seconds": seconds,
        "images_per_second": config.steps * config.batch_size / seconds,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "results": results,
        "history": read_history(folder / "metrics.jsonl"),
    }
    write_json(run, folder / "results.json")


def read_history(path: Path) -> dict[str, dict[str, list[float]]]:
    """metrics.jsonl -> {"training": columns, thinned to means, "validation": columns}."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    names = [name for name in lines[0] if not name.startswith("validation_")]
    values = np.array([[line[name] for name in names] for line in lines])
    bins = np.array_split(values, min(HISTORY_POINTS, len(values)))
    means = np.array([part.mean(axis=0) for part in bins])
    measured = [line for line in lines if "validation_inmodal_gap" in line]
    columns = ["step", *(name for name in lines[-1] if name.startswith("validation_"))]
    return {
        "training": dict(zip(names, means.T.tolist(), strict=True)),
        "validation": {
            name.removeprefix("validation_"): [line[name] for line in measured] for name in columns
        },
    }


def gather_results(out: Path, split: str) -> None:
    """Writes `out/results.json` from the runs in `out`."""
    paths = sorted(out.glob("*/results.json"))
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    runs = [run for run in runs if run["split"] == split]
    order = list(LOSSES)
    runs.sort(key=lambda run: (order.index(run["config"]["loss"]), run["config"]["seed"]))
    packages = ("torch", "open_clip_torch", "webdataset", "numpy")
    results = {
        "split": split,
        "versions": {"python": platform.python_version(), **{p: version(p) for p in packages}},
        "machine": {"processor": platform.machine(), "threads": torch.get_num_threads()},
        "runs": runs,
    }
    write_json(results, out / "results.json")


def by_loss(results: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The runs of each loss, in the order of `LOSSES`."""
    losses: dict[str, list[dict[str, Any]]] = {}
    for run in results["runs"]:
        losses.setdefault(run["config"]["loss"], []).append(run)
    return losses
