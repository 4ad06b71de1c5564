"""`pretrain`: the order of the pairs, and pairs that cannot be read."""

import os
from argparse import Namespace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import webdataset as wds
from open_clip_train.data import tarfile_to_samples_nothrow
from tars import break_picture, cut_between_two_files
from torch import Tensor

from reference_train.command_line import RunFailed, UsageError
from reference_train.pretrain import patches
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
    dataset = Namespace(pipeline=list(filters))
    loader = Namespace(pipeline=[Namespace(dataset=dataset)])
    return Namespace(shared_epoch=Namespace(get_value=lambda: 0), dataloader=loader)


def test_the_shuffle_depends_on_seed_rank_worker_epoch_and_pass(monkeypatch) -> None:
    def orders(seed: int, rank: int, worker: int | None) -> list[tuple[int, ...]]:
        """The orders of the passes of two epochs with two passes each."""
        info = info_of(tarfile_to_samples_nothrow, wds.shuffle(40, initial=40))
        pipeline = patches.Pipeline(info, Namespace(seed=seed, rank=rank), train=True)
        worker_info = None if worker is None else Namespace(id=worker)
        monkeypatch.setattr(patches, "get_worker_info", lambda: worker_info)
        found = []
        for epoch in (0, 0, 1, 1):
            monkeypatch.setattr(info.shared_epoch, "get_value", lambda epoch=epoch: epoch)
            shuffle = info.dataloader.pipeline[0].dataset.pipeline[1]
            found.append(tuple(shuffle(iter(range(40)))))
        assert pipeline.take_lost() == 0
        return found

    places = list(product((0, 1), (0, 1), (0, 1)))
    found = [order for place in places for order in orders(*place)]
    assert len(set(found)) == len(found) == 32
    assert found == [order for place in places for order in orders(*place)]
    assert orders(0, 0, None) == orders(0, 0, 0)


@pytest.mark.parametrize("filters", [[wds.shuffle(1)], [tarfile_to_samples_nothrow]])
def test_a_pipeline_that_openclip_builds_in_another_way_is_refused(filters: list[Any]) -> None:
    """Otherwise nothing would be counted, or the time of day would seed the shuffle."""
    args = Namespace(seed=0, rank=0)
    with pytest.raises(RunFailed, match="OpenCLIP's data pipeline has a form that"):
        patches.Pipeline(info_of(*filters), args, train=True)
    validation = info_of(wds.tarfile_to_samples(handler=None))  # is not shuffled
    patches.Pipeline(validation, args, train=False)


UNCOUNTED = "4 of 4 shards may hold 32 pairs and its batch is 33: take a smaller"
REMOTE = "fewer pairs than its batch of 33: it would wait forever; take fewer --workers or a"


@pytest.mark.parametrize(("remote", "message"), [(False, UNCOUNTED), (True, REMOTE)])
def test_a_worker_without_a_batch_is_an_error(
    remote: bool, message: str, pretrain, data: Path
) -> None:
    """It is raised before any work if the shards are local, else after a worker's first pass."""
    (data / "sizes.json").unlink()
    flags = ["--train-data", f"pipe:cat {data}/train-0000{{0..3}}.tar"] if remote else []
    with pytest.raises(RunFailed, match=message) as error:
        pretrain(*flags, batch=33, pairs=66)
    assert "\n" not in str(error.value)


def test_pairs_that_cannot_be_read_are_counted_in_every_epoch(pretrain, data, caplog) -> None:
    _, one, two, three = (data / f"train-{i:05d}.tar" for i in range(4))
    os.truncate(one, one.stat().st_size // 2)  # in its fifth picture
    break_picture(two)
    three.write_bytes(b"")
    # 8 + 4 + 7 pairs are left: two batches of 8 in each epoch. caplog misses what workers log.
    pretrain("--workers", "0", "--epochs", "2", pairs=32)
    lines = [r.getMessage() for r in caplog.records if "in this epoch" in r.getMessage()]
    # The ends of two shards, and a picture.
    assert lines == ["Unreadable in this epoch: 3 pairs or shards"] * 2
    for shard in (one, three):
        assert str(shard) in caplog.text


def test_a_shard_that_ends_between_two_files_is_refused_if_it_is_held_out(
    dry_run, data: Path, capsys
) -> None:
    for part in ("train-00001", "val-00000"):
        cut_between_two_files(data / f"{part}.tar")
        if part.startswith("train"):
            dry_run()
            continue
        with pytest.raises(UsageError, match=r"--val: .*val-00000.tar is cut short"):
            dry_run()
    assert "--data: " in (said := capsys.readouterr().err)
    assert "train-00001.tar is cut short" in said


def test_a_validation_that_lost_pairs_stops_the_run(pretrain, data: Path, tmp_path: Path) -> None:
    break_picture(data / "val-00000.tar")
    with pytest.raises(RunFailed, match="the validation lost 1 pairs, and can't choose an epoch"):
        pretrain()
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []
