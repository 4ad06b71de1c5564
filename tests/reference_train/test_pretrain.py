"""`pretrain`: what it gives to OpenCLIP's trainer, what it refuses, and that it trains and resumes.

The trainer itself is OpenCLIP's, and the loss in it is tested in tests/trainers.
"""

import io
import json
import re
import shlex
import signal
import subprocess
import sys
import tarfile
import time
from argparse import Namespace
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from processes import run_python
from torch import Tensor, nn

pytest.importorskip("open_clip_train.main")

import open_clip
from PIL import Image
from torchvision.transforms import functional as transforms

from cyclip_loss import open_clip_train
from cyclip_loss.metrics import consistency_metrics
from reference_train.errors import CannotStart
from reference_train.pretrain import best, command, models
from reference_train.pretrain.presets import NAMES

models.register()


def make_shards(folder: Path, **parts: int) -> Path:
    """Shards of 8 pairs: noise, and a caption that says which; parts: how many of each."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    sizes = {}
    for part, count in parts.items():
        for number in range(count):
            name = f"{part}-{number:05d}.tar"
            sizes[name] = 8
            with tarfile.open(folder / name, "w") as archive:
                for i in range(8):
                    picture = io.BytesIO()
                    Image.fromarray(rng.integers(256, size=(40, 36, 3), dtype=np.uint8)).save(
                        picture, "PNG"
                    )
                    for kind, data in (("png", picture.getvalue()), ("txt", f"no {i}".encode())):
                        member = tarfile.TarInfo(f"{number}_{i}.{kind}")
                        member.size = len(data)
                        archive.addfile(member, io.BytesIO(data))
    (folder / "sizes.json").write_text(json.dumps(sizes))
    return folder


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("data") / "shards", train=4, val=1)


def dry_run(capsys: pytest.CaptureFixture[str], *argv: str) -> Namespace:
    """What OpenCLIP and the launcher make of the command that is printed."""
    command.main([*argv[: argv.index("--")], "--dry-run", *argv[argv.index("--") :]])
    words = shlex.split(capsys.readouterr().out)
    assert words[:4] == ["python", "-m", open_clip_train.__name__, "--"]
    ours, theirs = open_clip_train.flags().parse_known_args(words[4:])
    parsed: Namespace = command.open_clip_trainer().parse_args(theirs)
    vars(parsed).update(vars(ours))
    return parsed


@pytest.mark.parametrize("preset", NAMES)
@pytest.mark.parametrize(
    ("loss", "lambdas"),
    [
        ("clip", (0, 0)),
        ("cyclip", (0.25, 0.25)),
        ("c-cyclip", (0, 0.25)),
        ("i-cyclip", (0.25, 0)),
    ],
)
def test_the_printed_command(
    preset: str,
    loss: str,
    lambdas: tuple[float, float],
    shards: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    argv = ["--preset", preset, "--loss", loss, "--data", str(shards), "--seed", "3"]
    args = dry_run(capsys, *argv, "--", "--workers", "2", "--epochs", "7")
    assert (args.lambda_inmodal, args.lambda_crossmodal) == lambdas
    assert args.train_data == f"{shards}/train-{{00000..00003}}.tar"
    assert args.val_data == f"{shards}/val-00000.tar"
    assert (args.epochs, args.workers, args.seed) == (7, 2, 3)  # what follows -- comes last
    assert args.name == f"{preset}-{loss}-3"
    assert args.reference_batch_size == 128


def test_the_paper_preset(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = dry_run(capsys, "--preset", "paper", "--data", str(shards), "--")
    assert (args.model, args.batch_size, args.epochs, args.warmup) == ("RN50", 128, 64, 10_000)
    assert (args.lr, args.wd, args.eps) == (5e-4, 0.1, 1e-8)
    assert (args.beta1, args.beta2) == (0.9, 0.999)
    # the crop of training is that of evaluation: resized, and the middle of it
    image = Image.fromarray(
        np.random.default_rng(0).integers(256, size=(90, 64, 3), dtype=np.uint8)
    )
    train = open_clip.transform.image_transform(32, is_train=True, aug_cfg=args.aug_cfg)
    middle = transforms.resized_crop(
        image, 13, 0, 64, 64, [32, 32], transforms.InterpolationMode.BICUBIC
    )
    mean, std = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
    expected = transforms.normalize(transforms.to_tensor(middle), mean, std)
    torch.testing.assert_close(train(image), expected)


@pytest.mark.parametrize("variable", ["WORLD_SIZE", "SLURM_NTASKS"])  # torchrun's, srun's
def test_a_batch_is_shared_by_the_ranks(
    variable: str,
    shards: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(variable, "2")
    monkeypatch.setattr(command.torch.cuda, "is_available", lambda: True)
    more = ["--", "--workers", "2", "--epochs", "7"]
    args = dry_run(capsys, "--preset", "modern", "--data", str(shards), *more)
    assert args.batch_size == 512
    with pytest.raises(CannotStart, match="--batch-size 101 is of all ranks and does not divide"):
        dry_run(capsys, "--preset", "modern", "--data", str(shards), "--batch-size", "101", *more)


@pytest.mark.parametrize("variable", ["RANK", "PMI_RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK"])
def test_one_rank_prints_the_command(
    variable: str,
    shards: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(variable, "1")
    command.main(["--preset", "icons", "--data", str(shards), "--dry-run"])
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--data", "{folder}/none-{{0..3}}.tar"], "--data: no such shard: .*none-0.tar"),
        (["--data", "{empty}"], "no tar file in"),
        (["--val", "{folder}/none.tar"], "--val: no such shard"),
        (["--data", "{folder}/sizes.json"], "a shard can't be read"),
        (["--model", "RN51"], "--model RN51: OpenCLIP has none of that name"),
        (["--model", "local-dir:{empty}"], "--model local-dir:.*: .*open_clip_config.json"),
        (["--data", "s3://b/{{0..3}}.tar", "--", "--workers", "9"], "has 4 shards for 9 workers"),
        (["--", "--workers", "9"], "--data has 4 shards for 9 workers"),
        (["--", "--epochs", "many"], "OpenCLIP does not take these flags"),
        (["--loss", "siglip"], "--loss: invalid choice"),
        (["--batch-size", "0"], "--batch-size: must be a whole number >= 1, not 0"),
    ],
)
def test_what_it_refuses_before_any_work(
    change: list[str], message: str, shards: Path, tmp_path: Path
) -> None:
    argv = ["--preset", "icons", "--data", str(shards), "--out", str(tmp_path / "logs")]
    with pytest.raises(CannotStart, match=message):
        command.main([*argv, *(word.format(folder=shards, empty=tmp_path) for word in change)])
    assert not (tmp_path / "logs").exists()


def test_held_out_shards_are_not_trained_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = make_shards(tmp_path, part=2, val=1)
    args = dry_run(capsys, "--preset", "icons", "--data", str(data), "--")
    assert args.train_data == f"{data}/part-{{00000..00001}}.tar"
    for path in data.glob("part*.tar"):
        path.unlink()
    with pytest.raises(CannotStart, match=r"no tar file in .* but for validation"):
        command.main(["--preset", "icons", "--data", str(data)])


def test_a_logger_that_is_not_installed(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CannotStart, match="--report-to all: pip install tensorboard"):
        command.main(["--preset", "icons", "--data", str(shards), "--", "--report-to", "all"])


@pytest.mark.parametrize("data", ["{folder}", "s3://bucket/{{0..3}}.tar"])
def test_pairs_that_nobody_counted(data: str, shards: Path, tmp_path: Path) -> None:
    for path in shards.glob("train*.tar"):
        (tmp_path / path.name).symlink_to(path)
    with pytest.raises(CannotStart, match=r"say it after --, e\.g\. -- --train-num"):
        command.main(["--preset", "modern", "--data", data.format(folder=tmp_path)])


def test_ranks_of_mpi(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenCLIP counts them, and then trains in each rank as if it were alone."""
    for name in ("RANK", "LOCAL_RANK", "SIZE"):
        monkeypatch.setenv(f"OMPI_COMM_WORLD_{name}", "2")
    with pytest.raises(CannotStart, match="2 ranks of MPI"):
        command.main(["--preset", "icons", "--data", str(shards)])


