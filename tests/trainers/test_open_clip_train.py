"""The launcher: OpenCLIP's own trainer, and made-up ones that build their loss in other ways."""

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

pytest.importorskip("open_clip_train.main")
pytest.importorskip("pandas")
pytest.importorskip("sybil")

from accuracy import TERMS
from open_clip.loss import ClipLoss, CoCaLoss, DistillClipLoss, SigLipLoss
from processes import run_python
from recipe_cases import TEXT, VISION, blocks
from torch import nn

from cyclip_loss import CyCLIPLoss, WithCyclicPenalty, open_clip_train
from reference_train.data.emoji import EMOJI_FOLDER


def flags(folder: Path, *more: str) -> list[str]:
    """Those of the recipes' command line, with a tiny model and the emoji instead."""
    config = {"embed_dim": 16, "vision_cfg": VISION, "text_cfg": TEXT}
    (folder / "tiny").mkdir(exist_ok=True)
    config = json.dumps({"model_cfg": config, "preprocess_cfg": {}})
    (folder / "tiny" / "open_clip_config.json").write_text(config)
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


def assert_three_terms(folder: Path, count: int) -> None:
    steps = logged_terms(folder)
    assert len(steps) == count
    for step in steps:
        loss = step.pop("Loss")
        assert tuple(name.lower() for name in step) == TERMS
        assert sum(step.values()) == pytest.approx(loss, rel=1e-3)
        assert step["Inmodal_cyclic_loss"] > 0


def test_open_clip_trains_with_it(tmp_path: Path) -> None:
    help_text = run_python("-m", open_clip_train.__name__, "--help").stdout
    assert help_text.index("--lambda-inmodal LAMBDA") < help_text.index("--train-data TRAIN_DATA")
    run = run_python("-m", open_clip_train.__name__, *flags(tmp_path))
    assert run.returncode == 0, run.stderr
    assert_three_terms(tmp_path, 4)
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
    assert_three_terms(tmp_path, 1 if "--accum-freq" in options else 2)


# Made-up trainers: (the loss they ask for) -> a module like `open_clip_train.main`.


def fake(loss: nn.Module | None, like: str = "", *, calls: bool = True, **options: Any) -> Any:
    """A trainer like OpenCLIP 3 or 4, or one without a way to make a loss; it takes two steps."""
    trainer: Any = ModuleType("open_clip_train.main")
    trainer.terms, task = [], nn.Module()
    trainer.parse_args = lambda argv: Namespace(argv=argv, **options)
    trainer.make = lambda: loss
    if like == "3":
        trainer.create_loss = lambda args: loss
        trainer.make = lambda: trainer.create_loss(None)
    elif like == "4":
        if loss is not None:
            task.loss = loss
        trainer.create_task = lambda args, model: task
        trainer.make = lambda: trainer.create_task(None, model=None).loss

    def main(argv: list[str]) -> None:
        trainer.args = trainer.parse_args(argv)
        trainer.loss = trainer.make()
        weight = nn.Parameter(torch.eye(4, device="cpu"))
        optimizer = torch.optim.SGD([weight], lr=0.1)
        for _ in range(2):
            features = nn.functional.normalize(torch.randn(2, 6, 4, device="cpu") @ weight, dim=-1)
            if calls:
                terms = trainer.loss(*features, logit_scale=10.0, output_dict=True)
                trainer.terms.append(terms)
            features.sum().backward()
            optimizer.step()
        trainer.finished = True

    trainer.main = main
    return trainer


def never_asks() -> Any:
    trainer = fake(ClipLoss(), "3")
    trainer.make = ClipLoss
    return trainer


def launch(trainer: Any, monkeypatch: pytest.MonkeyPatch, *argv: str) -> Any:
    monkeypatch.setitem(sys.modules, "open_clip_train", ModuleType("open_clip_train"))
    monkeypatch.setitem(sys.modules, "open_clip_train.main", trainer)
    open_clip_train.main(argv)
    return trainer


