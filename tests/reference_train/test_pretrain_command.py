"""`pretrain`: the command that it prints, and what it refuses before any work."""

import json
from functools import partial
from itertools import product
from pathlib import Path

import pytest
from tars import make_shards, write_tar

from reference_train.command_line import UsageError
from reference_train.pretrain import pretrain as command
from reference_train.pretrain.presets import BATCH_SIZES

pytest_plugins = ["pretraining"]


def test_the_printed_command_trains_the_preset_with_the_lambdas_of_the_loss(
    data: Path, dry_run
) -> None:
    lambdas = {"clip": (0, 0), "cyclip": (0.25, 0.25), "c-cyclip": (0, 0.25), "i-cyclip": (0.25, 0)}
    for preset, loss in product(BATCH_SIZES, lambdas):
        args = dry_run("--preset", preset, "--loss", loss, "--seed", "3")
        assert (args.lambda_inmodal, args.lambda_crossmodal) == lambdas[loss]
        assert args.train_data == f"{data}/train-{{00000..00003}}.tar"
        assert args.val_data == f"{data}/val-00000.tar"
        assert (args.name, args.seed) == (f"{preset}-{loss}-3", 3)
        assert args.reference_batch_size == 128


def test_flags_after_the_dashes_override_the_preset(dry_run) -> None:
    args = dry_run("--", "--workers", "2", "--epochs", "7", "--lr", "0.5")
    assert (args.workers, args.epochs, args.lr) == (2, 7, 0.5)


def test_the_launchers_own_flags_need_no_dashes(dry_run) -> None:
    args = dry_run("--dist-impl", "ring", "--reference-batch-size", "64")
    assert (args.dist_impl, args.reference_batch_size) == ("ring", 64)


@pytest.mark.parametrize(
    ("flags", "how"), [(["--views"], "autoaugment"), (["--views", "own"], "own")]
)
def test_a_command_with_views_is_run_by_the_module_that_draws_them(flags, how, dry_run) -> None:
    args = dry_run("--loss", "clip", *flags)
    assert args.views_flag == ["--views", how]
    assert args.name == "modern-clip-views-0"


@pytest.mark.parametrize(
    "flags",
    ["--same-captions ignored", "--distill-model RN50 --distill-pretrained openai", "--siglip"],
)
def test_views_refuse_other_losses_and_same_captions(flags: str, dry_run) -> None:
    with pytest.raises(UsageError, match=f"{flags.split()[0]} can't be combined with --views"):
        dry_run("--views", "--", *flags.split())


@pytest.fixture
def dry_run_of_uncounted_pairs(dry_run, monkeypatch):
    """A dry run without a GPU, on pairs that nobody has counted, with the preset's batch size."""
    monkeypatch.setattr(command.torch.cuda, "is_available", lambda: False)

    def run(preset: str, pairs: int) -> object:
        data = "pipe:cat {folder}/train-{{00000..00003}}.tar"
        flags = ["--preset", preset, "--data", data, "--", "--workers", "4"]
        return dry_run(*flags, "--train-num-samples", str(pairs), batch=())

    return run


def test_the_paper_preset_has_the_papers_settings(dry_run_of_uncounted_pairs) -> None:
    args = dry_run_of_uncounted_pairs("paper", 1)
    assert (args.model, args.batch_size) == ("RN50-quickgelu", 128)
    assert (args.epochs, args.warmup) == (64, 10_000)
    assert args.precision == "fp32"  # on a CPU
    assert (args.lr, args.wd, args.eps, args.beta1, args.beta2) == (5e-4, 0.1, 1e-8, 0.9, 0.999)
    assert args.aug_cfg == {"use_timm": True, "scale": (1.0, 1.0), "ratio": (1.0, 1.0)}


