"""`pretrain`: what stops a training, what is added to its log, and what is kept of it."""

import errno
import json
import math
import os
import resource
from argparse import Namespace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cyclip_loss import open_clip_train
from cyclip_loss.metrics import consistency_metrics
from reference_train.command_line import RunFailed
from reference_train.files import atomic_write
from reference_train.pretrain import patches

pytest_plugins = ["pretraining"]


@pytest.fixture
def evaluate(tmp_path: Path):
    """Evaluates a model whose weights all equal its epoch, with a given validation loss."""
    model: Any = nn.Linear(2, 2, bias=False)
    # The model as DistributedDataParallel wraps it, in a task of OpenCLIP 4.
    task = Namespace(trainable_module=nn.ModuleDict({"module": model}))

    def run(epoch: int, loss: float | None, **changes: object) -> None:
        nn.init.constant_(model.weight, epoch)
        args = Namespace(save_logs=True, checkpoint_path=str(tmp_path), name="run")
        vars(args).update(changes)

        def original(_: Any, data: None, epoch: int, args: Namespace) -> Any:
            found = {} if loss is None else {patches.LOSS: loss}
            with open(tmp_path / "results.jsonl", "a") as file:
                for line in ({**found, "epoch": epoch}, {"imagenet-zeroshot-val-top1": 0.5}):
                    file.write(json.dumps(line) + "\n")
            return found

        patches.TrainerPatches({}).evaluate(original, task, None, epoch, args)

    return run


def test_the_epoch_with_the_lowest_loss_is_kept(evaluate, tmp_path: Path) -> None:
    """A loss that is NaN, and lines with zero-shot accuracy only, do not count."""
    kept: list[tuple[Any, ...]] = []
    for epoch, loss in enumerate([math.nan, 3, 1, 2, 0.5], start=1):
        evaluate(epoch, loss)
        for file in tmp_path.glob(patches.BEST):
            saved = torch.load(file, weights_only=True)
            kept.append((saved["epoch"], saved["name"], saved["state_dict"]["weight"][0, 0]))
    assert kept == [(epoch, "run", epoch) for epoch in (2, 3, 3, 5)]


@pytest.mark.parametrize(
    ("loss", "changes"),
    [(None, {}), (0.5, {"fsdp": 1}), (0.5, {"save_logs": False})],
    ids=["no validation", "no whole model", "another rank"],
)
def test_no_best_epoch_is_kept_without_a_loss_or_a_whole_model(
    loss: float | None, changes: dict[str, object], evaluate, tmp_path: Path
) -> None:
    evaluate(1, loss, **changes)
    assert not (tmp_path / patches.BEST).exists()


def test_gaps_and_correlations_are_added_to_the_validation() -> None:
    image, text = nn.functional.normalize(torch.randn(2, 10, 4), dim=-1)
    metrics = partial(patches.TrainerPatches({}).get_clip_metrics, lambda **features: {"R@1": 0.5})
    both = {"R@1": 0.5} | {k: float(v) for k, v in consistency_metrics(image, text).items()}
    assert metrics(image_features=image, text_features=text) == both
    assert metrics(image_features=image.split(4), text_features=text.split(4)) == both


def test_collapsed_features_give_a_warning(caplog) -> None:
    image, text = nn.functional.normalize(torch.randn(2, 10, 4), dim=-1)
    metrics = partial(patches.TrainerPatches({}).get_clip_metrics, lambda **features: {})
    metrics(image_features=image, text_features=text)
    assert "collapsed" not in caplog.text
    metrics(image_features=image[:1].expand(10, 4), text_features=text)
    assert "All image features are collapsed to one point" in caplog.text
    assert "All text features" not in caplog.text


def test_weights_that_are_not_finite_are_not_saved(pretrain, tmp_path: Path) -> None:
    with pytest.raises(RunFailed, match="the model's weights are not finite: stopped"):
        pretrain("--lr", "1e30", "--warmup", "0", pairs=64)
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


def test_losses_that_are_not_finite_in_ten_steps_in_a_row_stop_the_run() -> None:
    """A step has as many losses as batches are accumulated, here 2."""
    args = Namespace(device="cpu", distributed=False, accum_freq=2)
    model, finiteness = nn.BatchNorm1d(2), patches.FinitenessCheck(args)

    def feed(*losses: float) -> None:
        for loss in losses:
            finiteness.record(model, (), {"a": torch.tensor(1.0), "b": torch.tensor(loss)})

    feed(*[math.nan] * 19, 1.0, *[math.inf] * 19)
    finiteness.check(model)
    feed(math.nan, 1.0)
    with pytest.raises(RunFailed, match="the loss of 10 steps in a row was not finite"):
        finiteness.check(model)