@pytest.mark.parametrize(
    ("change", "ranks", "message"),
    [
        ([], 1, ""),
        (["--workers", "2", "--log-every-n-steps", "3", "--grad-checkpointing"], 1, ""),
        (["--lr", "1e-4"], 1, "begun with lr = 0.001, not 0.0001: choose another --name"),
        (["--force-quick-gelu"], 1, "force_quick_gelu = False, not True"),
        (["--force-image-size", "48"], 1, r"force_image_size = 32, not \[48\]"),
        (["--val-data", "{folder}/train-00000.tar"], 1, "val_data = .*, not .*train-00000.tar"),
        ([], 2, "world_size = 1, not 2"),
    ],
)
def test_a_run_goes_on_with_its_settings(
    change: list[str],
    ranks: int,
    message: str,
    shards: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(command.torch.cuda, "is_available", lambda: True)
    argv = ["--preset", "modern", "--data", str(shards), "--out", str(tmp_path), "--name", "run"]
    argv += ["--", "--workers", "1", "--force-image-size", "32"]
    begun = dry_run(capsys, *argv)
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "checkpoints" / "epoch_latest.pt").touch()
    settings = {**vars(begun), "force_image_size": 32, "world_size": 1}
    (run / "params.txt").write_text("".join(f"{k}: {v}\n" for k, v in sorted(settings.items())))
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    argv += [word.format(folder=shards) for word in change]
    with pytest.raises(CannotStart, match=message) if message else nullcontext():
        dry_run(capsys, *argv)


