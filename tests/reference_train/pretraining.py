"""Fixtures of the tests of `pretrain`: shards, the printed command, and short trainings.

A test file takes them by `pytest_plugins = ["pretraining"]`.
"""

import json
import logging
import re
import shlex
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from tars import make_shards

from cyclip_loss import open_clip_train
from reference_train.pretrain import pretrain as command
from reference_train.pretrain import training


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder of four shards to train on and one held-out shard, 8 pairs in each."""
    return make_shards(tmp_path / "data", train=4, val=1)


@pytest.fixture
def dry_run(data: Path, tmp_path: Path, capsys) -> Callable[..., Namespace]:
    """What OpenCLIP and the launcher make of the command that `pretrain --dry-run` prints."""

    def run(*flags: str, batch: Sequence[str] = ("--batch-size", "8")) -> Namespace:
        argv = ["--preset", "modern", "--data", str(data), "--out", str(tmp_path / "logs")]
        command.main([*argv, *batch, "--dry-run", *(word.format(folder=data) for word in flags)])
        printed = shlex.split(capsys.readouterr().out)
        launcher, end = printed[:3], printed.index("--") + 1
        if "--views" in flags:
            assert launcher == ["python", "-m", "reference_train.pretrain.views"]
        else:
            assert launcher == ["python", "-m", open_clip_train.__name__]
        launcher_args, openclip_flags = open_clip_train.parse(printed[end:])
        args = vars(command.trainer.parse_args(openclip_flags))
        return Namespace(**{**args, **vars(launcher_args), "views_flag": printed[3 : end - 1]})

    return run


@pytest.fixture
def pretrain(data: Path, tmp_path: Path, monkeypatch) -> Callable[..., None]:
    """Trains for an epoch of two steps in this process, and undoes what that changes here."""
    monkeypatch.setattr(command.trainer, "setup_logging", lambda *_: None)

    def run(*flags: str, ours=(), data: Path = data, batch: int = 8, pairs: int = 16) -> None:
        argv = ["--preset", "icons", "--batch-size", str(batch), "--data", str(data), *ours]
        argv += ["--out", str(tmp_path), "--name", "run", "--", "--train-num-samples", str(pairs)]
        with pytest.MonkeyPatch.context() as patch:
            for module in (command.trainer, training.train):
                for name, value in list(vars(module).items()):
                    patch.setattr(module, name, value)
            patch.setattr(torch, "save", torch.save)
            patch.setattr(logging, "raiseExceptions", True)
            patch.setattr(logging.root.manager, "disable", 0)
            command.main([*argv, "--epochs", "1", *flags])

    return run


def results(logs: Path) -> list[dict[str, float]]:
    """The lines of results.jsonl of the run called "run"."""
    path = logs / "run" / "checkpoints" / "results.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def logged_terms(caplog: pytest.LogCaptureFixture) -> list[dict[str, float]]:
    """The terms of each step in OpenCLIP's log, and "loss", their sum."""
    lines = [r.getMessage() for r in caplog.records if "Train Epoch" in r.getMessage()]
    steps = [re.findall(r"(\w*[Ll]oss): (\S+) \(", line) for line in lines]
    return [{name.lower(): float(value) for name, value in step} for step in steps]


def break_picture(shard: Path, last: bool = False) -> None:
    """Overwrites the header of a shard's first picture, or the data of its last one."""
    content = bytearray(shard.read_bytes())
    place = content.rindex(b"IDAT") + 4 if last else content.index(b"PNG")
    content[place : place + 8] = bytes(8)
    shard.write_bytes(content)
