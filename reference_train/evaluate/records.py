"""Records of evaluations: begins, reads and saves `evaluation.json`."""

import json
import platform
import shlex
import zlib
from collections import Counter
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ..command_line import UsageError
from ..files import write_text
from ..runs import add_to_list
from .datasets import Dataset

Result = dict[str, Any]  # what evaluation.json holds
ABOUT = ("date", "command", "versions", "device", "settings")
PARTS = ("checkpoints", "data_sets", "failed", "results")
PACKAGES = ("torch", "torchvision", "open_clip_torch")


def start(out: Path, settings: dict[str, Any], arguments: Sequence[str]) -> Result:
    """Returns the evaluation that a folder holds, or a new one.

    settings: the settings that the numbers depend on; arguments: those of reference_train.

    Raises `UsageError` if the folder's evaluation has other settings.
    """
    command = shlex.join(["python", "-m", "reference_train", *arguments])
    if (out / "evaluation.json").exists():
        result = read_evaluation(out)
        for name, wanted in settings.items():
            if (stored := result["settings"].get(name)) != wanted:
                what = f"--out {out}: was started with {name} = {stored}; this command asks for"
                raise UsageError(f"{what} {wanted}. Choose another --out")
        return result | {"command": command}
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command,
        "versions": {},  # `note_environment` adds what measures
        "device": "",
        "settings": settings,
        **{part: {} for part in PARTS},
    }


def note_environment(result: Result, device: torch.device) -> None:
    """Adds the versions and the device of this process to those that measured earlier."""
    now = {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}
    earlier = result["versions"]
    result["versions"] = {x: add_to_list(earlier.get(x, ""), now[x]) for x in now}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    result["device"] = add_to_list(result["device"], name)


def read_evaluation(path: Path) -> Result:
    """Reads an evaluation.json. path: the file or its folder. Raises `UsageError`."""
    file = path / "evaluation.json" if path.is_dir() else path
    try:
        result: Result = json.loads(file.read_text(encoding="utf-8"))
        if not all(isinstance(result[part], dict) for part in PARTS) or not {*ABOUT} <= {*result}:
            raise ValueError("no results or no settings")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{file} is no evaluation.json: {error!r}") from error
    return result


def save(result: Result, out: Path) -> None:
    """Writes `evaluation.json` to a folder."""
    write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", out / "evaluation.json")


def describe(data: Dataset) -> dict[str, Any]:
    """The entry of a dataset in evaluation.json: its sizes and groups, and a hash of its content.

    The hash is of all texts and labels, and of the images' files (`Images.identity`).
    """
    groups = dict(Counter(data.groups or []))
    captions = len(data.images) if groups else 0  # class names are used as captions
    content = [data.captions, data.groups, data.images.identity()]
    content += [(c.names, c.templates, c.labels.tolist()) for c in data.classes.values()]
    if data.train:
        train_images, labels = data.train
        content += [train_images.identity(), *(x.tolist() for x in labels.values())]
    return {
        "images": len(data.images),
        "train_images": len(data.train[0]) if data.train else 0,
        "classes": {task or "class": len(c.names) for task, c in data.classes.items()},
        "captions": sum(map(len, data.captions)) if data.captions else captions,
        "groups": groups,
        "crc32": zlib.crc32(repr(content).encode()),
        "mean_over": [*groups],
    }