def test_several_ranks_on_a_cpu(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(CannotStart, match="several ranks on a CPU: OpenCLIP 3 can't do that"):
        command.main(["--preset", "icons", "--data", str(shards)])


# ------------------------------------------------------------------------------------------------
# Validation


class Task(nn.Module):
    """As OpenCLIP 4 hands it to its evaluation."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.trainable_module = model


class Wrapped(nn.Module):
    """As DistributedDataParallel names its weights."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


@pytest.mark.parametrize("wrap", [lambda m: m, Wrapped, Task, lambda m: Task(Wrapped(m))])
def test_the_best_epoch_is_kept(wrap: Any, tmp_path: Path) -> None:
    """Epochs with losses 3, 1, 2, and after a restart 1.5 and 0.5; zero-shot alone in between."""
    model = nn.Linear(2, 2, bias=False)

    def evaluate(_: nn.Module, data: dict[int, float], epoch: int, args: Namespace) -> Any:
        with open(tmp_path / "results.jsonl", "a") as file:
            file.write(json.dumps({best.LOSS: data[epoch], "epoch": epoch}) + "\n")
            file.write(json.dumps({"imagenet-zeroshot-val-top1": 0.5}) + "\n")
        return {best.LOSS: data[epoch]}

    args = Namespace(save_logs=True, checkpoint_path=str(tmp_path), name="run")
    kept = {1: 1, 2: 2, 3: 2, 4: 2, 5: 5}
    for epoch in kept:
        validate = best.keeping_the_best(evaluate)
        nn.init.constant_(model.weight, epoch)
        validate(wrap(model), dict(enumerate([3, 1, 2, 1.5, 0.5], start=1)), epoch, args)
        saved = torch.load(tmp_path / best.BEST, weights_only=True)
        assert (saved["epoch"], saved["name"]) == (kept[epoch], "run")
        model.load_state_dict(saved["state_dict"])
        assert model.weight[0, 0] == kept[epoch]


@pytest.mark.parametrize("batches", [False, True], ids=["whole", "by batch"])
def test_gaps_are_added_to_their_metrics(batches: bool) -> None:
    image, text = nn.functional.normalize(torch.randn(2, 10, 4), dim=-1)

    def theirs(image_features: Any, text_features: Any, logit_scale: Tensor) -> dict[str, float]:
        return {"image_to_text_R@1": 0.5}

    module = ModuleType("train")
    vars(module).update(get_clip_metrics=theirs, evaluate=None)
    best.add_to(module, module)
    features = [x.split(4) if batches else x for x in (image, text)]
    metrics = module.get_clip_metrics(
        image_features=features[0], text_features=features[1], logit_scale=torch.tensor(1.0)
    )
    assert metrics.pop("image_to_text_R@1") == 0.5
    assert metrics == {k: float(v) for k, v in consistency_metrics(image, text).items()}


# ------------------------------------------------------------------------------------------------
# Training


def results(logs: Path) -> list[dict[str, float]]:
    path = logs / "run" / "checkpoints" / "results.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.mark.slow
def test_two_steps_of_the_paper_preset(tmp_path: Path) -> None:
    """RN50 at 224 pixels, on shards as img2dataset calls CC3M's; one worker has one shard."""
    data = make_shards(tmp_path / "cc3m", **{"cc3m-train": 4, "cc3m-validation": 1})
    done = run_python(
        *("-m", "reference_train", "pretrain", "--preset", "paper", "--batch-size", "2"),
        *("--data", str(data), "--out", str(tmp_path), "--name", "run"),
        *("--", "--epochs", "1", "--train-num-samples", "4", "--workers", "1"),
    )
    assert done.returncode == 0, done.stderr
    [epoch] = results(tmp_path)
    assert np.isfinite(epoch[best.LOSS])
    log = (tmp_path / "run" / "out.log").read_text()
    assert "Train Epoch: 0 [4/4 (100%)]" in log
    assert "Inmodal_cyclic_loss" in log


@pytest.mark.slow
def test_it_trains_is_killed_and_goes_on(shards: Path, tmp_path: Path) -> None:
    argv = [
        *("-m", "reference_train", "pretrain", "--preset", "icons", "--batch-size", "8"),
        *("--data", str(shards), "--out", str(tmp_path), "--name", "run"),
        *("--", "--epochs", "8", "--train-num-samples", "16"),
    ]
    process = subprocess.Popen(
        [sys.executable, *argv], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while len(results(tmp_path)) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = results(tmp_path)
    assert 3 <= len(before) < 8

    other = run_python(*argv, "--lr", "1e-4")
    assert other.returncode == 2
    assert "was begun with lr = 0.002, not 0.0001: choose another --name" in other.stderr
    again = run_python(*argv)
    assert again.returncode == 0, again.stderr
    log = (tmp_path / "run" / "out.log").read_text()
    assert re.search("resuming checkpoint.*epoch_latest.pt", log)
    assert "CyCLIPLoss(" in log
    assert "Inmodal_cyclic_loss" in log
    epochs = [line["epoch"] for line in results(tmp_path)]
    assert sorted(set(epochs)) == list(range(1, 9))
    assert {"inmodal_gap", "crossmodal_gap", "clip_val_loss"} <= set(results(tmp_path)[0])
    checkpoints = tmp_path / "run" / "checkpoints"
    saved = torch.load(checkpoints / best.BEST, weights_only=True)
    lowest = min(results(tmp_path), key=lambda line: line[best.LOSS])
    assert saved["epoch"] == lowest["epoch"]
    model = open_clip.create_model("icons-rn-32")
    open_clip.load_checkpoint(model, str(checkpoints / best.BEST))
