"""`pretrain`: the order of the pairs, and pairs that cannot be read."""

import logging
import os
from argparse import Namespace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import webdataset as wds
from open_clip_train.data import tarfile_to_samples_nothrow
from pretrain_runs import results
from tars import break_picture, cut_between_two_files
from torch import Tensor

from cyclip_loss import open_clip_train
from reference_train.command_line import CannotStart, Stopped
from reference_train.pretrain import loading, shards
from reference_train.pretrain import pretrain as command

pytest_plugins = ["pretraining"]


def test_a_seed_fixes_the_pairs_and_the_crops(pretrain, tmp_path: Path, monkeypatch) -> None:
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
    monkeypatch.setattr(trainer, "evaluate", lambda *_, **__: {})
    first, again, other = record(), record(), record("--seed", "1")
    assert all(map(torch.equal, first, again))
    assert not torch.equal(first[1], other[1])
    assert not torch.equal(first[1][:32], first[1][32:])


def info_of(*filters: Any) -> Namespace:
    """OpenCLIP's `DataInfo` of a pipeline with these filters."""
    dataset = Namespace(pipeline=[Namespace(urls=["a.tar"]), *filters])
    loader = Namespace(pipeline=[Namespace(dataset=dataset)])
    return Namespace(shared_epoch=Namespace(get_value=lambda: 0), dataloader=loader)


def test_the_shuffle_depends_on_seed_rank_worker_epoch_and_pass(monkeypatch) -> None:
    def first_draws(seed: int, rank: int, worker: int | None) -> list[float]:
        """The first random numbers of the shuffles of two epochs with two passes each."""
        info = info_of(tarfile_to_samples_nothrow, wds.shuffle(1))
        watched = loading.WatchedData(info, Namespace(seed=seed, rank=rank), {}, train=True)
        worker_info = None if worker is None else Namespace(id=worker)
        monkeypatch.setattr(loading, "get_worker_info", lambda: worker_info)
        draws = []
        for epoch in (0, 0, 1, 1):
            monkeypatch.setattr(info.shared_epoch, "get_value", lambda epoch=epoch: epoch)
            draws.append(watched.shuffle(lambda _, rng: rng.random(), None))
        return draws

    places = list(product((0, 1), (0, 1), (0, 1)))
    draws = [draw for place in places for draw in first_draws(*place)]
    assert len(set(draws)) == len(draws) == 32
    assert draws == [draw for place in places for draw in first_draws(*place)]
    assert first_draws(0, 0, None) == first_draws(0, 0, 0)


@pytest.mark.parametrize("filters", [[wds.shuffle(1)], [tarfile_to_samples_nothrow]])
def test_a_pipeline_that_openclip_builds_in_another_way_is_refused(filters: list[Any]) -> None:
    """Otherwise nothing would be counted, or the time of day would seed the shuffle."""
    args = Namespace(seed=0, rank=0)
    with pytest.raises(Stopped, match="OpenCLIP's data pipeline has a form that"):
        loading.WatchedData(info_of(*filters), args, {}, train=True)
    validation = info_of(wds.tarfile_to_samples(handler=None))  # is not shuffled
    loading.WatchedData(validation, args, {}, train=False)


UNCOUNTED = "4 of 4 shards may hold 32 pairs and its batch is 33: take a smaller"
REMOTE = "fewer pairs than its batch of 33: it would wait forever; take a smaller batch$"


@pytest.mark.parametrize(("remote", "message"), [(False, UNCOUNTED), (True, REMOTE)])
def test_a_worker_without_a_batch_is_an_error(
    remote: bool, message: str, pretrain, data: Path
) -> None:
    """It is raised before any work if the shards are local, else after a worker's first pass."""
    (data / "sizes.json").unlink()
    flags = ["--train-data", f"pipe:cat {data}/train-0000{{0..3}}.tar"] if remote else []
    with pytest.raises(Stopped, match=message) as error:
        pretrain(*flags, batch=33, pairs=66)
    assert "\n" not in str(error.value)


def test_pairs_that_cannot_be_read_are_counted_for_each_shard(
    pretrain, data, tmp_path, monkeypatch, caplog
) -> None:
    monkeypatch.setattr(loading, "MAX_SHOWN", 2)
    _, one, two, three = tars = [data / f"train-{i:05d}.tar" for i in range(4)]
    os.truncate(one, one.stat().st_size // 2)  # in its fifth picture
    break_picture(two)
    three.write_bytes(b"")
    # 8 + 4 + 7 pairs are left: two batches of 8 in each epoch. caplog misses what workers log.
    pretrain("--workers", "0", "--epochs", "2", pairs=32)
    lines = [r.getMessage() for r in caplog.records if "Not readable" in r.getMessage()]
    for line in lines:
        assert f"pairs: 13 ({three} 8, {one} 4, 1 more); " in line
        assert line.endswith(f"; shards cut short: 2 ({one} 1, {three} 1)")
    assert len(results(tmp_path)) == len(lines) == 2
    warned = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    warnings_per_shard = [sum(str(shard) in message for message in warned) for shard in tars]
    assert warnings_per_shard == [0, 3, 1, 3]  # when it is found, and in the line of each epoch


def test_a_shard_that_ends_between_two_files_is_reported(pretrain, data: Path, caplog) -> None:
    """Even if nothing says how many pairs it should have."""
    (data / "sizes.json").unlink()
    cut_between_two_files(data / "train-00001.tar")
    pretrain("--val-data", "")
    assert f"shards cut short: 1 ({data}/train-00001.tar 1)" in caplog.text


def test_a_held_out_shard_that_ends_between_two_files_is_refused(dry_run, data: Path) -> None:
    (data / "sizes.json").unlink()
    cut_between_two_files(data / "val-00000.tar")
    with pytest.raises(CannotStart, match=r"--val: .*val-00000.tar is cut short after 4 pairs"):
        dry_run("--", "--train-num-samples", "16")


def test_a_run_without_held_out_pairs_says_that_no_best_epoch_is_kept(
    pretrain, monkeypatch, capsys
) -> None:
    monkeypatch.setattr(open_clip_train, "main", lambda flags: None)
    pretrain("--val-data", "")
    printed = capsys.readouterr()
    assert "no held-out pairs" in printed.err
    assert printed.out.endswith("finished, 1 epochs\n")


def test_held_out_pictures_that_cannot_be_read_are_named_before_any_work(
    dry_run, data: Path, monkeypatch
) -> None:
    monkeypatch.setattr(shards, "MAX_SHOWN", 1)
    one = r"can't be read: .*val-00000\.tar, 0_0: cannot identify image file"
    for last, message in (False, f"1 pictures {one}$"), (True, f"2 pictures {one}; 1 more$"):
        break_picture(data / "val-00000.tar", last)
        with pytest.raises(CannotStart, match=f"--val: {message}"):
            dry_run()


def test_a_validation_that_lost_pairs_stops_the_run(pretrain, data: Path, tmp_path: Path) -> None:
    """Remote shards are not read before the first validation."""
    break_picture(data / "val-00000.tar")
    with pytest.raises(Stopped, match=r"validation lost pairs.*: pairs: 1 \(.*val-00000.tar 1\)"):
        pretrain("--val-data", f"pipe:cat {data}/val-00000.tar")
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []
