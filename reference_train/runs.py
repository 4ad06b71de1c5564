"""What `pretrain` and `evaluate` share: models, and the files of a run of OpenCLIP's trainer."""

import ast
import subprocess
from pathlib import Path
from typing import Any

import open_clip
import torch

import cyclip_loss

from .command_line import UsageError

PARAMETERS = "params.txt"  # the run's settings


def register_models() -> None:
    """Adds icons-rn-32 and icons-rn-64, the models of the preset `icons`, to OpenCLIP's."""
    open_clip.add_model_config(Path(__file__).parent / "pretrain" / "models")


def read_parameters(path: Path) -> dict[str, Any]:
    """The settings in a params.txt, whose lines are `name: value`; {} if there is no such file."""
    parameters: dict[str, Any] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        name, _, value = line.partition(": ")
        try:
            parameters[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            parameters[name] = value
    return parameters


def code_version() -> str | None:
    """The commit of the code: "HASH", or "HASH dirty" if its files were changed.

    None if this folder and `cyclip_loss` are not files of one git repository.
    """
    git = ["git", "-C", str(Path(__file__).parent)]
    # Fails if git ignores the code, which is then in an environment inside another repository.
    tracked = ["ls-files", "--error-unmatch", __file__, cyclip_loss.__file__]
    describe = ["describe", "--always", "--exclude=*", "--abbrev=40", "--dirty= dirty"]
    try:
        _, version = (
            subprocess.check_output([*git, *command], stderr=subprocess.DEVNULL, text=True)
            for command in (tracked, describe)
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return version.strip()


def add_to_list(earlier: str, now: str) -> str:
    """A list with commas, and what it does not have yet."""
    return ", ".join(dict.fromkeys([*filter(None, earlier.split(", ")), now]))


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Loads a checkpoint to the CPU. Raises `UsageError` if it holds more than plain data."""
    try:
        # mmap reads only the tensors that are used.
        content: dict[str, Any] = torch.load(path, "cpu", weights_only=True, mmap=True)
        return content
    except Exception as error:
        # PyTorch raises many types of errors. Some messages advise loading with weights_only=False,
        # which would run code from the file.
        why = f"{path} was not loaded: truncated, or contains more than tensors and plain data"
        raise UsageError(why) from error
