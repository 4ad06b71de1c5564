"""`pretrain`: the command for OpenCLIP's trainer, what is refused before any work, and training."""

import errno
import io
import json
import logging
import math
import os
import re
import resource
import shlex
import subprocess
import sys
import textwrap
import time
from argparse import Namespace
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import permutations, product
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from processes import ROOT, run_python, start
from tars import make_shards, write_tar
from torch import Tensor, nn
from torchvision.transforms.functional import pil_to_tensor

from cyclip_loss import CyCLIPLoss, open_clip_train
from cyclip_loss.metrics import consistency_metrics
from reference_train.command_line import CannotStart, Stopped
from reference_train.files import locked
from reference_train.pretrain import loading, shards, training, views
from reference_train.pretrain import pretrain as command
from reference_train.pretrain.presets import BATCH_SIZES


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return make_shards(tmp_path / "data", train=4, val=1)


@pytest.fixture
def dry_run(data: Path, tmp_path: Path, capsys):
    """What OpenCLIP and the launcher make of the command that is printed."""

    def run(*flags: str, batch: Sequence[str] = ("--batch-size", "8")) -> Namespace:
        argv = ["--preset", "modern", "--data", str(data), "--out", str(tmp_path / "logs")]
        command.main([*argv, *batch, "--dry-run", *(word.format(folder=data) for word in flags)])
        printed = shlex.split(capsys.readouterr().out)
        launcher, end = printed[:3], printed.index("--") + 1
        if "--views" in flags:
            assert launcher == ["python", "-m", "reference_train.pretrain.views"]
        else:
            assert launcher == ["python", "-m", open_clip_train.__name__]
        ours, theirs = open_clip_train.parse(printed[end:])
        views_flag = {"views_flag": printed[3 : end - 1]}
        return Namespace(**{**vars(command.trainer.parse_args(theirs)), **vars(ours), **views_flag})

    return run


def test_the_printed_command_is_that_of_preset_and_loss(data: Path, dry_run) -> None:
    lambdas = {"clip": (0, 0), "cyclip": (0.25, 0.25), "c-cyclip": (0, 0.25), "i-cyclip": (0.25, 0)}
    for preset, loss in product(BATCH_SIZES, lambdas):
        argv = ["--preset", preset, "--loss", loss, "--seed", "3", "--dist-impl", "ring"]
        args = dry_run(*argv, "--", "--workers", "2", "--epochs", "7")
        assert (args.lambda_inmodal, args.lambda_crossmodal) == lambdas[loss]
        assert args.train_data == f"{data}/train-{{00000..00003}}.tar"
        assert args.val_data == f"{data}/val-00000.tar"
        assert (args.epochs, args.workers, args.seed) == (7, 2, 3)  # what follows -- comes last
        assert args.name == f"{preset}-{loss}-3"
        assert (args.reference_batch_size, args.dist_impl) == (128, "ring")  # the launcher's own


def test_the_printed_command_has_the_views(dry_run) -> None:
    for flags, how in (["--views"], "autoaugment"), (["--views", "own"], "own"):
        args = dry_run("--loss", "clip", *flags)
        assert args.views_flag == ["--views", how]
        assert args.name == "modern-clip-views-0"
    for flag in ("--same-captions ignored", "--distill-model RN50 --distill-pretrained openai"):
        words = f"{flag.split()[0]} does not go with --views"
        with pytest.raises(CannotStart, match=words):
            dry_run("--views", "--", *flag.split())


def test_the_paper_preset_has_the_papers_settings(dry_run, monkeypatch) -> None:
    monkeypatch.setattr(command.torch.cuda, "is_available", lambda: False)
    # pairs that nobody has counted
    data = ["--data", "pipe:cat {folder}/train-{{00000..00003}}.tar", "--", "--workers", "4"]
    dry_run = partial(dry_run, batch=())
    args = dry_run("--preset", "paper", *data, "--train-num-samples", "1")
    assert (args.model, args.batch_size) == ("RN50-quickgelu", 128)
    assert (args.epochs, args.warmup) == (64, 10_000)
    assert args.precision == "fp32"  # on a CPU
    assert (args.lr, args.wd, args.eps, args.beta1, args.beta2) == (5e-4, 0.1, 1e-8, 0.9, 0.999)
    for preset in ("icons", "modern"):
        assert dry_run("--preset", preset, *data, "--train-num-samples", "9").batch_size == 1024
    assert args.aug_cfg == {"use_timm": True, "scale": (1.0, 1.0), "ratio": (1.0, 1.0)}


