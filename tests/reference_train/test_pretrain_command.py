"""`pretrain` before any work: what it gives to OpenCLIP's trainer, refuses, and resumes."""

import shlex
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from tars import make_shards

from cyclip_loss import open_clip_train
from reference_train.command_line import CannotStart
from reference_train.pretrain import pretrain as command
from reference_train.pretrain.presets import BATCH_SIZES


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    return make_shards(tmp_path_factory.mktemp("data") / "shards", train=4, val=1)


@pytest.fixture
def dry_run(shards: Path, tmp_path: Path, capsys):
    """What OpenCLIP and the launcher make of the command that is printed."""

    def run(*flags: str) -> Namespace:
        argv = ["--preset", "modern", "--data", str(shards), "--out", str(tmp_path / "logs")]
        words = [word.format(folder=shards, empty=tmp_path) for word in flags]
        command.main([*argv, "--batch-size", "8", "--dry-run", *words])
        printed = shlex.split(capsys.readouterr().out)
        assert printed[:4] == ["python", "-m", open_clip_train.__name__, "--"]
        ours, theirs = open_clip_train.parse(printed[4:])
        return Namespace(**{**vars(command.trainer.parse_args(theirs)), **vars(ours)})

    return run


@pytest.mark.parametrize("preset", BATCH_SIZES)
@pytest.mark.parametrize(
    ("loss", "lambdas"),
    [("clip", (0, 0)), ("cyclip", (0.25, 0.25)), ("c-cyclip", (0, 0.25)), ("i-cyclip", (0.25, 0))],
)
def test_the_printed_command(preset: str, loss: str, lambdas, shards: Path, dry_run) -> None:
    argv = ["--preset", preset, "--loss", loss, "--seed", "3", "--dist-impl", "ring"]
    args = dry_run(*argv, "--", "--workers", "2", "--epochs", "7")
    assert (args.lambda_inmodal, args.lambda_crossmodal) == lambdas
    assert args.train_data == f"{shards}/train-{{00000..00003}}.tar"
    assert args.val_data == f"{shards}/val-00000.tar"
    assert (args.epochs, args.workers, args.seed) == (7, 2, 3)  # what follows -- comes last
    assert args.name == f"{preset}-{loss}-3"
    assert (args.reference_batch_size, args.dist_impl) == (128, "ring")  # the launcher's own


def test_the_paper_preset(dry_run, monkeypatch) -> None:
    monkeypatch.setattr(command.torch.cuda, "is_available", lambda: False)
    # pairs that nobody has counted
    data = ["--data", "pipe:cat {folder}/train-{{00000..00003}}.tar", "--batch-size", "128"]
    args = dry_run("--preset", "paper", *data, "--", "--train-num-samples", "9")
    assert (args.model, args.batch_size, args.epochs, args.warmup) == ("RN50", 128, 64, 10_000)
    assert args.precision == "fp32"  # on a CPU
    assert (args.lr, args.wd, args.eps, args.beta1, args.beta2) == (5e-4, 0.1, 1e-8, 0.9, 0.999)
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
        ("--data {folder}/none-{{0..3}}.tar", "--data: no such shard: .*none-0.tar"),
        ("--data {empty}", "no tar file in"),
        ("--val {folder}/none.tar", "--val: no such shard"),
        ("--data {folder}/sizes.json", r"sizes\.json: can't be read: [\w ]+$"),
        ("-- --model RN51", "--model RN51: OpenCLIP has none of that name"),
        ("--data s3://b/{{0..2}}.tar -- --train-num-samples 9", "has 3 shards for 4 workers"),
        ("--data s3://b/{{0..2}}.tar", r"is not known .* say it after --, e\.g\. -- --train-num"),
        ("--batch-size 9", "may hold 8 pairs and its batch is 9: take fewer --workers .now 4., a"),
        ("--batch-size 33 -- --workers 0", "hold 32 pairs and its batch is 33: take a smaller"),
        ("--lambda-inmodal nan", "--lambda-inmodal must be finite and >= 0"),
        ("-- --lambda-crossmodal -1", "--lambda-crossmodal must be finite and >= 0"),
        ("-- --epochs many", "argument --epochs: invalid int value: 'many'"),
        ("--epochs 3", "--epochs: OpenCLIP's own flags go after --"),
        ("-- --dataset-type csv", "--dataset-type csv: pretrain takes webdataset only"),
        ("-- --train-num-samples 0", "--train-num-samples must be >= 1, not 0"),
        ("--out {folder}/sizes.json/logs", "--out: .*can't be written: .*sizes.json is no"),
        ("--out /proc/logs", "--out: /proc/logs/.* can't be written: /proc is no folder to"),
        ("-- --report-to all", "--report-to all: pip install tensorboard"),
        ("WORLD_SIZE --batch-size 7", "--batch-size 7 is of all ranks and does not divide by 2"),
        ("WORLD_SIZE -- --workers 2", "several ranks on a CPU: OpenCLIP 3 can't do that"),
        ("OMPI_COMM_WORLD_SIZE", "2 ranks of MPI"),  # OpenCLIP counts them; each would be alone
    ],
)
def test_what_it_refuses(change: str, message: str, dry_run, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(command.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None)
    words = change.split()
    if words[0].isupper():
        monkeypatch.setenv(words.pop(0), "2")
    with pytest.raises(CannotStart, match=message) as error:
        dry_run(*words)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "logs").exists()


def test_pairs_as_img2dataset_counts_them(shards: Path, tmp_path: Path, dry_run) -> None:
    for number, path in enumerate(sorted(shards.glob("train*.tar"))):
        (tmp_path / path.name).symlink_to(path)
        (tmp_path / f"{path.stem}_stats.json").write_text(f'{{"successes": {5 + number}}}')
    data = ["--data", str(tmp_path), "--batch-size"]
    assert dry_run(*data, "5").train_num_samples == 5 + 6 + 7 + 8
    with pytest.raises(CannotStart, match="may hold 5 pairs and its batch is 6"):
        dry_run(*data, "6")
    (tmp_path / "sizes.json").write_text("[")
    with pytest.raises(CannotStart, match=r"sizes\.json: says no numbers of pairs"):
        dry_run(*data, "5")


def test_held_out_shards(tmp_path: Path, dry_run) -> None:
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
