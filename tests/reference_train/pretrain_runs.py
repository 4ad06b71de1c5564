"""Short trainings with `pretrain` in this process, and the results that they write."""

import json
import logging
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from reference_train.pretrain import patches
from reference_train.pretrain import pretrain as command


def train(
    out: Path,
    data: Path,
    *flags: str,
    ours: Sequence[str] = (),
    batch: int = 8,
    pairs: int = 16,
) -> None:
    """Trains out / "run" for an epoch of two steps, and undoes what that changes in this process.

    flags: OpenCLIP's flags. ours: the flags of `pretrain`.
    """
    argv = ["--preset", "icons", "--batch-size", str(batch), "--data", str(data), *ours]
    argv += ["--out", str(out), "--name", "run", "--", "--train-num-samples", str(pairs)]
    with pytest.MonkeyPatch.context() as patch:
        for module in (command.trainer, patches.train):
            for name, value in list(vars(module).items()):
                patch.setattr(module, name, value)
        patch.setattr(command.trainer, "setup_logging", lambda *_: None)
        patch.setattr(torch, "save", torch.save)
        patch.setattr(logging, "raiseExceptions", True)
        patch.setattr(logging.root.manager, "disable", 0)
        command.main([*argv, "--epochs", "1", *flags])


def results(logs: Path) -> list[dict[str, float]]:
    """The lines of results.jsonl of the run called "run"."""
    path = logs / "run" / "checkpoints" / "results.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def logged_terms(caplog: pytest.LogCaptureFixture) -> list[dict[str, float]]:
    """The terms of each step in OpenCLIP's log, and "loss", their sum."""
    lines = [r.getMessage() for r in caplog.records if "Train Epoch" in r.getMessage()]
    steps = [re.findall(r"(\w*[Ll]oss): (\S+) \(", line) for line in lines]
    return [{name.lower(): float(value) for name, value in step} for step in steps]