@pytest.mark.parametrize("variable", ["WORLD_SIZE", "SLURM_NTASKS"])  # torchrun's, srun's
def test_ranks_share_the_batch_and_the_shards(variable: str, dry_run, monkeypatch) -> None:
    monkeypatch.setenv(variable, "2")
    monkeypatch.setattr(command.torch.cuda, "is_available", lambda: True)
    args = dry_run("--", "--workers", "2")
    assert (args.batch_size, args.precision) == (4, "amp_bf16")
    with pytest.raises(UsageError, match="has 4 shards for 6 workers"):
        dry_run("--", "--workers", "3")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("--val {folder}/none-{{0..3}}.tar", "--val: no such shard: .*none-0.tar"),
        ("--data {folder}/sizes.json", r"sizes\.json: can't be read: [\w ]+$"),
        ("-- --model RN51", "--model RN51: OpenCLIP has no model of this name"),
        ("--data s3://b/{{0..2}}.tar", r"is not known .* add it after --, e\.g\. -- --train-num"),
        ("--batch-size 9", "may hold 8 pairs and its batch is 9: take fewer --workers .now 4., a"),
        ("--batch-size 33 -- --workers 0", "hold 32 pairs and its batch is 33: take a smaller"),
        ("--lambda-inmodal nan", "--lambda-inmodal must be finite and >= 0"),
        ("-- --lambda-crossmodal -1", "--lambda-crossmodal must be finite and >= 0"),
        ("-- --epochs many", "argument --epochs: invalid int value: 'many'"),
        ("--dry 3", "--dry: OpenCLIP's own flags go after --"),  # no abbreviation of --dry-run
        ("--loss geometric", "--loss: invalid choice: 'geometric'"),
        ("-- --dataset-type csv", "--dataset-type csv: pretrain takes webdataset only"),
        ("--views -- --dataset-type csv", r"python -m [\w.]+\.views --views takes"),
        ("--preset paper --views own", "--views own: .* both views would be equal; take"),
        ("-- --train-num-samples 0", "--train-num-samples must be >= 1, not 0"),
        ("--out /proc/logs", "--out: /proc/logs/.* can't be written: /proc is not a writable"),
        ("--out none", "--out none: OpenCLIP would save nothing"),
        ("-- --remote-sync s3://b", "--remote-sync: OpenCLIP can't resume from it"),
        ("WORLD_SIZE --batch-size 7", "--batch-size 7, of all ranks .* is not divisible by 2"),
        ("WORLD_SIZE -- --workers 2", "OpenCLIP 3 can't train with several ranks"),
        # OpenCLIP counts MPI's ranks, but each of them would train alone.
        ("OMPI_COMM_WORLD_SIZE", "2 ranks of MPI"),
    ],
)
def test_pretrain_refuses_before_any_work(
    change: str, message: str, dry_run, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(command.torch.cuda, "is_available", lambda: False)
    words = change.split()
    if words[0].isupper():
        monkeypatch.setenv(words.pop(0), "2")
    with pytest.raises(UsageError, match=message) as error:
        dry_run(*words)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "logs").exists()


@pytest.fixture
def counted_by_img2dataset(data: Path, tmp_path: Path) -> Path:
    """A folder of the training shards, with a *_stats.json beside each: 5, 6, 7 and 8 pairs."""
    folder = tmp_path / "img2dataset"
    folder.mkdir()
    for number, path in enumerate(sorted(data.glob("train*.tar"))):
        (folder / path.name).symlink_to(path)
        (folder / f"{path.stem}_stats.json").write_text(f'{{"successes": {5 + number}}}')
    return folder


def test_numbers_of_pairs_come_from_img2datasets_files(
    counted_by_img2dataset: Path, dry_run
) -> None:
    run = partial(dry_run, "--data", str(counted_by_img2dataset), "--batch-size")
    args = run("5")
    assert (args.train_num_samples, args.val_data) == (5 + 6 + 7 + 8, None)  # nothing is held out
    with pytest.raises(UsageError, match="may hold 5 pairs and its batch is 6"):
        run("6")


@pytest.mark.parametrize("in_second", ["sizes.json", "stats"])
def test_pairs_of_shards_in_two_folders_are_added_up(
    in_second: str, data: Path, counted_by_img2dataset: Path, dry_run
) -> None:
    """OpenCLIP would read the sizes.json of the first folder for both."""
    if in_second == "sizes.json":
        sizes = {f"train-{number:05}.tar": 5 + number for number in range(4)}
        (counted_by_img2dataset / "sizes.json").write_text(json.dumps(sizes))
    shards = "{{00000..00003}}.tar"  # `dry_run` formats its flags
    both = f"{data}/train-{shards}::{counted_by_img2dataset}/train-{shards}"
    args = dry_run("--data", both, "--batch-size", "5")
    assert args.train_num_samples == 4 * 8 + 5 + 6 + 7 + 8


def test_a_first_shard_without_pairs_is_an_error(data: Path, tmp_path: Path, dry_run) -> None:
    write_tar(tmp_path / "empty.tar", {"a.txt": b"a caption"})
    with pytest.raises(UsageError, match=r"--data: .*empty\.tar holds no image with a caption"):
        dry_run("--data", f"{tmp_path}/empty.tar::{data}/train-00000.tar")


def test_shards_of_a_folder_are_told_apart_by_train_and_val_in_their_names(
    tmp_path: Path, dry_run
) -> None:
    data = make_shards(tmp_path / "cc3m", **{"cc3m-train": 4, "cc3m-validation": 1})
    args = dry_run("--data", str(data))
    assert args.train_data == f"{data}/cc3m-train-{{00000..00003}}.tar"
    assert args.val_data == f"{data}/cc3m-validation-00000.tar"


def test_held_out_shards_are_never_trained_on(tmp_path: Path, dry_run) -> None:
    data = make_shards(tmp_path / "part", part=4, val=1)
    assert dry_run("--data", str(data)).train_data == f"{data}/part-{{00000..00003}}.tar"
    for path in data.glob("part*.tar"):
        path.unlink()
    with pytest.raises(UsageError, match=r"no tar file in .* except for validation"):
        dry_run("--data", str(data))


def test_shards_with_train_and_val_in_one_name_are_refused(tmp_path: Path, dry_run) -> None:
    data = make_shards(tmp_path / "coco", trainval=4, test=1)
    with pytest.raises(UsageError, match=r"trainval-00000\.tar: is it for training or held out\?"):
        dry_run("--data", str(data))