@pytest.mark.parametrize("variable", ["WORLD_SIZE", "SLURM_NTASKS"])  # torchrun's, srun's
def test_ranks_share_batch_and_shards(variable: str, dry_run, monkeypatch) -> None:
    monkeypatch.setenv(variable, "2")
    monkeypatch.setattr(command.torch.cuda, "is_available", lambda: True)
    args = dry_run("--", "--workers", "2")
    assert (args.batch_size, args.precision) == (4, "amp_bf16")
    with pytest.raises(CannotStart, match="has 4 shards for 6 workers"):
        dry_run("--", "--workers", "3")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("--val {folder}/none-{{0..3}}.tar", "--val: no such shard: .*none-0.tar"),
        ("--data {folder}/sizes.json", r"sizes\.json: can't be read: [\w ]+$"),
        ("-- --model RN51", "--model RN51: OpenCLIP has none of that name"),
        ("--data s3://b/{{0..2}}.tar", r"is not known .* say it after --, e\.g\. -- --train-num"),
        ("--batch-size 9", "may hold 8 pairs and its batch is 9: take fewer --workers .now 4., a"),
        ("--batch-size 33 -- --workers 0", "hold 32 pairs and its batch is 33: take a smaller"),
        ("--lambda-inmodal nan", "--lambda-inmodal must be finite and >= 0"),
        ("-- --lambda-crossmodal -1", "--lambda-crossmodal must be finite and >= 0"),
        ("-- --epochs many", "argument --epochs: invalid int value: 'many'"),
        ("--dry 3", "--dry: OpenCLIP's own flags go after --"),  # no abbreviation of --dry-run
        ("--loss geometric", "--loss: invalid choice: 'geometric'"),
        ("-- --dataset-type csv", "--dataset-type csv: pretrain takes webdataset only"),
        ("-- --train-num-samples 0", "--train-num-samples must be >= 1, not 0"),
        ("--out /proc/logs", "--out: /proc/logs/.* can't be written: /proc is no folder to"),
        ("-- --report-to all", "--report-to all: pip install tensorboard"),
        ("WORLD_SIZE --batch-size 7", "--batch-size 7 is of all ranks and does not divide by 2"),
        ("WORLD_SIZE -- --workers 2", "several ranks on a CPU: OpenCLIP 3 can't do that"),
        ("OMPI_COMM_WORLD_SIZE", "2 ranks of MPI"),  # OpenCLIP counts them; each would be alone
    ],
)
def test_pretrain_refuses_before_any_work(
    change: str, message: str, dry_run, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(command.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None)
    words = change.split()
    if words[0].isupper():
        monkeypatch.setenv(words.pop(0), "2")
    with pytest.raises(CannotStart, match=message) as error:
        dry_run(*words)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "logs").exists()


def test_numbers_of_pairs_come_from_img2datasets_files(data: Path, tmp_path: Path, dry_run) -> None:
    for number, path in enumerate(sorted(data.glob("train*.tar"))):
        (tmp_path / path.name).symlink_to(path)
        (tmp_path / f"{path.stem}_stats.json").write_text(f'{{"successes": {5 + number}}}')
    counted = ["--data", str(tmp_path), "--batch-size"]
    args = dry_run(*counted, "5")
    assert (args.train_num_samples, args.val_data) == (5 + 6 + 7 + 8, None)  # nothing is held out
    with pytest.raises(CannotStart, match="may hold 5 pairs and its batch is 6"):
        dry_run(*counted, "6")
    (tmp_path / "__len__").write_text("26")  # OpenCLIP reads it
    assert dry_run(*counted, "5").train_num_samples is None
    write_tar(tmp_path / "empty.tar", {"a.txt": b"a caption"})
    with pytest.raises(CannotStart, match=r"--data: .*empty\.tar holds no image with a caption"):
        dry_run("--data", f"{tmp_path}/empty.tar::{data}/train-00000.tar")
    (tmp_path / "sizes.json").write_text("[")
    with pytest.raises(CannotStart, match=r"sizes\.json: says no numbers of pairs"):
        dry_run(*counted, "5")


