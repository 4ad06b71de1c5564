"""Fixtures of the tests of `pretrain`: shards, the printed command, and short trainings.

A test file uses them with `pytest_plugins = ["pretraining"]`, and must not import this file.
"""

import shlex
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from pretrain_runs import train
from tars import make_shards

from cyclip_loss import open_clip_train
from reference_train.pretrain import pretrain as command
from reference_train.pretrain import views


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder of four shards to train on and one held-out shard, 8 pairs in each."""
    return make_shards(tmp_path / "data", train=4, val=1)


@pytest.fixture
def dry_run(data: Path, tmp_path: Path, capsys) -> Callable[..., Namespace | None]:
    """The arguments, as OpenCLIP and the launcher parse the command of `pretrain --dry-run`.

    None if it prints no command.
    """

    def run(*flags: str, batch: Sequence[str] = ("--batch-size", "8")) -> Namespace | None:
        argv = ["--preset", "modern", "--data", str(data), "--out", str(tmp_path / "logs")]
        command.main([*argv, *batch, "--dry-run", *(word.format(folder=data) for word in flags)])
        if not (printed := shlex.split(capsys.readouterr().out)):
            return None
        launcher = views.__name__ if "--views" in flags else open_clip_train.__name__
        assert printed[:3] == ["python", "-m", launcher]
        end = printed.index("--") + 1
        launcher_args, openclip_flags = open_clip_train.parse(printed[end:])
        args = vars(command.trainer.parse_args(openclip_flags))
        return Namespace(**{**args, **vars(launcher_args), "views_flag": printed[3 : end - 1]})

    return run


@pytest.fixture
def pretrain(data: Path, tmp_path: Path) -> Callable[..., None]:
    """`pretrain_runs.train` of the folder `data` into `tmp_path`."""

    def run(*flags: str, data: Path = data, **options: Any) -> None:
        train(tmp_path, data, *flags, **options)

    return run
