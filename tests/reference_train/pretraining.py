"""Fixtures of the tests of `pretrain`: shards, the printed command, and short trainings.

A test file uses them with `pytest_plugins = ["pretraining"]`, and must not import this file.
"""

import json
import logging
import shlex
from argparse import Namespace

import pytest
import torch
from miniature import TINY, make_shards

from cyclip_loss import open_clip_train
from reference_train.pretrain import patches, views
from reference_train.pretrain import pretrain as command

# How long Python waits for the workers of a failed run when it collects their iterator; 5 seconds
# by default.
torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL = 0.1


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A folder of four shards to train on and one held-out shard, 8 pairs in each.

    Training is on the CPU, also where there is a GPU: worker processes are forked, which they can't
    be after CUDA was used.
    """
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return make_shards(tmp_path / "data")


@pytest.fixture
def dry_run(data, tmp_path, capsys, monkeypatch):
    """The arguments, as OpenCLIP and the launcher parse the command of `pretrain --dry-run`.

    None if it prints no command.
    """

    def run(flags="", batch="--batch-size 8"):
        monkeypatch.chdir(tmp_path)  # the runs' folder is ./logs
        words = f"--preset modern --data {data} {batch} --dry-run {flags}"
        command.main(words.split())
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
def words(data, tmp_path):
    """The arguments of `pretrain` that train `tmp_path` / "run", a tiny model, for an epoch.

    flags: OpenCLIP's flags. ours: the flags of `pretrain`. pairs: in an epoch.
    """
    (tmp_path / "tiny.json").write_text(json.dumps(TINY))

    def given(flags="", ours="", data=data, batch=8, pairs=16):
        text = f"""
            --preset icons --batch-size {batch} --data {data} --out {tmp_path} --name run {ours}
            --model-config {tmp_path}/tiny.json -- --model tiny --train-num-samples {pairs}
            --epochs 1 {flags}
        """
        return text.split()

    return given


@pytest.fixture
def pretrain(words):
    """Trains with the arguments of `words`, and undoes what that changes in this process."""

    def run(*given, **options):
        with pytest.MonkeyPatch.context() as patch:
            for module in (command.trainer, patches.train):
                for name, value in list(vars(module).items()):
                    patch.setattr(module, name, value)
            patch.setattr(torch.optim, "AdamW", torch.optim.AdamW)
            patch.setattr(torch.backends.cuda, "enable_flash_sdp", lambda _: None)
            patch.setattr(command.trainer, "setup_logging", lambda *_: None)
            patch.setattr(logging, "raiseExceptions", True)
            patch.setattr(logging.root.manager, "disable", 0)
            command.main(words(*given, **options))

    return run