def test_held_out_shards_are_whole_and_not_trained_on(tmp_path: Path, dry_run) -> None:
    """They are not trained on, and have to be whole."""
    data = make_shards(tmp_path / "cc3m", **{"cc3m-train": 4, "cc3m-validation": 1})
    args = dry_run("--data", str(data))
    assert args.train_data == f"{data}/cc3m-train-{{00000..00003}}.tar"
    assert args.val_data == f"{data}/cc3m-validation-00000.tar"
    data = make_shards(tmp_path / "part", part=4, val=1)
    assert dry_run("--data", str(data)).train_data == f"{data}/part-{{00000..00003}}.tar"
    sizes = (data / "sizes.json").read_text().replace('"val-00000.tar": 8', '"val-00000.tar": 9')
    (data / "sizes.json").write_text(sizes)
    with pytest.raises(CannotStart, match=r"--val: .*val-00000.tar holds 8 of 9 pairs"):
        dry_run("--data", str(data))
    for path in data.glob("part*.tar"):
        path.unlink()
    with pytest.raises(CannotStart, match=r"no tar file in .* but for validation"):
        dry_run("--data", str(data))


# What a run is begun with, and keeps.
CHANGES = """
--model RN101, --seed 1, --epochs 40, --lr 1e-4, --wd 1, --warmup 1, --beta1 0.5, --eps 1e-3
--batch-size 4, --accum-freq 2, --precision bf16, --grad-clip-norm 1, --train-num-samples 9
--lambda-inmodal 1, --lambda-crossmodal 1, --reference-batch-size 64, --same-captions ignored
--force-image-size 48, --image-mean 0 0 0, --siglip, --lock-image, --use-bn-sync, --local-loss
"""


def test_a_run_goes_on_with_its_settings(dry_run, tmp_path: Path) -> None:
    argv = ["--name", "run", "--", "--workers", "1", "--force-image-size", "32"]
    settings = {**vars(dry_run(*argv)), "force_image_size": 32, "world_size": 1}
    run = tmp_path / "logs" / "run"
    (run / "checkpoints").mkdir(parents=True)
    torch.save({"epoch": 1}, run / "checkpoints" / "epoch_latest.pt")
    (run / "params.txt").write_text("".join(f"{k}: {v}\n" for k, v in sorted(settings.items())))
    dry_run(*argv, "--log-every-n-steps", "3", "--grad-checkpointing")
    for change in CHANGES.strip().replace("\n", ", ").split(", "):
        name = change.split()[0].strip("-").replace("-", "_")
        message = f"begun with {name} = .*, not .*: choose another --name"
        with pytest.raises(CannotStart, match=message):
            dry_run(*argv, *change.split())
    with pytest.raises(CannotStart, match="begun with views = None, not own: choose another"):
        dry_run("--views", "own", *argv)


def break_picture(path: Path, last: bool = False) -> None:
    """The header of a shard's first picture, or the data of its last."""
    content = bytearray(path.read_bytes())
    place = content.rindex(b"IDAT") + 4 if last else content.index(b"PNG")
    content[place : place + 8] = bytes(8)
    path.write_bytes(content)


def test_the_best_epoch_is_kept(tmp_path: Path) -> None:
    """After one that is no number; in between, lines of zero-shot accuracy alone."""
    losses = [0, math.nan, 3, 1, 2, 0.5]
    model: Any = nn.Linear(2, 2, bias=False)
    # as DistributedDataParallel wraps it, and a task of OpenCLIP 4 that
    held = Namespace(trainable_module=nn.ModuleDict({"module": model}))

    def evaluate(_: Any, data: None, epoch: int, args: Namespace) -> Any:
        found = {training.LOSS: losses[epoch]}
        with open(tmp_path / "results.jsonl", "a") as file:
            for line in ({**found, "epoch": epoch}, {"imagenet-zeroshot-val-top1": 0.5}):
                file.write(json.dumps(line) + "\n")
        return found

    args = Namespace(save_logs=True, checkpoint_path=str(tmp_path), name="run")
    kept: list[tuple[Any, ...]] = []
    for epoch in range(1, 6):
        nn.init.constant_(model.weight, epoch)
        training.Guards({}, {}).evaluate(evaluate, held, None, epoch, args)
        for file in tmp_path.glob(training.BEST):
            saved = torch.load(file, weights_only=True)
            kept.append((saved["epoch"], saved["name"], saved["state_dict"]["weight"][0, 0]))
    assert kept == [(epoch, "run", epoch) for epoch in (2, 3, 3, 5)]
    (tmp_path / training.BEST).unlink()
    training.Guards({}, {}).evaluate(lambda *_: {}, held, None, 6, args)
    for change in {"fsdp": 1}, {"save_logs": False}:  # no whole model; another rank
        of_a_rank = Namespace(**{**vars(args), **change})
        training.Guards({}, {}).evaluate(evaluate, held, None, 5, of_a_rank)
    assert not (tmp_path / training.BEST).exists()