@pytest.mark.parametrize("like", ["3", "4"])
def test_clip_is_replaced(like: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # torchrun takes a "--" between its own flags and these.
    argv = ("--", "--lambda-inmodal", "0.5", "--dist-impl", "ring", "--epochs", "3")
    trainer = launch(fake(ClipLoss(local_loss=True), like), monkeypatch, *argv)
    assert trainer.finished
    loss = trainer.loss
    assert type(loss) is CyCLIPLoss
    assert (loss.lambda_inmodal, loss.lambda_crossmodal, loss.dist_impl) == (0.5, 0.25, "ring")
    assert loss.local_loss
    assert tuple(trainer.terms[0]) == TERMS
    # Theirs get their flags; the parsed ones have ours as well.
    assert trainer.args.argv == ["--epochs", "3"]
    assert trainer.args.lambda_inmodal == 0.5
    # The hook does not outlive the run.
    weight = nn.Parameter(torch.ones(1, device="cpu"))
    weight.grad = torch.ones(1, device="cpu")
    torch.optim.SGD([weight], lr=0.1).step()


@pytest.mark.parametrize("like", ["3", "4"])
@pytest.mark.parametrize("theirs", [ClipLoss, SigLipLoss, CoCaLoss, DistillClipLoss])
def test_every_loss_gets_the_penalties(like: str, theirs: Any, monkeypatch) -> None:
    """Whose weights mean the same at every batch size, unless that is 0."""
    for size, expected in ((None, 128), ("512", 512), ("0", None)):
        loss = theirs(*((2.0, 1.0) if theirs is CoCaLoss else ()))
        trainer = fake(loss, like)
        trainer.main = lambda argv, at=trainer: setattr(at, "loss", at.make())
        launch(trainer, monkeypatch, *([] if size is None else ["--reference-batch-size", size]))
        assert trainer.loss.reference_batch_size == expected
        if theirs is not ClipLoss:
            assert isinstance(trainer.loss, WithCyclicPenalty)
            assert trainer.loss.loss is loss


@pytest.mark.parametrize(
    ("trainer", "message"),
    [
        (fake(ClipLoss()), "in a way that this launcher does not know"),
        (never_asks(), "not asked for"),
        (fake(ClipLoss(), "3", calls=False), "made but not called"),
        (fake(ClipLoss(), "4", calls=False), "made but not called"),
        (fake(None, "4"), "no loss of two features: loss must be a module, got None"),
        (fake(nn.CrossEntropyLoss(), "3"), "CrossEntropyLoss.forward takes ['input', 'target']"),
        (fake(nn.CrossEntropyLoss(), "4"), "CrossEntropyLoss.forward takes ['input', 'target']"),
        (fake(ClipLoss(), "3", horovod=True), "--horovod is not supported"),
    ],
)
def test_what_cannot_work_stops(trainer: Any, message: str, monkeypatch) -> None:
    with pytest.raises(SystemExit) as stopped:
        launch(trainer, monkeypatch)
    assert message in str(stopped.value)
    assert "\n" not in str(stopped.value)
    assert not hasattr(trainer, "finished")


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        *(("lambda-inmodal", "-1"), ("reference-batch-size", "-1")),
        *(("lambda-warmup", wrong) for wrong in ("-1", "1.5", "half")),
    ],
)
def test_wrong_weights_are_refused_before_anything_starts(flag, value, monkeypatch, capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        launch(fake(ClipLoss(), "3"), monkeypatch, f"--{flag}", value)
    assert stopped.value.code == 2
    assert flag in capsys.readouterr().err.replace("_", "-").splitlines()[-1]


class Other(ClipLoss):
    """By its type, none that CyCLIPLoss may stand for."""


def with_schedule(trainer: Any, epoch: int = 0) -> Any:
    """Trains as the real ones do: 2 epochs of 5 steps of 3 batches, resumed from an epoch."""
    trainer.cosine_lr = lambda optimizer, lr, warmup, steps: trainer.rates.append
    trainer.rates, trainer.seen = [], []

    def main(argv: list[str]) -> None:
        trainer.args = trainer.parse_args(argv)
        loss = trainer.make()
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


@pytest.mark.parametrize("version", ["3", "4"])
@pytest.mark.parametrize("theirs", [ClipLoss, Other])
@pytest.mark.parametrize(
    ("warmup", "length", "epoch"), [("4", 4, 0), ("8", 8, 1), ("0.8", 8, 1), ("1.0", 10, 0)]
)
def test_the_weights_warm_up(
    version: str, theirs: Any, warmup: str, length: int, epoch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = with_schedule(fake(theirs(), version), epoch)
    argv = ("--lambda-warmup", warmup, "--lambda-crossmodal", "1", "--impl", "eager")
    launch(trainer, monkeypatch, *argv)
    steps = [step for step in range(5 * epoch, 10) for _ in range(3)]
    shares = [min(1.0, (step + 1) / length) for step in steps]
    assert trainer.seen == [(0.25 * share, share, "eager") for share in shares]
    assert trainer.rates == steps
    assert trainer.args.lambda_warmup == float(warmup)


def test_a_warm_up_without_a_schedule_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    launch(with_schedule(fake(ClipLoss(), "3")), monkeypatch, "--skip-scheduler")
    argv = ("--skip-scheduler", "--lambda-warmup", "2")
    with pytest.raises(SystemExit, match="--lambda-warmup saw no step"):
        launch(with_schedule(fake(ClipLoss(), "3")), monkeypatch, *argv)


def test_the_trainer_of_open_clip_2(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("open_clip_train", "open_clip_train.main", "training"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(SystemExit, match=r"import of open_clip_train.*pip install"):
        open_clip_train.main([])
    trainer: Any = fake(ClipLoss(), "3")
    monkeypatch.setitem(sys.modules, "training", ModuleType("training"))
    monkeypatch.setitem(sys.modules, "training.main", trainer)
    open_clip_train.main([])
    assert trainer.finished
    monkeypatch.delattr(trainer, "create_loss")
    with pytest.raises(SystemExit, match="does not know"):
        open_clip_train.main([])
