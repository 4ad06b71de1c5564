"""`pretrain`: the command that it prints, and what it refuses before any work."""

import json
import os
import re
from itertools import product

import pytest
from miniature import write_tar
from processes import ROOT
from webdataset.shardlists import expand_urls

from cyclip_loss import open_clip_train
from cyclip_loss.options import PRESETS
from reference_train import files
from reference_train.command_line import UsageError
from reference_train.losses import LOSSES
from reference_train.pretrain import pretrain as command
from reference_train.pretrain import shards
from reference_train.pretrain.presets import BATCH_SIZES

pytest_plugins = ["pretraining"]


LAMBDAS = {"clip": (0, 0), "cyclip": (1, 1), "c-cyclip": (0, 1), "i-cyclip": (1, 0)}
LAMBDAS |= {"siglip": (0, 0), "cysiglip": (1, 1), "c-cysiglip": (0, 1)}


def test_the_printed_command_trains_the_preset_with_the_lambdas_of_the_loss(data, dry_run):
    """SigLIP's λ is 1/32, an eighth of the other losses'."""
    assert LAMBDAS.keys() == {*LOSSES}
    for preset, loss in [*product(BATCH_SIZES, ["clip", "cyclip"]), *product(["modern"], LAMBDAS)]:
        args = dry_run(f"--preset {preset} --loss {loss} --seed 3")
        weight = 1 / 32 if "siglip" in loss else 0.25
        expected = [weight * share for share in LAMBDAS[loss]]
        assert [args.lambda_inmodal, args.lambda_crossmodal] == expected
        assert args.siglip == ("siglip" in loss)
        assert args.train_data == f"{data}/train-{{00000..00003}}.tar"
        assert args.val_data == f"{data}/val-00000.tar"
        assert (args.name, args.seed) == (f"{preset}-{loss}-3", 3)
        penalties = "none"
        if any(LAMBDAS[loss]):
            penalties = "paper" if preset == "paper" else "recommended"
        values = {"reference_batch_size": 128} if loss.endswith("cysiglip") else PRESETS[penalties]
        for name, value in (open_clip_train.PENALTIES | values).items():
            assert name in open_clip_train.LAMBDAS or getattr(args, name) == value
        assert args.train_num_samples == (65536 if preset == "icons" else 32)
    chosen = dry_run('--loss math:dist --loss-arguments {"p":1}')
    assert (chosen.loss, chosen.name) == ("math:dist", "modern-dist-0")
    assert (chosen.loss_arguments, chosen.lambda_inmodal) == ({"p": 1}, 0)
    siglip = dry_run("--loss siglip")
    assert (siglip.logs, siglip.name) == ("logs", "modern-siglip-0")


def test_presets_are_those_of_the_page(dry_run):
    page = (ROOT / "docs" / "pretraining.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \| (.*?) \| (.*?) \| (.*?) \|", page, re.MULTILINE)
    assert [preset for preset, *_ in rows] == ["paper", "modern", "icons"]
    for preset, model, batch, *numbers in rows:
        unknown = "--data s3://b/{0..9}.tar -- --train-num-samples 65536"
        args = dry_run(f"--preset {preset} {unknown}", batch="")
        assert args.batch_size == int(batch.replace(",", ""))
        assert [args.epochs, args.lr] == [float(number) for number in numbers]
        assert args.model in (model, "icons-rn-32")


def test_a_command_with_views_is_run_by_the_module_that_draws_them(dry_run):
    for flags, how in ("--views", "autoaugment"), ("--views own", "own"):
        args = dry_run(flags)
        assert (args.views_flag, args.name) == (["--views", how], "modern-clip-views-0")


def test_one_process_trains_a_run_and_its_other_ranks_take_no_lock(data, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "PATIENCE", 0)
    monkeypatch.setattr(command, "train", lambda flags: None)
    monkeypatch.setattr(command.patches.TrainerPatches, "install", lambda *_: None)
    words = f"--preset icons --batch-size 8 --data {data} --out {tmp_path} --name run".split()
    with files.locked(tmp_path / "run"):
        with pytest.raises(UsageError, match="run: another process is writing to it: choose"):
            command.main(words)
        monkeypatch.setenv("RANK", "1")
        command.main(words)


