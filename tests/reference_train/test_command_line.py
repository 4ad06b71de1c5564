"""`python -m reference_train`: which command runs, its exit code, and errors of one line."""

import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from reference_train import __main__ as cli
from reference_train import command_line, files
from reference_train.command_line import RunFailed, UsageError, run, track
from reference_train.demo import demo


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--loss coca", "--loss: invalid choice: 'coca'"),
        ("--seeds many", "--seeds: invalid number value: 'many'"),
        ("--lambda -1", "--lambda: must be >= 0, not -1"),
        ("--lambda nan", "--lambda: must be >= 0, not nan"),
        ("--step 9", "unrecognized arguments: --step 9"),
        ("--out /proc", "can't be written"),
        ("--out in_use", "in_use: another process is writing to it: choose another --out"),
        ("evaluate --model RN50 --pretrained openai --out in_use", "another process is writing"),
        ("report .", "is no evaluation.json"),
    ],
)
def test_bad_arguments_end_with_one_line_and_exit_code_2(
    arguments, message, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(files, "PATIENCE", 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # other tests fork processes
    monkeypatch.setattr(demo, "train", lambda *_: pytest.fail("training began"))
    monkeypatch.delitem(sys.modules, cli.__name__)  # as if it were not imported
    monkeypatch.setattr(sys, "argv", ["reference_train", *arguments.split()])
    with files.locked(Path("in_use")), pytest.raises(SystemExit) as stopped:
        runpy.run_module("reference_train", run_name="__main__")
    printed = capsys.readouterr().err
    assert (stopped.value.code, printed.count("\n")) == (2, 1)
    assert message in printed


@pytest.mark.parametrize(
    ("error", "code", "line", "variable"),
    [
        (RunFailed("why"), 1, "why", "LOCAL_RANK"),
        (UsageError("why"), 2, "why", "SLURM_LOCALID"),
        (KeyboardInterrupt(), 130, None, "LOCAL_RANK"),
    ],
)
def test_the_first_rank_says_in_one_line_how_a_command_ended(
    error, code, line, variable, monkeypatch, capsys
):
    def raise_error(argv):
        raise error

    for rank in ("0", "1"):
        monkeypatch.setenv(variable, rank)
        with pytest.raises(SystemExit, match=f"^{code}$"):
            run(raise_error)
        said = "" if rank == "1" and line else f"reference_train: {line or 'interrupted'}\n"
        assert capsys.readouterr().err == said


@pytest.mark.parametrize(("argv", "folder"), [(["pretrain", "x"], "/pretrain"), ([], "")])
def test_a_missing_package_is_named_with_its_requirements(argv, folder, monkeypatch):
    def fail(*_):
        raise ImportError("no 'x'")

    monkeypatch.setattr(cli, "import_module", fail)
    hint = f"'x': pip install -r reference_train{folder}/requirements.txt"
    with pytest.raises(UsageError, match=hint):
        cli.main(argv)


def test_long_work_prints_a_line_each_minute_without_a_terminal(monkeypatch, capsys):
    seconds = 0
    monkeypatch.setattr(command_line, "time", SimpleNamespace(monotonic=lambda: seconds))
    for item in track(range(5), "work", 5):
        assert item == seconds // 31
        seconds += 31
    assert capsys.readouterr().out == "work: 2 of 5\nwork: 4 of 5\n"
