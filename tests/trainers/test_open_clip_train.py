"""The launcher: OpenCLIP's own trainer, and made-up ones that build their loss in other ways."""

import importlib
import json
import re
import shlex
import sys
from argparse import Namespace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from open_clip.loss import ClipLoss, CoCaLoss, DistillClipLoss, SigLipLoss
from processes import run_python
from recipe_cases import TEXT, VISION, blocks
from torch import nn

from cyclip_loss import CyCLIPLoss, WithCyclicPenalty, open_clip_train
from reference_train.data.emoji import EMOJI_FOLDER

# OpenCLIP's, whose data module needs it.
pytest.importorskip("pandas")


def flags(folder: Path, *more: str) -> list[str]:
    """Those of the recipes' command line, with a tiny model and the emoji instead."""
    config = {"embed_dim": 16, "vision_cfg": VISION, "text_cfg": TEXT}
    (folder / "tiny").mkdir(exist_ok=True)
    (folder / "tiny" / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": config, "preprocess_cfg": {}})
    )
    [command] = blocks("sh")["OpenCLIP's command line"]
    _, _, module, *given = shlex.split(command.replace("\\\n", ""))
    assert module == open_clip_train.__name__
    shards = f"{EMOJI_FOLDER}/{{noto,twemoji}}.tar.xz"
    return [
        *given,
        *("--model", f"local-dir:{folder / 'tiny'}"),
        *("--train-data", shards, "--train-num-samples", "128", "--batch-size", "32"),
        *("--epochs", "1", "--workers", "1", "--log-every-n-steps", "1", "--warmup", "1"),
        *("--logs", str(folder), "--name", "run", *more),
    ]


def logged_terms(folder: Path) -> list[dict[str, float]]:
    """The losses of each step in OpenCLIP's log."""
    lines = (folder / "run" / "out.log").read_text().splitlines()
    return [
        {name: float(value) for name, value in re.findall(r"(\w*[Ll]oss): (\S+) \(", line)}
        for line in lines
        if "Train Epoch" in line
    ]


def assert_three_terms(steps: list[dict[str, float]]) -> None:
    for step in steps:
        loss = step.pop("Loss")
        assert list(step) == ["Contrastive_loss", "Inmodal_cyclic_loss", "Crossmodal_cyclic_loss"]
        assert sum(step.values()) == pytest.approx(loss, rel=1e-3)
        assert step["Inmodal_cyclic_loss"] > 0


def test_open_clip_trains_with_it(tmp_path: Path) -> None:
    run = run_python("-m", open_clip_train.__name__, *flags(tmp_path))
    assert run.returncode == 0, run.stderr
    steps = logged_terms(tmp_path)
    assert len(steps) == 4
    assert_three_terms(steps)
    assert "lambda_inmodal: 0.25\n" in (tmp_path / "run" / "params.txt").read_text()
    assert (tmp_path / "run" / "checkpoints" / "epoch_1.pt").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ["--precision", "fp32", "--accum-freq", "2", "--local-loss", "--gather-with-grad"],
        ["--siglip", "--dist-impl", "ring"],
    ],
    ids=lambda options: options[-1],
)
def test_two_ranks(tmp_path: Path, options: list[str]) -> None:
    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone")
    script = str(Path(__file__).with_name("on_cpu.py"))
    run = run_python(*torchrun, script, "--", *flags(tmp_path, *options))
    assert run.returncode == 0, run.stderr
    steps = logged_terms(tmp_path)
    assert len(steps) == (1 if "--accum-freq" in options else 2)
    assert_three_terms(steps)


def test_open_clip_with_another_loss_after_all_is_stopped(tmp_path: Path) -> None:
    """As a version would be that builds its loss elsewhere."""
    script = """
import sys, open_clip, open_clip_train.main as trainer
from cyclip_loss import open_clip_train

def train_one_epoch(model, data, loss, *rest, its=trainer.train_one_epoch, **more):
    return its(model, data, open_clip.ClipLoss(), *rest, **more)

trainer.train_one_epoch = train_one_epoch
open_clip_train.main(sys.argv[1:])
"""
    run = run_python("-c", script, *flags(tmp_path))
    assert run.returncode == 1
    assert [line for line in run.stderr.splitlines() if line.startswith("cyclip_loss: ")] == [
        "cyclip_loss: a training step was taken in which the CyCLIP loss was made but not called: "
        "this version trains with another one. Stopped."
    ]
    assert logged_terms(tmp_path) == []


