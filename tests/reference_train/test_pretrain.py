"""`pretrain`: what it gives to OpenCLIP's trainer, and refuses; that it trains and resumes."""

import importlib
import io
import json
import logging
import re
import resource
import shlex
import signal
import subprocess
import sys
import tarfile
import textwrap
import time
from argparse import Namespace
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from processes import ROOT, run_python, start
from tars import write_tar
from torch import Tensor, nn

pytest.importorskip("open_clip_train.main")

import open_clip
from PIL import Image

from cyclip_loss import open_clip_train
from cyclip_loss.metrics import consistency_metrics
from reference_train.command_line import CannotStart, Stopped
from reference_train.pretrain import pretrain as command
from reference_train.pretrain import training
from reference_train.pretrain.presets import BATCH_SIZES, register_models

register_models()
Capture, Log, Patch = pytest.CaptureFixture[str], pytest.LogCaptureFixture, pytest.MonkeyPatch
Run = Callable[..., None]


def make_shards(folder: Path, **parts: int) -> Path:
    """Shards of 8 pairs: noise, and a caption that says which; parts: how many of each."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    for part, count in parts.items():
        for number in range(count):
            pairs: dict[str, bytes] = {}
            for i in range(8):
                picture = io.BytesIO()
                noise = rng.integers(256, size=(40, 36, 3), dtype=np.uint8)
                Image.fromarray(noise).save(picture, "PNG")
                pairs[f"{number}_{i}.png"] = picture.getvalue()
                pairs[f"{number}_{i}.txt"] = f"no {number} {i}".encode()
            write_tar(folder / f"{part}-{number:05d}.tar", pairs)
    sizes = {path.name: 8 for path in folder.glob("*.tar")}
    (folder / "sizes.json").write_text(json.dumps(sizes))
    return folder


def cut_short(path: Path) -> None:
    """Half of a shard: the picture of its fifth pair ends early."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def cut_between_files(path: Path) -> None:
    """The first four pairs of a shard, and no end of the archive."""
    with tarfile.open(path) as archive:
        fifth = archive.getmembers()[8].offset
    path.write_bytes(path.read_bytes()[:fifth])


def break_picture(path: Path) -> None:
    """The first picture of a shard is none."""
    with tarfile.open(path) as archive:
        files = {m.name: archive.extractfile(m).read() for m in archive}  # type: ignore[union-attr]
    write_tar(path, {**files, next(iter(files)): b"no picture"})


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("data") / "shards", train=4, val=1)


@pytest.fixture
def dry_run(shards: Path, tmp_path: Path, capsys: Capture) -> Callable[..., Namespace]:
    """What OpenCLIP and the launcher make of the command that is printed."""

    def run(*flags: str) -> Namespace:
        argv = ["--preset", "modern", "--data", str(shards), "--out", str(tmp_path / "logs")]
        words = [word.format(folder=shards, empty=tmp_path) for word in flags]
        command.main([*argv, "--batch-size", "8", "--dry-run", *words])
        printed = shlex.split(capsys.readouterr().out)
        assert printed[:4] == ["python", "-m", open_clip_train.__name__, "--"]
        ours, theirs = open_clip_train.flags().parse_known_args(printed[4:])
        parsed: Namespace = command.trainer.parse_args(theirs)
        vars(parsed).update(vars(ours))
        return parsed

    return run


@pytest.mark.parametrize("preset", BATCH_SIZES)
@pytest.mark.parametrize(
    ("loss", "lambdas"),
    [("clip", (0, 0)), ("cyclip", (0.25, 0.25)), ("c-cyclip", (0, 0.25)), ("i-cyclip", (0.25, 0))],
)
def test_the_printed_command(
    preset: str, loss: str, lambdas: tuple[float, float], shards: Path, dry_run: Run
) -> None:
    argv = ["--preset", preset, "--loss", loss, "--seed", "3", "--dist-impl", "ring"]
    args = dry_run(*argv, "--", "--workers", "2", "--epochs", "7")
    assert (args.lambda_inmodal, args.lambda_crossmodal) == lambdas
    parts = f"{shards}/train-{{00000..00003}}.tar", f"{shards}/val-00000.tar"
    assert (args.train_data, args.val_data) == parts
    assert (args.epochs, args.workers, args.seed) == (7, 2, 3)  # what follows -- comes last
    assert args.name == f"{preset}-{loss}-3"
    assert (args.reference_batch_size, args.dist_impl) == (128, "ring")  # the launcher's own