def test_running_statistics_that_are_not_finite_stop_the_run() -> None:
    """An overflow leaves them so, even if GradScaler skips the step."""
    model = nn.BatchNorm1d(2)
    model.running_mean.fill_(math.nan)
    args = Namespace(device="cpu", distributed=False, accum_freq=1)
    with pytest.raises(RunFailed, match="the model's weights are not finite"):
        patches.FinitenessCheck(args).check(model)


def test_a_loader_checks_after_every_few_steps_and_at_the_end() -> None:
    seen, checked_after = [], []
    loader = patches.CheckedLoader("abcdefg", lambda: checked_after.append(len(seen)), every=3)
    for batch in loader:
        seen.append(batch)
    assert checked_after == [3, 6, 7]


@pytest.fixture
def other_rank(monkeypatch) -> Tensor:
    """Another rank's counts: non-finite losses in a row, and non-finite weights."""
    counts = torch.tensor([9, 0])

    def all_reduce(mine: Tensor, op: Any = torch.distributed.ReduceOp.SUM) -> None:
        is_max = op == torch.distributed.ReduceOp.MAX
        mine.copy_(torch.maximum(mine, counts) if is_max else mine + 1)

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    return counts


RANKS = {"device": "cpu", "distributed": True, "accum_freq": 1, "log_every_n_steps": 1}


@pytest.mark.parametrize(
    ("counts", "message"),
    [([10, 0], "the loss of 10 steps"), ([0, 1], "the model's weights")],
)
def test_a_number_that_is_not_finite_on_one_rank_stops_all_ranks(
    counts: list[int], message: str, other_rank: Tensor
) -> None:
    model = nn.Linear(1, 1)
    patches.FinitenessCheck(Namespace(**RANKS)).check(model)
    other_rank.copy_(torch.tensor(counts))
    with pytest.raises(RunFailed, match=message):
        patches.FinitenessCheck(Namespace(**RANKS)).check(model)


def test_a_full_disk_leaves_no_partial_file(pretrain, tmp_path: Path) -> None:
    """A limit on the size of files imitates a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, before[1]))
    try:
        with pytest.raises(RunFailed, match=r"best\.pt can't be written: is the disk full.+\Z"):
            pretrain()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert os.listdir(tmp_path / "run" / "checkpoints") == ["results.jsonl"]


@pytest.mark.parametrize(
    ("number", "kind", "message"),
    [(errno.ENOSPC, RunFailed, "file can't be written: why"), (errno.ESTALE, OSError, "why")],
)
def test_only_errors_of_a_full_disk_become_one_line(
    number: int, kind: type[Exception], message: str, pretrain, monkeypatch
) -> None:
    def fail(flags: list[str]) -> None:
        raise OSError(number, "why", "file")

    monkeypatch.setattr(open_clip_train, "main", fail)
    with pytest.raises(kind, match=message):
        pretrain()


def test_the_first_rank_logs_what_all_ranks_could_not_read(other_rank: Tensor, caplog) -> None:
    trainer, model = patches.TrainerPatches({}), nn.Linear(1, 1)
    trainer.args = Namespace(**RANKS)
    trainer.finiteness = patches.FinitenessCheck(trainer.args)
    trainer.pipeline = Namespace(take_lost=lambda: 4)
    for rank in (0, 1):
        trainer.args.rank = rank
        data, loss = {"train": Namespace(dataloader=[])}, nn.Identity()
        trainer.train_one_epoch(lambda *_: None, model, data, loss)
        assert not loss._forward_hooks
    assert [r.getMessage() for r in caplog.records] == [
        "Unreadable in this epoch: 5 pairs or shards"
    ]


def test_only_errors_of_the_writer_are_taken_for_a_full_disk(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="CUDA error"), atomic_write(tmp_path / "x"):
        raise RuntimeError("CUDA error: device-side assert")
    with pytest.raises(RunFailed, match="x can't be written: why"), atomic_write(tmp_path / "x"):
        raise OSError(errno.ENOSPC, "why")
    assert not list(tmp_path.iterdir())