@pytest.mark.parametrize("variable", ["WORLD_SIZE", "SLURM_NTASKS"])  # torchrun's, srun's
def test_ranks_share_the_batch_and_the_shards(variable, dry_run, monkeypatch):
    monkeypatch.setenv(variable, "2")
    monkeypatch.setattr(command.torch.cuda, "is_available", lambda: True)
    args = dry_run("-- --workers 2")
    assert (args.batch_size, args.precision) == (4, "amp_bf16")
    with pytest.raises(UsageError, match="has 4 shards for 6 workers"):
        dry_run("-- --workers 3")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("--val none-{0..3}.tar", "--val: no such shard: none-0.tar"),
        ("--data data/sizes.json", r"sizes\.json: can't be read: [\w ]+$"),
        ("-- --model RN51", "--model RN51: OpenCLIP has no model of this name"),
        ("--data s3://b/{0..2}.tar", r"is not known .* add it after --, e\.g\. -- --train-num"),
        ("--loss cyclp", "--loss cyclp: take clip, cyclip, .* or MODULE:NAME"),
        ("--loss math:nothing", "argument --loss: must be MODULE:NAME, not math:nothing: module"),
        ("--batch-size 9", "hold 8 pairs and its batch is 9: take fewer --workers .now 4., a"),
        ("--batch-size 33 -- --workers 0", "hold 32 pairs and its batch is 33: take"),
        ("--dry 3", "--dry: OpenCLIP's own flags go after --"),  # no abbreviation of --dry-run
        ("--views -- --dataset-type csv", r"python -m [\w.]+\.views --views takes"),
        ("--preset paper --views own", "--views own: .* both views would be equal; take"),
        ("--views -- --same-captions ignored", "--same-captions can't be combined with --views"),
        ("--loss clip --penalties strong", "--loss clip has no inmodal penalty: choose another"),
        ("--loss i-cyclip -- --lambda-crossmodal 1", "--loss i-cyclip has no crossmodal penalty"),
        ("--views --loss siglip", "--siglip can't be combined with --views"),
        ("WORLD_SIZE=2 --batch-size 7", "--batch-size 7, of all ranks .* is not divisible by 2"),
    ],
)
def test_pretrain_refuses_before_any_work(change, message, dry_run, tmp_path, monkeypatch):
    if change.startswith("WORLD_SIZE=2 "):
        monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match=message) as error:
        dry_run(change.removeprefix("WORLD_SIZE=2 "))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "logs").exists()


def test_numbers_of_pairs_come_from_img2datasets_files_or_sizes_json_of_each_folder(
    data, tmp_path, dry_run
):
    """Without such a file, OpenCLIP reads a file __len__."""
    folder = tmp_path / "img2dataset"
    folder.mkdir()
    for number, path in enumerate(sorted(data.glob("train*.tar"))):
        (folder / path.name).symlink_to(path)
        (folder / f"{path.stem}_stats.json").write_text(f'{{"successes": {5 + number}}}')
    args = dry_run(f"--data {folder} --batch-size 5")
    assert (args.train_num_samples, args.val_data) == (5 + 6 + 7 + 8, None)  # nothing is held out
    with pytest.raises(UsageError, match="may hold 5 pairs and its batch is 6"):
        dry_run(f"--data {folder} --batch-size 6")
    sizes = {f"train-{number:05}.tar": 9 + number for number in range(3)}
    (folder / "sizes.json").write_text(json.dumps(sizes))
    tars = "train-{00000..00003}.tar"
    args = dry_run(f"--data {data}/{tars}::{folder}/{tars}")
    assert args.train_num_samples == 4 * 8 + 9 + 10 + 11 + 8
    for broken in ('{"train-00000.tar": null}', "[8", "8"):
        (data / "sizes.json").write_text(broken)
        with pytest.raises(UsageError, match=r"sizes\.json: no JSON file of numbers: "):
            dry_run()
    (data / "sizes.json").unlink()
    (data / "__len__").write_text("32")
    assert dry_run().train_num_samples is None
    write_tar(tmp_path / "empty.tar", {"a.txt": b"a caption"})
    with pytest.raises(UsageError, match=r"--data: .*empty\.tar holds no image with a caption"):
        dry_run(f"--data {tmp_path}/empty.tar::{data}/train-00000.tar")


def test_shards_of_a_folder_are_told_apart_by_train_and_val_in_their_names(tmp_path):
    """Held-out shards are never trained on. Compressed shards are found, and braces in a path."""

    def find(*patterns):
        folder = tmp_path / "sh{1,2}" / patterns[0][:4]
        folder.mkdir(parents=True)
        for file in expand_urls("::".join(patterns)):
            (folder / file).touch()
        found = [shards.find(str(folder), part) for part in ("train", "val")]
        assert all(os.path.exists(path) for pattern in found for path in expand_urls(pattern))
        return [pattern.split("/")[-1] for pattern in found]

    for both in (
        ["cc3m-train-{00000..00003}.tar", "cc3m-validation-00000.tar"],
        ["part-{0..3}.tar.xz", "val-0.tar"],
    ):
        assert find(*both) == both
    with pytest.raises(UsageError, match=r"no tar file in .* except for validation"):
        find("val-0.tar")
    with pytest.raises(UsageError, match=r"trainval-0\.tar: is it for training or held out\?"):
        find("trainval-0.tar", "test-0.tar")