def test_gaps_and_correlations_are_added_to_the_validation(caplog) -> None:
    image, text = nn.functional.normalize(torch.randn(2, 10, 4), dim=-1)
    metrics = partial(training.Guards({}, {}).get_clip_metrics, lambda **features: {"R@1": 0.5})
    both = {"R@1": 0.5} | {k: float(v) for k, v in consistency_metrics(image, text).items()}
    assert metrics(image_features=image, text_features=text) == both
    assert metrics(image_features=image.split(4), text_features=text.split(4)) == both
    assert "collapsed" not in caplog.text
    metrics(image_features=image[:1].expand(10, 4), text_features=text)
    assert "All image features are collapsed to one point" in caplog.text
    assert "All text features" not in caplog.text


@pytest.fixture
def pretrain(data: Path, tmp_path: Path, monkeypatch):
    """Trains for an epoch of two steps, in this process; what it changes there is put back."""
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


def test_a_finished_run_says_so_and_takes_more_epochs(
    pretrain, data: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    """It says so, OpenCLIP loads its model as docs say, and it takes more epochs."""
    checkpoints = tmp_path / "run" / "checkpoints"
    pretrain()
    [first] = results(tmp_path)
    assert {"inmodal_gap", "crossmodal_gap"} <= first.keys()
    said = f"/run: finished, 1 epochs; the best was 1, clip_val_loss {first['clip_val_loss']:.4f}"
    assert capsys.readouterr().out.endswith(f"{said}\n")
    pretrain()
    assert capsys.readouterr().out.endswith(f"{said}; nothing left to do\n")
    page = (ROOT / "docs" / "pretraining.md").read_text()
    [block] = re.findall("```python\n(.*?)```", page, re.DOTALL)
    script = textwrap.dedent(block).replace("logs/icons-cyclip-0", str(tmp_path / "run"))
    loaded = run_python("-c", script)
    assert loaded.returncode == 0, loaded.stderr
    (checkpoints / ".best.pt.123").touch()  # left by a save that was killed
    data = data.rename(tmp_path / "moved")
    (tmp_path / "link").symlink_to(data)
    monkeypatch.chdir(tmp_path)
    for epochs, place in enumerate(["moved", tmp_path / "link"], start=2):
        pretrain("--epochs", str(epochs), data=Path(place))
    losses = {line["epoch"]: line["clip_val_loss"] for line in results(tmp_path)}
    assert list(losses) == [1, 2, 3]
    best = min(losses, key=losses.__getitem__)
    said = f"3 epochs; the best was {best}, clip_val_loss {losses[best]:.4f}\n"
    assert capsys.readouterr().out.endswith(said)
    assert {path.suffix for path in checkpoints.iterdir()} == {".pt", ".jsonl"}
    with pytest.raises(CannotStart, match="epochs = 3, not 2: choose another"):
        pretrain("--epochs", "2", data=data)
    (data / "train-00003.tar").unlink()
    with pytest.raises(CannotStart, match=r"begun with train_shards = 4 shards, .* not 3 shards, "):
        pretrain("--epochs", "3", data=data)
    os.truncate(checkpoints / "epoch_latest.pt", 10_000)
    with pytest.raises(CannotStart, match=r"epoch_latest.pt is cut short, or holds more"):
        pretrain(data=data)


def test_a_worker_without_a_batch_is_an_error(pretrain, data: Path) -> None:
    """Where nothing says how many pairs there are; of shards elsewhere, once it is known."""
    (data / "sizes.json").unlink()
    pipe = ["--train-data", f"pipe:cat {data}/train-0000{{0..3}}.tar"]
    for flags, message in (
        ([], "4 of 4 shards may hold 32 pairs and its batch is 33: take a smaller"),
        (pipe, "fewer pairs than its batch of 33: it would wait for ever; take a smaller batch$"),
    ):
        with pytest.raises(Stopped, match=message) as error:
            pretrain(*flags, batch=33, pairs=66)
        assert "\n" not in str(error.value)


def test_weights_that_are_not_finite_are_not_saved(pretrain, tmp_path: Path) -> None:
    with pytest.raises(Stopped, match="the model's weights are not finite: stopped"):
        pretrain("--lr", "1e30", "--warmup", "0", pairs=64)
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


def test_ten_losses_in_a_row_that_are_not_finite_stop_the_run() -> None:
    """With a loss that is no number; a step has as many losses as are accumulated, here 2."""
    args = Namespace(device="cpu", distributed=False, accum_freq=2)
    model, finite = nn.BatchNorm1d(2), training.Finite(args)

    def feed(*losses: float) -> None:
        for loss in losses:
            finite.note(model, (), {"a": torch.tensor(1.0), "b": torch.tensor(loss)})

    feed(*[math.nan] * 19, 1.0, *[math.inf] * 19)
    finite.check(model)
    feed(math.nan, 1.0)
    with pytest.raises(Stopped, match="the loss of 10 steps in a row was not finite"):
        finite.check(model)
    model.running_mean.fill_(math.nan)  # as an overflow leaves it, though GradScaler skips the step
    with pytest.raises(Stopped, match="the model's weights are not finite"):
        training.Finite(args).check(model)


def test_a_loader_checks_after_every_few_steps_and_at_the_end() -> None:
    seen, looks = [], []
    for batch in training.Loader("abcdefg", lambda: looks.append(len(seen)), every=3):
        seen.append(batch)
    assert looks == [3, 6, 7]


def test_what_one_rank_sees_stops_all_ranks(monkeypatch, caplog) -> None:
    """Another rank has counted 9 or 10 losses, has weights that are not finite, or lost a pair."""
    args = Namespace(device="cpu", distributed=True, accum_freq=1, log_every_n_steps=1, rank=0)
    other = torch.tensor([9, 0])

    def all_reduce(mine: Tensor, op: Any = torch.distributed.ReduceOp.SUM) -> None:
        mine.copy_(torch.maximum(mine, other) if op == torch.distributed.ReduceOp.MAX else mine + 1)

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    model = nn.Linear(1, 1)
    training.Finite(args).check(model)
    for seen, message in ([10, 0], "the loss of 10 steps"), ([0, 1], "the model's weights"):
        other.copy_(torch.tensor(seen))
        with pytest.raises(Stopped, match=message):
            training.Finite(args).check(model)
    guards = training.Guards({}, {})
    guards.args, guards.finite = args, training.Finite(args)
    guards.lost = Namespace(take=lambda: torch.tensor([4]), describe=Tensor.tolist)
    for args.rank in (0, 1):
        data, loss = {"train": Namespace(dataloader=[])}, nn.Identity()
        guards.train_one_epoch(lambda *_: None, model, data, loss)
        assert not loss._forward_hooks
    assert [r.getMessage() for r in caplog.records] == ["Not readable in this epoch: [5]"]


def test_pairs_that_can_not_be_read_are_counted(
    pretrain, data, tmp_path, monkeypatch, caplog
) -> None:
    monkeypatch.setattr(loading, "SHOWN", 2)
    _, one, two, three = shards = [data / f"train-{i:05d}.tar" for i in range(4)]
    os.truncate(one, one.stat().st_size // 2)  # in its fifth picture
    break_picture(two)
    three.write_bytes(b"")
    # 8 + 4 + 7 pairs are left: two batches of 8, twice. What workers log is not in caplog.
    pretrain("--workers", "0", "--epochs", "2", pairs=32)
    lines = [r.getMessage() for r in caplog.records if "Not readable" in r.getMessage()]
    for line in lines:
        assert f"13 pairs ({three} 8, {one} 4, 1 more)" in line
        assert f"2 shards cut short ({one} 1, {three} 1)" in line
    assert len(results(tmp_path)) == len(lines) == 2
    warned = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    told = [sum(str(shard) in message for message in warned) for shard in shards]
    assert told == [0, 3, 1, 3]  # once, and in the line of each epoch


def test_a_shard_that_ends_between_two_files_is_noticed(
    pretrain, data: Path, caplog, capsys
) -> None:
    """Is noticed where nothing says how many pairs it should have. No best epoch: no validation."""
    (data / "sizes.json").unlink()
    for shard in (data / "train-00001.tar", data / "val-00000.tar"):
        os.truncate(shard, shard.read_bytes().index(b"_4.png") - 1)  # a header starts with the name
    pretrain("--val-data", "")
    said = capsys.readouterr()
    assert "no held-out pairs" in said.err
    assert "finished, 1 epochs\n" in said.out
    assert f"1 shards cut short ({data}/train-00001.tar 1)" in caplog.text
    with pytest.raises(CannotStart, match=r"--val: .*val-00000.tar is cut short after 4 pairs"):
        pretrain()


def test_a_validation_that_lost_pairs_is_refused(pretrain, data, tmp_path, monkeypatch) -> None:
    """Before any work, or after the first epoch if the shards are elsewhere."""
    monkeypatch.setattr(shards, "SHOWN", 1)
    one = r"can't be read: .*val-00000\.tar, 0_0: cannot identify image file"
    for last, said in (False, f"1 pictures {one}$"), (True, f"2 pictures {one}; 1 more$"):
        break_picture(data / "val-00000.tar", last)
        with pytest.raises(CannotStart, match=f"--val: {said}"):
            pretrain()
    with pytest.raises(Stopped, match=r"validation lost pairs.*: 2 pairs \(.*val-00000.tar 2\)"):
        pretrain("--val-data", f"pipe:cat {data}/val-00000.tar")
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


def test_a_seed_fixes_the_pairs(pretrain, tmp_path: Path, monkeypatch) -> None:
    """Their order, and the crops of a run without a restart."""
    trainer, seen = command.trainer, []

    def look(model: Any, data: Any, loss: Any, epoch: int, *_: Any, tb_writer: Any) -> None:
        data["train"].set_epoch(epoch)
        seen.extend(data["train"].dataloader)

    def record(*flags: str) -> tuple[Tensor, Tensor]:
        seen.clear()
        (tmp_path / "run" / "checkpoints" / "epoch_latest.pt").unlink(missing_ok=True)
        pretrain("--epochs", "2", "--workers", "2", *flags, pairs=32)
        return torch.cat([image for image, _ in seen]), torch.cat([text for _, text in seen])

    monkeypatch.setattr(trainer, "train_one_epoch", look)
    monkeypatch.setattr(trainer, "evaluate", lambda *a, **b: {})
    first, again, other = record(), record(), record("--seed", "1")
    assert all(map(torch.equal, first, again))
    assert not torch.equal(first[1], other[1])
    assert not torch.equal(first[1][:32], first[1][32:])


def test_the_order_of_the_pairs_depends_on_seed_rank_worker_epoch_and_pass(monkeypatch) -> None:
    def first_draws(seed: int, rank: int, worker: int | None) -> list[float]:
        """The first random numbers of the shuffles of two epochs with two passes each."""
        epoch = Mock()
        dataset = Namespace(pipeline=[Namespace(urls=[])])
        info = Namespace(
            shared_epoch=epoch, dataloader=Namespace(pipeline=[Namespace(dataset=dataset)])
        )
        lost = loading.Watched(info, Namespace(seed=seed, rank=rank), {}, train=True)
        worker_info = None if worker is None else Namespace(id=worker)
        monkeypatch.setattr(loading, "get_worker_info", lambda: worker_info)
        draws = []
        for epoch.get_value.return_value in (0, 0, 1, 1):
            draws.append(lost.shuffle(lambda _, rng: rng.random(), None))
        return draws

    places = list(product((0, 1), (0, 1), (0, 1)))
    draws = [draw for place in places for draw in first_draws(*place)]
    assert len(set(draws)) == len(draws) == 32
    assert draws == [draw for place in places for draw in first_draws(*place)]
    assert first_draws(0, 0, None) == first_draws(0, 0, 0)


def test_wandb_continues_its_record_of_a_run_unless_told_otherwise(pretrain, monkeypatch) -> None:
    monkeypatch.setenv("WANDB_RESUME", "")  # put back afterwards
    monkeypatch.delenv("WANDB_RESUME")
    seen: list[str] = []
    train = Mock(side_effect=lambda _: seen.append(os.environ["WANDB_RESUME"]))
    monkeypatch.setattr(open_clip_train, "main", train)
    pretrain()
    monkeypatch.setenv("WANDB_RESUME", "never")
    pretrain()
    assert seen == ["allow", "never"]


def test_a_full_disk_leaves_no_stump(pretrain, tmp_path: Path, monkeypatch) -> None:
    """A limit on the size of files stands in for the disk. Other errors are shown as they are."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, before[1]))
    try:
        with pytest.raises(Stopped, match=r"best\.pt can't be written: is the disk full.+\Z"):
            pretrain()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert os.listdir(tmp_path / "run" / "checkpoints") == ["results.jsonl"]
    training.Guards({}, {}).save(torch.save, 1, buffer := io.BytesIO())
    assert buffer.tell()
    for number, kind in (errno.ENOSPC, Stopped), (errno.ESTALE, OSError):
        fails = Mock(side_effect=OSError(number, "why", "file"))
        monkeypatch.setattr(open_clip_train, "main", fails)
        with pytest.raises(kind, match="file can't be written: why" if kind is Stopped else "why"):
            pretrain()


def test_a_run_is_trained_by_one_process(pretrain, tmp_path: Path) -> None:
    lock = locked(tmp_path / "run")
    with ProcessPoolExecutor(1, get_context("fork"), lock.__enter__) as other:
        other.submit(os.getpid).result()  # it has the lock by now
        for ours in ([], ["--dry-run"]):
            with pytest.raises(CannotStart, match="/run: another process is at work there: choose"):
                pretrain(ours=ours)


def results(logs: Path) -> list[dict[str, float]]:
    path = logs / "run" / "checkpoints" / "results.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def logged_terms(caplog: pytest.LogCaptureFixture) -> list[dict[str, float]]:
    """The terms of each step in OpenCLIP's log, and "loss", their sum."""
    lines = [r.getMessage() for r in caplog.records if "Train Epoch" in r.getMessage()]
    steps = [re.findall(r"(\w*[Ll]oss): (\S+) \(", line) for line in lines]
    return [{name.lower(): float(value) for name, value in step} for step in steps]


SIDES = ("image", "text", "image_features", "text_features")


def test_a_step_with_views_has_the_loss_of_its_features_by_hand(
    pretrain, monkeypatch, caplog
) -> None:
    caplog.set_level(logging.INFO)
    calls: list[dict[str, Tensor]] = []
    forward, encode = CyCLIPLoss.forward, open_clip.CLIP.forward

    def record_inputs(model: Any, image: Tensor, text: Tensor) -> Any:
        output = encode(model, image, text)
        if model.training:
            calls.append({"image": image, "text": text, **output})
        else:
            assert image.shape[1:] == (3, 32, 32)  # held-out pairs have one view
            assert text.ndim == 2
        return output

    def record_terms(loss: CyCLIPLoss, **features: Any) -> Any:
        terms = forward(loss, **features)
        calls[-1] |= {"terms": terms.copy(), "given": features}
        return terms

    monkeypatch.setattr(open_clip.CLIP, "forward", record_inputs)
    monkeypatch.setattr(CyCLIPLoss, "forward", record_terms)
    pretrain("--log-every-n-steps", "1", ours=["--views"])
    logged = logged_terms(caplog)
    assert len(calls) == len(logged) == 2
    assert re.search(r"Train Epoch: 0 \[ 8/16 ", caplog.text)  # pairs, not views
    for call, of_step in zip(calls, logged, strict=True):
        assert call["image"].shape == (16, 3, 32, 32)
        of_pairs = {
            name: call[name].detach().unflatten(0, (8, 2)) for name in call if name in SIDES
        }
        for views_of_pairs in of_pairs.values():
            assert not torch.equal(*views_of_pairs.unbind(dim=1))
        images, second_images = of_pairs["image_features"].double().unbind(dim=1)
        texts, second_texts = of_pairs["text_features"].double().unbind(dim=1)
        scale, pairs = call["logit_scale"].detach().double(), torch.arange(8)

        def entropy(rows: Tensor, columns: Tensor) -> Tensor:
            return nn.functional.cross_entropy(scale * rows @ columns.T, pairs)  # noqa: B023

        across = entropy(images, texts) + entropy(texts, images)
        within = entropy(images, second_images) + entropy(texts, second_texts)
        inmodal = images @ images.T - texts @ texts.T
        crossmodal = images @ texts.T - texts @ images.T
        by_hand = {
            "contrastive_loss": across / 4,
            "inmodal_contrastive_loss": within / 4,
            "inmodal_cyclic_loss": 0.25 * 128 * inmodal.square().mean(),
            "crossmodal_cyclic_loss": 0.25 * 128 * crossmodal.square().mean(),
        }
        found = {name: term.detach().double() for name, term in call["terms"].items()}
        torch.testing.assert_close(found, by_hand, rtol=2e-5, atol=1e-6)
        loss = of_step.pop("loss")
        assert of_step == pytest.approx({k: float(v) for k, v in by_hand.items()}, rel=1e-3)
        assert loss == pytest.approx(sum(of_step.values()), rel=1e-3)


@pytest.mark.parametrize(("flag", "loss"), [("--siglip", "cyclip"), ("--accum-freq=2", "c-cyclip")])
def test_other_losses_and_accumulated_batches_train_with_views(
    flag: str, loss: str, pretrain, caplog
) -> None:
    caplog.set_level(logging.INFO)
    pretrain("--log-every-n-steps", "1", flag, ours=["--views", "own", "--loss", loss])
    logged = logged_terms(caplog)
    assert len(logged) == (2 if loss == "cyclip" else 1)
    for terms in logged:
        total = terms.pop("loss")
        assert total == pytest.approx(sum(terms.values()), rel=1e-3)
        positive = {name.removesuffix("_loss") for name in terms if terms[name] > 0}
        expected = {"contrastive", "inmodal_contrastive", "crossmodal_cyclic"}
        assert positive == expected | ({"inmodal_cyclic"} if loss == "cyclip" else set())


def test_another_loss_gets_the_first_views_and_the_term_of_the_views() -> None:
    image, text = torch.randn(4, 2, 3, 2, 2), torch.randint(9, (4, 2, 5))

    def encode(image: Tensor, text: Tensor) -> dict[str, Tensor]:
        features = {"image_features": image.mean(dim=(2, 3)), "text_features": text[:, :3] / 9}
        return {**features, "logits": text, "logit_scale": torch.tensor(3.0)}

    model = nn.Identity()
    with pytest.raises(Stopped, match=r"without second views: image \(4, 3, 2, 2\), text \("):
        views.forward_both_views(model, encode, image[:, 0], text)
    output = views.forward_both_views(model, encode, image, text)
    loss = Mock(spec=nn.Module, return_value={"caption_loss": torch.tensor(2.0)})
    terms = views.WithInmodalTerm(loss)(**output)
    first, second = (encode(image[:, view], text[:, view]) for view in (0, 1))
    for name, value in first.items():
        assert torch.equal(loss.call_args.kwargs[name], value)
    within = [3 * first[name] @ second[name].T for name in views.FEATURES]
    entropies = [nn.functional.cross_entropy(logits, torch.arange(4)) for logits in within]
    assert terms["caption_loss"] == 2
    assert terms["inmodal_contrastive_loss"] == pytest.approx(sum(entropies) / 2)
    assert len(terms) == 2


def test_views_of_a_caption() -> None:
    torch.manual_seed(0)

    def drawn(caption: str) -> set[tuple[str, ...]]:
        tokenized = (views.TwoCaptions(tokenize)(caption) for _ in range(300))
        return {
            tuple("".join(map(chr, view)).strip("\0") for view in both[0]) for both in tokenized
        }

    def tokenize(captions: list[str]) -> Tensor:
        codes = [[ord(letter) for letter in caption.ljust(40, "\0")] for caption in captions]
        return torch.tensor(codes)

    captions = ("a red fox", "a fox in snow", "fox")
    assert drawn("\n".join(captions) + "\n") == set(permutations(captions, 2))
    assert drawn("fox") == {("fox", "fox")}
    assert drawn("") == {("", "")}
    seconds = {second for first, second in drawn("red fox jumps") if first == "red fox jumps"}
    swapped = {"fox red jumps", "jumps fox red", "red jumps fox"}
    dropped = {"red fox", "red jumps", "fox jumps", "red", "fox", "jumps"}
    assert swapped <= seconds <= swapped | dropped | {"red fox jumps"}
    assert seconds & dropped


def test_views_of_a_picture() -> None:
    """One transform for both; AutoAugment changes the second before it is transformed."""
    torch.manual_seed(0)
    ramp = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
    picture = Image.fromarray(ramp).convert("P")
    transform = Mock(side_effect=pil_to_tensor)
    for how, changed in ("own", False), ("autoaugment", True):
        both = [views.TwoPictures(transform, how)(picture) for _ in range(10)]
        for first, second in both:
            assert torch.equal(first, torch.from_numpy(ramp).expand(3, 8, 8))
            assert changed or torch.equal(first, second)
        assert len({str(second.tolist()) for _, second in both}) > 5 or not changed
    assert transform.call_count == 40


@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], ["--views"]], ids=["pairs", "views"])
def test_a_killed_run_goes_on(flags: list[str], data: Path, tmp_path: Path) -> None:
    argv = ["-m", "reference_train", "pretrain", "--preset", "icons", "--batch-size", "8"]
    argv += ["--data", str(data), "--out", str(tmp_path), "--name", "run", *flags]
    argv += ["--", "--epochs", "6", "--train-num-samples", "16"]
    with start([sys.executable, *argv], stdout=subprocess.DEVNULL) as process:
        while len(results(tmp_path)) < 2 and process.poll() is None:
            time.sleep(0.05)
        process.kill()
    assert 2 <= len(results(tmp_path)) < 6
    again = run_python(*argv)
    assert again.returncode == 0, again.stderr
    assert {line["epoch"] for line in results(tmp_path)} == set(range(1, 7))
    log = (tmp_path / "run" / "out.log").read_text()
    assert ("Inmodal_contrastive_loss: " in log) == bool(flags)
