"""The patches of OpenCLIP's trainer: what is read and kept, and what stops a run."""

import math
import os
import resource
from argparse import Namespace
from functools import partial

import pytest
import torch
import webdataset as wds
from miniature import break_picture
from open_clip_train.data import tarfile_to_samples_nothrow
from torch import nn

from reference_train.command_line import RunFailed, UsageError
from reference_train.files import write_text
from reference_train.pretrain import patches
from reference_train.pretrain import pretrain as command

pytest_plugins = ["pretraining"]


# The validation's loss of each epoch, and what the arguments of its run have besides.
EPOCHS = [
    (None, {}),  # not validated
    (0.1, {"fsdp": 1}),  # no rank has the whole model
    (0.1, {"save_logs": False}),  # another rank than the first
    *((loss, {}) for loss in (math.nan, 3, 1, 2, 0.5)),
]


def test_the_epoch_with_the_lowest_loss_is_kept(tmp_path):
    """The model is wrapped in DistributedDataParallel, in a task of OpenCLIP 4."""
    kept = []
    for epoch, (loss, changes) in enumerate(EPOCHS):
        model = Namespace(state_dict=lambda epoch=epoch: {"module.weight": epoch})
        found = {} if loss is None else {patches.LOSS: loss}
        evaluate = partial(patches.TrainerPatches({}).evaluate, lambda *_, found=found: found)
        given = {"save_logs": True, "checkpoint_path": str(tmp_path), "name": "run", **changes}
        evaluate(Namespace(trainable_module=model), None, epoch, Namespace(**given))
        for file in tmp_path.glob(patches.BEST):
            saved = torch.load(file, weights_only=True)
            kept.append((saved["epoch"], saved["name"], saved["state_dict"]))
    assert kept == [(epoch, "run", {"weight": epoch}) for epoch in (4, 5, 5, 7)]


def test_weights_that_are_not_finite_are_not_saved(pretrain, tmp_path):
    with pytest.raises(RunFailed, match="the model's weights are not finite: stopped"):
        pretrain("--lr 1e30 --warmup 0", pairs=64)
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


def stops(rank, world_size):
    """Whether this rank stops, if the first rank has a number that is not finite."""
    found, args = [], Namespace(device="cpu", distributed=True)
    for name in ("none", "running_mean", "weight"):
        model = nn.BatchNorm1d(2)
        model.register_buffer("attn_mask", torch.tensor(-torch.inf))
        if rank == 0 and name != "none":
            model.state_dict()[name][1] = math.nan
        try:
            patches.check_finite(model, args)
            found.append(False)
        except RunFailed:
            found.append(True)
    return found


def test_weights_or_statistics_that_are_not_finite_on_one_rank_stop_all(ranks):
    """An overflow leaves running statistics so, even if GradScaler skips the step."""
    assert ranks.run(2, stops) == [[False, True, True]] * 2


def test_a_seed_fixes_the_pairs_and_the_crops(pretrain, tmp_path, monkeypatch):
    seen = []

    def look(model, data, loss, epoch, *_, tb_writer):
        data["train"].set_epoch(epoch)
        seen.extend(data["train"].dataloader)

    def record(seed):
        """The images and the texts of two epochs of 32 pairs."""
        seen.clear()
        (tmp_path / "run" / "checkpoints" / "epoch_latest.pt").unlink(missing_ok=True)
        pretrain(f"--epochs 2 --workers 2 --seed {seed}", pairs=32)
        return [torch.cat(batches) for batches in zip(*seen, strict=True)]

    monkeypatch.setattr(command.trainer, "train_one_epoch", look)
    monkeypatch.setattr(command.trainer, "evaluate", lambda *_, **__: {})
    (images, texts), again, (_, other) = record(0), record(0), record(1)
    torch.testing.assert_close(again, [images, texts], rtol=0, atol=0)
    assert not torch.equal(texts, other)
    assert not torch.equal(texts[:32], texts[32:])


@pytest.mark.parametrize("filters", [[wds.shuffle(1)], [tarfile_to_samples_nothrow]])
def test_a_pipeline_that_openclip_builds_in_another_way_is_refused(filters):
    """Otherwise nothing would be counted, or the time of day would seed the shuffle."""
    loader = Namespace(pipeline=[Namespace(dataset=Namespace(pipeline=filters))])
    with pytest.raises(RunFailed, match="OpenCLIP's data pipeline has a form that"):
        patches.watch(Namespace(dataloader=loader), Namespace(seed=0, rank=0), True)


def test_ranks_shuffle_in_their_own_orders():
    draws = set()
    for rank in (0, 1):
        filters = [tarfile_to_samples_nothrow, wds.shuffle(1)]
        loader = Namespace(pipeline=[Namespace(dataset=Namespace(pipeline=filters))])
        patches.watch(Namespace(dataloader=loader), Namespace(seed=0, rank=rank), True)
        draws.add(filters[1].kw["rng"].random())
    assert len(draws) == 2


def test_a_worker_without_a_batch_is_an_error_after_its_first_pass(pretrain, data):
    """If the number of pairs is not known before that."""
    (data / "sizes.json").unlink()
    message = "fewer pairs than its batch of 33: it would wait forever; take fewer --workers or a"
    with pytest.raises(RunFailed, match=message) as error:
        pretrain(batch=33, pairs=66)
    assert "\n" not in str(error.value)


def test_unreadable_pairs_are_counted_and_the_rest_is_trained_on(pretrain, data, tmp_path, caplog):
    _, one, two, three = (data / f"train-{i:05d}.tar" for i in range(4))
    os.truncate(one, one.stat().st_size // 2)  # in its fifth picture
    break_picture(two)
    three.write_bytes(b"")
    # 8 + 4 + 7 pairs are left: two batches of 8. caplog misses what workers log.
    pretrain("--workers 0")
    assert caplog.text.count("Unreadable in this epoch: ") == 1
    assert str(three) in caplog.text
    assert (tmp_path / "run" / "checkpoints" / patches.BEST).exists()


def test_unreadable_held_out_pairs_stop_a_run_before_its_first_step(pretrain, data, caplog):
    break_picture(data / "val-00000.tar")
    with pytest.raises(UsageError, match="--val: 1 unreadable held-out pairs or shards"):
        pretrain("--workers 0")
    assert "Start epoch" not in caplog.text


def test_a_full_disk_leaves_no_partial_file(pretrain, tmp_path):
    """A limit on the size of files imitates a full disk. OpenCLIP saves an epoch, too."""
    checkpoints = tmp_path / "run" / "checkpoints"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, before[1]))
    try:
        with pytest.raises(RunFailed, match=r"best\.pt can't be written: is the disk full\? .*pos"):
            pretrain()
        assert os.listdir(checkpoints) == ["results.jsonl"]
        with pytest.raises(RunFailed, match=r"a checkpoint can't be written: is the disk full\?"):
            pretrain("--val-frequency 0")
        with pytest.raises(RunFailed, match="x can't be written: File too large"):
            write_text("x" * 1_000_001, tmp_path / "x")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.glob("*x*"))