def test_the_paper_preset(dry_run: Run) -> None:
    # pairs that nobody has counted
    data = ["--data", "pipe:cat {folder}/train-{{00000..00003}}.tar", "--batch-size", "128"]
    args = dry_run("--preset", "paper", *data, "--", "--train-num-samples", "9")
    assert (args.model, args.batch_size, args.epochs, args.warmup) == ("RN50", 128, 64, 10_000)
    assert (args.lr, args.wd, args.eps, args.beta1, args.beta2) == (5e-4, 0.1, 1e-8, 0.9, 0.999)
    assert args.aug_cfg == {"use_timm": True, "scale": (1.0, 1.0), "ratio": (1.0, 1.0)}


@pytest.mark.parametrize("variable", ["WORLD_SIZE", "SLURM_NTASKS"])  # torchrun's, srun's
def test_a_batch_is_shared_by_the_ranks(variable: str, dry_run: Run, monkeypatch: Patch) -> None:
    monkeypatch.setenv(variable, "2")
    monkeypatch.setattr(command.torch.cuda, "is_available", lambda: True)
    assert dry_run("--", "--workers", "2").batch_size == 4


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
def test_what_it_refuses_before_any_work(
    change: str, message: str, dry_run: Run, tmp_path: Path, monkeypatch: Patch
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


def test_pairs_as_img2dataset_counts_them(shards: Path, tmp_path: Path, dry_run: Run) -> None:
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


def test_held_out_shards(tmp_path: Path, dry_run: Run) -> None:
    """They are not trained on, and have to be whole."""
    data = make_shards(tmp_path / "cc3m", **{"cc3m-train": 4, "cc3m-validation": 1})
    args = dry_run("--data", str(data))
    parts = f"{data}/cc3m-train-{{00000..00003}}.tar", f"{data}/cc3m-validation-00000.tar"
    assert (args.train_data, args.val_data) == parts
    data = make_shards(tmp_path / "part", part=4, val=1)
    assert dry_run("--data", str(data)).train_data == f"{data}/part-{{00000..00003}}.tar"
    sizes = json.loads((data / "sizes.json").read_text())
    (data / "sizes.json").write_text(json.dumps({**sizes, "val-00000.tar": 9}))
    with pytest.raises(CannotStart, match=r"--val: .*val-00000.tar holds 8 of 9 pairs"):
        dry_run("--data", str(data))
    for path in data.glob("part*.tar"):
        path.unlink()
    with pytest.raises(CannotStart, match=r"no tar file in .* but for validation"):
        dry_run("--data", str(data))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("--log-every-n-steps 3 --grad-checkpointing", ""),
        ("--lr 1e-4", "begun with lr = 0.001, not 0.0001: choose another --name"),
        ("--epochs 40", "begun with epochs = 30, not 40"),  # it is not finished
        ("--same-captions ignored", "same_captions = None, not ignored"),
        ("--force-image-size 48", r"force_image_size = 32, not \[48\]"),
    ],
)
def test_a_run_goes_on_with_its_settings(
    change: str, message: str, dry_run: Run, tmp_path: Path
) -> None:
    argv = ["--name", "run", "--", "--workers", "1", "--force-image-size", "32"]
    settings = {**vars(dry_run(*argv)), "force_image_size": 32, "world_size": 1}
    run = tmp_path / "logs" / "run"
    (run / "checkpoints").mkdir(parents=True)
    torch.save({"epoch": 1}, run / "checkpoints" / "epoch_latest.pt")
    (run / "params.txt").write_text("".join(f"{k}: {v}\n" for k, v in sorted(settings.items())))
    with pytest.raises(CannotStart, match=message) if message else nullcontext():
        dry_run(*argv, *change.split())


@pytest.mark.parametrize("wrapped", [False, True])
def test_the_best_epoch_is_kept(wrapped: bool, tmp_path: Path) -> None:
    """Epochs with losses 3, 1, 2, and after a restart 1.5 and 0.5; zero-shot alone in between."""
    losses = dict(enumerate([3, 1, 2, 1.5, 0.5], start=1))
    model: Any = nn.Linear(2, 2, bias=False)
    held = model
    if wrapped:  # by DistributedDataParallel, and that by a task of OpenCLIP 4
        held = Namespace(trainable_module=nn.ModuleDict({"module": model}))

    def evaluate(_: Any, data: None, epoch: int, args: Namespace) -> Any:
        with open(tmp_path / "results.jsonl", "a") as file:
            file.write(json.dumps({training.LOSS: losses[epoch], "epoch": epoch}) + "\n")
            file.write(json.dumps({"imagenet-zeroshot-val-top1": 0.5}) + "\n")
        return {training.LOSS: losses[epoch]}

    args = Namespace(save_logs=True, checkpoint_path=str(tmp_path), name="run")
    for epoch, kept in {1: 1, 2: 2, 3: 2, 4: 2, 5: 5}.items():
        nn.init.constant_(model.weight, epoch)
        training.Guards({}, {}).evaluate(evaluate, held, None, epoch, args)
        saved = torch.load(tmp_path / training.BEST, weights_only=True)
        assert (saved["epoch"], saved["name"]) == (kept, "run")
        assert saved["state_dict"]["weight"][0, 0] == kept


def test_gaps_are_added_to_their_metrics(caplog: Log) -> None:
    image, text = nn.functional.normalize(torch.randn(2, 10, 4), dim=-1)
    metrics = partial(training.Guards({}, {}).get_clip_metrics, lambda **features: {"R@1": 0.5})
    gaps = {k: float(v) for k, v in consistency_metrics(image, text).items()}
    assert metrics(image_features=image, text_features=text) == {"R@1": 0.5, **gaps}
    of_batches = metrics(image_features=image.split(4), text_features=text.split(4))
    assert of_batches == {"R@1": 0.5, **gaps}
    assert "collapsed" not in caplog.text
    metrics(image_features=image[:1].expand(10, 4), text_features=text)
    assert "All image features are collapsed to one point" in caplog.text
    assert "All text features" not in caplog.text


@pytest.fixture
def pretrain(shards: Path, tmp_path: Path, monkeypatch: Patch) -> Callable[..., None]:
    """Trains for an epoch of two steps, in this process; what it changes there is put back."""
    trainer = command.trainer
    train = importlib.import_module("open_clip_train.train")
    monkeypatch.setattr(trainer, "setup_logging", lambda *_: None)
    changed = [(train, "get_clip_metrics"), (torch, "save"), (logging, "raiseExceptions")]
    names = ("get_data", "train_one_epoch", "evaluate", "parse_args")
    changed += [(trainer, name) for name in (*names, "create_loss", "create_model_and_transforms")]
    changed += [(trainer, name) for name in ("cosine_lr", "const_lr", "const_lr_cooldown")]

    def run(*flags: str, data: Path = shards, batch: int = 8, pairs: int = 16) -> None:
        argv = ["--preset", "icons", "--batch-size", str(batch), "--data", str(data)]
        argv += ["--out", str(tmp_path), "--name", "run", "--", "--train-num-samples", str(pairs)]
        with pytest.MonkeyPatch.context() as patch:
            for module, name in changed:
                patch.setattr(module, name, getattr(module, name))
            patch.setattr(logging.root.manager, "disable", 0)
            command.main([*argv, "--epochs", "1", *flags])

    return run


def test_a_finished_run_says_so(pretrain: Run, tmp_path: Path, capsys: Capture) -> None:
    """And OpenCLIP loads its model as the README says."""
    pretrain()
    said = capsys.readouterr().out.splitlines()[-1]
    assert re.fullmatch(r".*/run: finished, 1 epochs; the best was 1, clip_val_loss [\d.]+", said)
    pretrain()
    assert capsys.readouterr().out.endswith(f"{said[-4:]}; nothing left to do\n")
    page = (ROOT / "reference_train" / "README.md").read_text()
    [block] = re.findall("```python\n(.*?)```", page, re.DOTALL)
    script = textwrap.dedent(block).replace("logs/icons-cyclip-0", str(tmp_path / "run"))
    loaded = run_python("-c", script)
    assert loaded.returncode == 0, loaded.stderr


def test_a_finished_run_takes_more_epochs(
    pretrain: Run, tmp_path: Path, monkeypatch: Patch
) -> None:
    """Also of data in a folder that was moved; of other data or with another loss it does not."""
    data, checkpoints = make_shards(tmp_path / "data", train=4, val=1), tmp_path / "run/checkpoints"
    pretrain(data=data)
    (checkpoints / ".best.pt.123").touch()  # left by a save that was killed
    data = data.rename(tmp_path / "moved")
    (tmp_path / "link").symlink_to(data)
    monkeypatch.chdir(tmp_path)
    for epochs, place in enumerate(["moved", tmp_path / "link"], start=2):
        pretrain("--epochs", str(epochs), data=Path(place))
    assert [line["epoch"] for line in results(tmp_path)] == [1, 2, 3]
    assert {path.suffix for path in checkpoints.iterdir()} == {".pt", ".jsonl"}
    with pytest.raises(CannotStart, match="epochs = 3, not 2: choose another"):
        pretrain("--epochs", "2", data=data)
    (data / "train-00003.tar").unlink()
    with pytest.raises(CannotStart, match=r"begun with train_shards = 4 shards, .* not 3 shards, "):
        pretrain("--epochs", "3", data=data)


def test_no_best_epoch_without_held_out_pairs(pretrain: Run, capsys: Capture) -> None:
    pretrain("--val-data", "")
    said = capsys.readouterr()
    assert ("no held-out pairs" in said.err, "finished, 1 epochs\n" in said.out) == (True, True)


def test_a_worker_without_a_batch_is_an_error(pretrain: Run, tmp_path: Path) -> None:
    """Where nothing says how many pairs there are; of shards elsewhere, once it is known."""
    data = make_shards(tmp_path / "data", train=4, val=1)
    (data / "sizes.json").unlink()
    for flags, message in (
        ([], "4 of 4 shards may hold 32 pairs and its batch is 33: take a smaller"),
        (
            ["--train-data", f"pipe:cat {data}/train-0000{{0..3}}.tar"],
            "hold fewer pairs than its",
        ),
    ):
        with pytest.raises(Stopped, match=message) as error:
            pretrain(*flags, data=data, batch=33, pairs=66)
        assert "\n" not in str(error.value)


def test_weights_that_are_not_finite_are_not_saved(pretrain: Run, tmp_path: Path) -> None:
    with pytest.raises(Stopped, match="the model's weights are not finite: stopped"):
        pretrain("--lr", "1e30", "--warmup", "0", pairs=64)
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


def test_ten_losses_running() -> None:
    args = Namespace(device="cpu", distributed=False, accum_freq=1)
    nan, model = float("nan"), nn.BatchNorm1d(2)
    finite = training.Finite(args)

    def feed(*losses: float) -> None:
        for loss in losses:
            finite.note(model, (), {"a": torch.tensor(1.0), "b": torch.tensor(loss)})

    feed(*[nan] * 9, 1.0, *[float("inf")] * 9)
    finite.check(model)
    feed(nan, 1.0)
    with pytest.raises(Stopped, match="the loss of 10 steps running was not finite"):
        for _ in training.Loader(range(4), lambda: finite.check(model), every=3):
            pass
    model.running_mean.fill_(nan)  # as an overflow leaves it, though GradScaler skips the step
    with pytest.raises(Stopped, match="the model's weights are not finite"):
        training.Finite(args).check(model)


def test_what_can_not_be_read_is_counted(pretrain: Run, tmp_path: Path, caplog: Log) -> None:
    data = make_shards(tmp_path / "data", train=4, val=1)
    cut_short(data / "train-00001.tar")
    break_picture(data / "train-00002.tar")
    (data / "train-00003.tar").write_bytes(b"")
    pretrain(data=data, pairs=32)  # 8 + 4 + 7 pairs are left: two batches of 8, twice
    [line] = [r.getMessage() for r in caplog.records if "Not readable" in r.getMessage()]
    one, two, three = (f"{data}/train-{i:05d}.tar" for i in (1, 2, 3))
    assert f"13 pairs ({three} 8, {one} 4, {two} 1)" in line
    assert f"2 shards cut short ({one} 1, {three} 1)" in line
    assert len(results(tmp_path)) == 1


def test_a_shard_that_ends_between_two_files(pretrain: Run, tmp_path: Path, caplog: Log) -> None:
    """Is noticed where nothing says how many pairs it should have."""
    data = make_shards(tmp_path / "data", train=2, val=1)
    (data / "sizes.json").unlink()
    cut_between_files(data / "train-00001.tar")
    pretrain(data=data)
    assert f"1 shards cut short ({data}/train-00001.tar 1)" in caplog.text
    cut_between_files(data / "val-00000.tar")
    with pytest.raises(CannotStart, match=r"--val: .*val-00000.tar is cut short after 4 pairs"):
        pretrain(data=data)


def test_a_validation_that_lost_pairs_is_refused(pretrain: Run, tmp_path: Path) -> None:
    """Before any work, or after the first epoch if the shards are elsewhere."""
    data = make_shards(tmp_path / "data", train=2, val=1)
    break_picture(data / "val-00000.tar")
    said = "--val: 1 pictures can't be read: .*val-00000.tar, 0_0: cannot identify image file$"
    with pytest.raises(CannotStart, match=said):
        pretrain(data=data)
    with pytest.raises(Stopped, match=r"validation lost pairs.*: 1 pairs \(.*val-00000.tar 1\)"):
        pretrain("--val-data", f"pipe:cat {data}/val-00000.tar", data=data)
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


def test_a_seed_fixes_the_pairs(pretrain: Run, tmp_path: Path, monkeypatch: Patch) -> None:
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


class Hostile:
    """Loaded as a pickle may be, it ends the program."""

    def __reduce__(self) -> Any:
        return sys.exit, ("hostile",)


@pytest.mark.parametrize("kind", ["half", "hostile"])
def test_a_checkpoint_that_can_not_be_loaded(kind: str, pretrain: Run, tmp_path: Path) -> None:
    path = tmp_path / "run" / "checkpoints" / "epoch_latest.pt"
    path.parent.mkdir(parents=True)
    torch.save({"epoch": 1, "state_dict": Hostile() if kind == "hostile" else 0}, path)
    if kind == "half":
        cut_short(path)
    with pytest.raises(CannotStart, match=r"epoch_latest.pt is cut short, or holds more"):
        pretrain()


def test_a_full_disk_leaves_no_stump(pretrain: Run, tmp_path: Path) -> None:
    """A limit on the size of files stands in for the disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, before[1]))
    try:
        with pytest.raises(Stopped, match=r"best\.pt can't be written: ") as error:
            pretrain()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "\n" not in str(error.value)
    [left] = (tmp_path / "run" / "checkpoints").iterdir()
    assert left.name == "results.jsonl"


def test_a_run_is_trained_by_one_process(pretrain: Run, dry_run: Run, tmp_path: Path) -> None:
    script = "import sys\nfrom pathlib import Path\nfrom reference_train.files import locked\n"
    script += "with locked(Path(sys.argv[1])):\n print(flush=True)\n sys.stdin.read()"
    argv = [sys.executable, "-c", script, str(tmp_path / "run")]
    pipe = subprocess.PIPE
    with subprocess.Popen(argv, cwd=ROOT, stdin=pipe, stdout=pipe) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(CannotStart, match="/run: another process is at work there: choose an"):
            pretrain()
        with pytest.raises(CannotStart, match="/run: another process is at work there"):
            dry_run("--out", str(tmp_path), "--name", "run")
        other.kill()


def results(logs: Path) -> list[dict[str, float]]:
    path = logs / "run" / "checkpoints" / "results.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.mark.slow
def test_it_trains_is_killed_and_goes_on(shards: Path, tmp_path: Path) -> None:
    argv = [
        *("-m", "reference_train", "pretrain", "--preset", "icons", "--batch-size", "8"),
        *("--data", str(shards), "--out", str(tmp_path), "--name", "run"),
        *("--", "--epochs", "6", "--train-num-samples", "16"),
    ]
    quiet = subprocess.DEVNULL
    process = start([sys.executable, *argv], stdout=quiet, stderr=quiet)
    deadline = time.monotonic() + 120
    while len(results(tmp_path)) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 2 <= len(results(tmp_path)) < 6

    again = run_python(*argv)
    assert again.returncode == 0, again.stderr
    assert "Inmodal_cyclic_loss" in (tmp_path / "run" / "out.log").read_text()
    lines = results(tmp_path)
    assert {line["epoch"] for line in lines} == set(range(1, 7))
    assert {"inmodal_gap", "crossmodal_gap", "clip_val_loss"} <= set(lines[0])
    best = tmp_path / "run" / "checkpoints" / training.BEST
    open_clip.load_checkpoint(open_clip.create_model("icons-rn-32"), str(best))
