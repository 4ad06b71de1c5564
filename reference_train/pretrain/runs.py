"""What OpenCLIP's trainer leaves in a run's folder: `params.txt`, and checkpoints."""

import ast
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from ..command_line import CannotStart

PARAMETERS = "params.txt"  # the run's settings


def read_parameters(path: Path) -> dict[str, Any]:
    """The settings in a params.txt, one `name: value` a line; {} if there is no such file."""
    parameters: dict[str, Any] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        name, _, value = line.partition(": ")
        try:
            parameters[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            parameters[name] = value
    return parameters


def load_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint of tensors and numbers, on the CPU. Raises `CannotStart` for anything else."""
    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        # mmap: what is not used stays on the disk
        whole = zipfile.is_zipfile(path)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=whole)
        if isinstance(content, dict):
            return content
        raise ValueError(f"a {type(content).__name__}")
    except Exception as error:
        # PyTorch raises errors of many kinds. Some advise to run the code that the file holds.
        why = f"{path} is cut short, or holds more than weights, and was not loaded"
        raise CannotStart(why) from error


def without_wrappers(state: dict[str, Any]) -> dict[str, Any]:
    """Weights by the model's own names, without the prefixes of DDP and torch.compile."""
    return {
        re.sub(r"^(module\.)+", "", name.replace("_orig_mod.", "")): value
        for name, value in state.items()
    }