def test_help_shows_ours_and_then_theirs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = importlib.import_module("open_clip_train.main")
    for name in dir(trainer):  # to be put back
        monkeypatch.setattr(trainer, name, getattr(trainer, name))
    with pytest.raises(SystemExit) as stopped:
        open_clip_train.main(["--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert shown.index("--lambda-inmodal LAMBDA") < shown.index("--train-data TRAIN_DATA")


# Made-up trainers: (the loss they ask for) -> a module like `open_clip_train.main`.


def fake(loss: nn.Module | None, *, calls: bool = True, **options: Any) -> ModuleType:
    """A trainer without a way to make a loss; it takes two steps with `trainer.loss`."""
    trainer: Any = ModuleType("open_clip_train.main")
    trainer.loss, trainer.seen = loss, []

    def main(argv: list[str]) -> None:
        args = trainer.parse_args(argv)
        trainer.args = args
        used = trainer.make(args)
        weight = nn.Parameter(torch.eye(4, device="cpu"))
        optimizer = torch.optim.SGD([weight], lr=0.1)
        for _ in range(2):
            features = nn.functional.normalize(torch.randn(2, 6, 4, device="cpu") @ weight, dim=-1)
            if calls:
                trainer.seen.append(used(*features, logit_scale=10.0, output_dict=True))
            features.sum().backward()
            optimizer.step()
        trainer.finished = True

    def parse_args(argv: list[str]) -> Any:
        return Namespace(argv=argv, **options)

    trainer.main, trainer.parse_args = main, parse_args
    trainer.make = lambda args: loss
    return trainer


def like_3(loss: nn.Module, **options: Any) -> ModuleType:
    trainer: Any = fake(loss, **options)
    trainer.create_loss = lambda args: loss
    trainer.make = lambda args: trainer.create_loss(args)
    return trainer


def like_4(loss: nn.Module | None, **options: Any) -> ModuleType:
    trainer: Any = fake(loss, **options)

    class Task(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            if loss is not None:
                self.loss = loss

    trainer.create_task = lambda args, model: Task()
    trainer.make = lambda args: trainer.create_task(args, model=None).loss
    return trainer


def launch(trainer: Any, monkeypatch: pytest.MonkeyPatch, *argv: str) -> Any:
    monkeypatch.setitem(sys.modules, "open_clip_train", ModuleType("open_clip_train"))
    monkeypatch.setitem(sys.modules, "open_clip_train.main", trainer)
    open_clip_train.main(argv)
    return trainer


@pytest.mark.parametrize("like", [like_3, like_4])
def test_clip_is_replaced(like: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[CyCLIPLoss] = []
    original = CyCLIPLoss.__init__
    monkeypatch.setattr(
        CyCLIPLoss, "__init__", lambda self, *a, **k: made.append(self) or original(self, *a, **k)
    )
    argv = ("--lambda-inmodal", "0.5", "--dist-impl", "ring", "--epochs", "3")
    trainer = launch(like(ClipLoss(local_loss=True)), monkeypatch, *argv)
    assert trainer.finished
    [loss] = made
    assert (loss.lambda_inmodal, loss.lambda_crossmodal, loss.dist_impl) == (0.5, 0.25, "ring")
    assert [*trainer.seen[0]] == [
        "contrastive_loss",
        "inmodal_cyclic_loss",
        "crossmodal_cyclic_loss",
    ]
    # Theirs get their flags; the parsed ones have ours as well.
    assert trainer.args.argv == ["--epochs", "3"]
    assert trainer.args.lambda_inmodal == 0.5


@pytest.mark.parametrize("theirs", [ClipLoss(), SigLipLoss()], ids=lambda t: type(t).__name__)
@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ((), 128),
        (("--reference-batch-size", "512"), 512),
        (("--reference-batch-size", "0"), None),
    ],
)
def test_weights_mean_the_same_at_every_batch_size(
    theirs: nn.Module, argv: tuple[str, ...], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer: Any = like_3(theirs)
    made = []
    trainer.main = lambda theirs: made.append(trainer.make(trainer.parse_args(theirs)))
    launch(trainer, monkeypatch, *argv)
    assert [loss.reference_batch_size for loss in made] == [expected]


@pytest.mark.parametrize("like", [like_3, like_4])
@pytest.mark.parametrize(
    "theirs", [SigLipLoss(), CoCaLoss(2.0, 1.0), DistillClipLoss()], ids=lambda t: type(t).__name__
)
def test_other_losses_get_the_penalties(
    like: Any, theirs: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer: Any = like(theirs)
    monkeypatch.setitem(sys.modules, "open_clip_train", ModuleType("open_clip_train"))
    monkeypatch.setitem(sys.modules, "open_clip_train.main", trainer)
    made = []
    trainer.main = lambda argv: made.append(trainer.make(None))
    open_clip_train.main([])
    [loss] = made
    assert isinstance(loss, WithCyclicPenalty)
    assert loss.loss is theirs


@pytest.mark.parametrize(
    ("trainer", "message"),
    [
        (fake(ClipLoss()), "in a way that this launcher does not know"),
        (like_3(ClipLoss(), calls=False), "made but not called"),
        (like_4(ClipLoss(), calls=False), "made but not called"),
        (like_4(None), "no loss of two features: loss must be a module, got None"),
        (like_3(nn.CrossEntropyLoss()), "CrossEntropyLoss.forward takes ['input', 'target']"),
        (like_4(nn.CrossEntropyLoss()), "CrossEntropyLoss.forward takes ['input', 'target']"),
        (like_3(ClipLoss(), horovod=True), "--horovod is not supported"),
    ],
)
def test_what_cannot_work_stops(
    trainer: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit) as stopped:
        launch(trainer, monkeypatch)
    assert message in str(stopped.value)
    assert "\n" not in str(stopped.value)
    assert not hasattr(trainer, "finished")


def test_a_trainer_that_never_asks_for_the_loss_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer: Any = like_3(ClipLoss())
    trainer.make = lambda args: trainer.loss
    with pytest.raises(SystemExit, match="not asked for"):
        launch(trainer, monkeypatch)


@pytest.mark.parametrize("name", ["lambda_inmodal", "reference_batch_size"])
def test_wrong_weights_are_refused_before_anything_starts(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        launch(like_3(ClipLoss()), monkeypatch, f"--{name.replace('_', '-')}", "-1")
    assert stopped.value.code == 2
    assert name in capsys.readouterr().err


def test_the_hook_does_not_outlive_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    launch(like_3(ClipLoss()), monkeypatch)
    weight = nn.Parameter(torch.ones(1, device="cpu"))
    weight.grad = torch.ones(1, device="cpu")
    torch.optim.SGD([weight], lr=0.1).step()


def test_a_double_dash_of_torchrun_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = launch(like_3(ClipLoss()), monkeypatch, "--", "--lambda-inmodal", "0.5", "--x")
    assert trainer.args.lambda_inmodal == 0.5
    assert trainer.args.argv == ["--x"]


class Other(ClipLoss):
    """By its type, none that CyCLIPLoss may stand for."""


def with_schedule(trainer: Any, epoch: int = 0) -> Any:
    """Trains as the real ones do: 2 epochs of 5 steps of 3 batches, resumed from an epoch."""
    trainer.cosine_lr = lambda optimizer, lr, warmup, steps: trainer.rates.append
    trainer.rates, trainer.seen = [], []

    def main(argv: list[str]) -> None:
        trainer.args = trainer.parse_args(argv)
        loss = trainer.make(trainer.args)
        weight = nn.Parameter(torch.eye(4, device="cpu"))
        optimizer = torch.optim.SGD([weight], lr=0.1)
        scheduler = trainer.cosine_lr(optimizer, 0.1, 2, 10)
        for step in range(5 * epoch, 10):
            for _ in range(3):
                if "--skip-scheduler" not in argv:
                    scheduler(step)
                features = nn.functional.normalize(torch.eye(2, 4, device="cpu") @ weight, dim=-1)
                loss(features, features.flip(0), logit_scale=10.0).backward()
                trainer.seen.append((loss.lambda_inmodal, loss.lambda_crossmodal, loss.impl))
            optimizer.step()

    trainer.main = main
    return trainer


@pytest.mark.parametrize("like", [like_3, like_4])
@pytest.mark.parametrize("theirs", [ClipLoss, Other])
@pytest.mark.parametrize(
    ("warmup", "length", "epoch"), [("4", 4, 0), ("8", 8, 1), ("0.8", 8, 1), ("1.0", 10, 0)]
)
def test_the_weights_warm_up(
    like: Any, theirs: Any, warmup: str, length: int, epoch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = with_schedule(like(theirs()), epoch)
    argv = ("--lambda-warmup", warmup, "--lambda-crossmodal", "1", "--impl", "eager")
    launch(trainer, monkeypatch, *argv)
    steps = [step for step in range(5 * epoch, 10) for _ in range(3)]
    shares = [min(1.0, (step + 1) / length) for step in steps]
    assert trainer.seen == [(0.25 * share, share, "eager") for share in shares]
    assert trainer.rates == steps
    assert trainer.args.lambda_warmup == float(warmup)


def test_a_warm_up_without_a_schedule_stops(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    launch(with_schedule(like_3(ClipLoss())), monkeypatch, "--skip-scheduler")
    argv = ("--skip-scheduler", "--lambda-warmup", "2")
    with pytest.raises(SystemExit, match="--lambda-warmup saw no step"):
        launch(with_schedule(like_3(ClipLoss())), monkeypatch, *argv)
    for wrong in ("-1", "1.5", "half"):
        with pytest.raises(SystemExit):
            launch(like_3(ClipLoss()), monkeypatch, "--lambda-warmup", wrong)
        assert (
            f"--lambda-warmup: invalid steps_or_share value: '{wrong}'" in capsys.readouterr().err
        )


def test_the_trainer_of_open_clip_2(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("open_clip_train", "open_clip_train.main", "training"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(SystemExit, match=r"import of open_clip_train.*pip install"):
        open_clip_train.main([])
    trainer: Any = like_3(ClipLoss())
    monkeypatch.setitem(sys.modules, "training", ModuleType("training"))
    monkeypatch.setitem(sys.modules, "training.main", trainer)
    open_clip_train.main([])
    assert trainer.finished
    monkeypatch.delattr(trainer, "create_loss")
    with pytest.raises(SystemExit, match="does not know"):
        open_clip_train.main([])
