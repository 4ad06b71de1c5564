"""`python -m reference_train pretrain`: OpenCLIP's trainer with the CyCLIP loss, by presets.

A preset stands for one command of `cyclip_loss.open_clip_train` (or `views`, which adds `--views`).
`pretrain` prints this command, checks what can be checked before any work, and runs the command.
Under `torchrun` every rank does the same.
"""

import argparse
import contextlib
import errno
import importlib.util
import io
import logging
import os
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip_train import distributed as ranks
from open_clip_train import main as trainer
from webdataset.shardlists import expand_urls

from cyclip_loss import open_clip_train

from ..command_line import CannotStart, Parser, Stopped, say, whole_number
from ..data.samples import fingerprint
from ..files import check_writable, locked
from ..losses import LOSSES
from . import shards, training, views
from .presets import BATCH_SIZES, WEIGHT, preset, register_models
from .resume import epochs_done

DESCRIPTION = """\
Pretrains with OpenCLIP's trainer and the CyCLIP loss. A preset stands for a command, which is
printed first. Flags after -- are added to this command, so they override the preset. Flags of
cyclip_loss.open_clip_train itself (--reference-batch-size) need no --. The same command again
resumes after the last epoch. Across GPUs:
  torchrun --nproc-per-node 8 -m reference_train pretrain ..."""


def main(argv: Sequence[str]) -> None:
    """Trains, or resumes the run of the same name.

    argv: the command line after `pretrain`. Raises `CannotStart` if something is wrong with it.
    """
    options, launcher_flags = parse(argv)
    register_models()
    _, rank, world_size = ranks.world_info_from_env()
    if world_size > 1 and not ranks.is_using_distributed():
        raise CannotStart(f"{world_size} ranks of MPI: OpenCLIP takes torchrun's and Slurm's only")
    flags = command_line(options, launcher_flags, world_size)
    args = all_settings(flags, rank=rank, world_size=world_size)
    sizes, shard_names = check_data(args, flags)
    added_settings = {**shard_names, "views": options.views}
    vars(args).update(added_settings)
    if rank == 0:
        launcher = [open_clip_train.__name__]
        if options.views:
            launcher = [views.__name__, "--views", options.views]
        # Without "--", torchrun would take --logs for one of its own flags.
        print("python -m", shlex.join([*launcher, "--", *flags]), flush=True)
    check(args)
    folder = Path(args.logs) / args.name
    done = epochs_done(folder, args)
    # Rank 0 holds the folder for all ranks of a run.
    lock = locked(folder) if rank == 0 else contextlib.nullcontext()
    if options.dry_run:
        with lock if folder.exists() else contextlib.nullcontext():
            return
    if done < args.epochs:
        with lock:
            if options.views:
                views.Views(options.views).install(trainer)
            training.Guards(sizes, added_settings).install(trainer)
            train(flags, folder)
    if rank == 0:
        report(folder, args.epochs, was_finished=done >= args.epochs)


def report(folder: Path, epochs: int, was_finished: bool) -> None:
    """Prints the last line: the run is finished, and which epoch was the best."""
    line = f"{folder}: finished, {epochs} epochs"
    if losses := training.validations(folder / "checkpoints"):
        best = min(losses, key=losses.__getitem__)
        line += f"; the best was {best}, {training.LOSS} {losses[best]:.4f}"
    if was_finished:
        line += "; nothing left to do"
    print(line)


def train(flags: list[str], folder: Path) -> None:
    """Runs OpenCLIP's trainer. If the disk is full, the error is one line."""
    if not torch.cuda.is_available():
        # On a CPU, PyTorch's fused attention is slower than plain products for a dozen tokens.
        torch.backends.cuda.enable_flash_sdp(False)
    # OpenCLIP does not tell wandb that it resumes. wandb would then replace its record of the run.
    os.environ.setdefault("WANDB_RESUME", "allow")
    # On a full disk the log fails too. The error of the checkpoint says it once.
    logging.raiseExceptions = False
    for partial_file in (folder / "checkpoints").glob(".*.pt.*"):  # left by a save that was killed
        partial_file.unlink(missing_ok=True)
    try:
        open_clip_train.main(flags)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS):
            raise
        raise Stopped(f"{error.filename or folder} can't be written: {error.strerror}") from error
    finally:
        logging.disable(logging.INFO)  # PyTorch's compiler logs at exit, after our last line


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options of `pretrain`; then the launcher's flags and those after `--`."""
    end = argv.index("--") if "--" in argv else len(argv)
    parser = Parser(
        "python -m reference_train pretrain", description=DESCRIPTION, allow_abbrev=False
    )
    add = parser.add_argument
    add("--preset", choices=BATCH_SIZES, required=True, help="model, schedule, batch size")
    losses = [name for name, loss in LOSSES.items() if not loss.views]
    add("--loss", choices=losses, default="cyclip", help="default: cyclip")
    views.add_flag(parser)
    add("--data", required=True, metavar="SHARDS", help="tar files (braces allowed), or a folder")
    add("--val", metavar="SHARDS", help="held-out pairs; default: those in the folder --data")
    text = "pairs in a batch, all ranks together; default: the preset's"
    add("--batch-size", type=whole_number(1), metavar="N", help=text)
    add("--seed", type=int, default=0, help="default: 0")
    # OpenCLIP's --logs would not do: torchrun would take it for an abbreviation of its own flag.
    add("--out", default="logs", metavar="DIR", help="the folder of all runs; default: logs")
    add("--name", help="the run's folder in DIR; default: PRESET-LOSS[-views]-SEED")
    add("--dry-run", action="store_true", help="check and print the command, and stop")
    options, others = parser.parse_known_args(argv[:end])
    _, unknown = parsed(open_clip_train.parse, others)
    if unknown:
        raise CannotStart(f"{unknown[0]}: OpenCLIP's own flags go after --")
    return options, [*others, *argv[end + 1 :]]


def command_line(
    options: argparse.Namespace, launcher_flags: Sequence[str], world_size: int
) -> list[str]:
    """The launcher's command line.

    The flags of the preset come first, then those of the data and of this run, then the user's.
    """
    batch_size = options.batch_size or BATCH_SIZES[options.preset]
    if batch_size % world_size:
        why = f"is for all ranks together and does not divide by {world_size}"
        raise CannotStart(f"--batch-size {batch_size} {why}")
    loss = LOSSES[options.loss]
    name = f"{options.preset}-{options.loss}{'-views' if options.views else ''}-{options.seed}"
    val = options.val or (options.data if Path(options.data).is_dir() else None)
    held_out = shards.find(val, "val", needed=bool(options.val)) if val else ""
    flags = [*preset(options.preset), "--dataset-type", "webdataset"]
    flags += ["--lambda-inmodal", str(WEIGHT * loss.inmodal)]
    flags += ["--lambda-crossmodal", str(WEIGHT * loss.crossmodal)]
    flags += ["--batch-size", str(batch_size // world_size)]
    flags += ["--train-data", shards.find(options.data, "train")]
    if held_out:
        flags += ["--val-data", held_out]
    flags += ["--seed", str(options.seed), "--logs", options.out, "--name", options.name or name]
    # The newest epoch is kept under one name and replaced whole. Without one, a run begins.
    flags += ["--save-frequency", "0", "--save-most-recent", "--resume", "latest"]
    return [*flags, *launcher_flags]


def all_settings(flags: Sequence[str], *, rank: int, world_size: int) -> argparse.Namespace:
    """The settings of a command line: OpenCLIP's, the launcher's, and this process's rank."""
    launcher_args, openclip_flags = parsed(open_clip_train.parse, flags)
    args: argparse.Namespace = parsed(trainer.parse_args, openclip_flags)
    vars(args).update(vars(launcher_args), rank=rank, world_size=world_size)
    return args


def parsed(parse: Callable[[Sequence[str]], Any], flags: Sequence[str]) -> Any:
    """The result of OpenCLIP's or the launcher's parser. Its error becomes one line."""
    stderr = io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr):
            return parse(flags)
    except SystemExit as error:
        raise CannotStart(stderr.getvalue().strip().rpartition("error: ")[2]) from error


def check(args: argparse.Namespace) -> None:
    """Raises `CannotStart` for errors that OpenCLIP would raise later, or in many lines."""
    if ":" not in args.model and args.model not in open_clip.list_models():
        raise CannotStart(f"--model {args.model}: OpenCLIP has no model of this name")
    if args.world_size > 1 and not torch.cuda.is_available() and not getattr(args, "fsdp", False):
        what = "several ranks on a CPU: OpenCLIP 3 can't train so"
        raise CannotStart(f"{what}; OpenCLIP 4 can, by -- --fsdp --precision fp32")
    for package in ("tensorboard", "wandb"):
        wanted = package in args.report_to or "all" in args.report_to
        if wanted and importlib.util.find_spec(package) is None:
            raise CannotStart(f"--report-to {args.report_to}: pip install {package}")
    for flag in ("same_captions", "distill_model"):
        if args.views and getattr(args, flag, None):
            raise CannotStart(f"--{flag.replace('_', '-')} does not go with --views")
    check_writable(Path(args.logs) / args.name)


def check_data(args: argparse.Namespace, flags: list[str]) -> tuple[dict[str, int], dict[str, str]]:
    """Shard -> its number of pairs, where it is known; and fingerprints of the shards.

    If OpenCLIP would not find the number of training pairs, it is added to the flags. Raises
    `CannotStart` if the data can't be used.
    """
    if args.dataset_type != "webdataset":
        only = f"--dataset-type {args.dataset_type}: pretrain takes webdataset only"
        raise CannotStart(f"{only}; python -m cyclip_loss.open_clip_train takes other types")
    if args.train_num_samples is not None and args.train_num_samples < 1:
        raise CannotStart(f"--train-num-samples must be >= 1, not {args.train_num_samples}")
    train = expand_urls(args.train_data)
    sizes = shards.check("--data", train, held_out=False)
    add_num_samples(args, flags, train, sizes)
    if not args.dataset_resampled:
        shards.check_shared(train, sizes, max(args.workers, 1), args.world_size, args.batch_size)
    names = {"train_shards": fingerprint(train)}
    if args.val_data:
        val = expand_urls(args.val_data)
        sizes |= shards.check("--val", val, held_out=args.rank == 0)
        names["val_shards"] = fingerprint(val)
    elif args.rank == 0:
        say("no held-out pairs (--val, or 'val' in the shards' names): no best epoch is kept")
    return sizes, names


def add_num_samples(
    args: argparse.Namespace, flags: list[str], train: Sequence[str], sizes: dict[str, int]
) -> None:
    """Adds `--train-num-samples` if neither the user nor OpenCLIP knows it.

    train: the training shards. Raises `CannotStart` if nothing says how many pairs they hold.
    """
    # OpenCLIP reads the first of these two files that is there, and no *_stats.json.
    folder = Path(train[0]).parent
    read_by_openclip = next(
        (name for name in ("sizes.json", "__len__") if (folder / name).exists()), None
    )
    if args.train_num_samples is not None or read_by_openclip == "__len__":
        return
    if len(sizes) < len(train):
        raise CannotStart(
            "how many pairs the shards hold is not known (no sizes.json, *_stats.json or __len__ "
            "beside them): say it after --, e.g. -- --train-num-samples 2905954"
        )
    if read_by_openclip is None:
        args.train_num_samples = sum(sizes.values())
        flags += ["--train-num-samples", str(args.train_num_samples)]
