"""`python -m reference_train pretrain`: OpenCLIP's trainer with the CyCLIP loss, by presets.

A preset stands for one command of `cyclip_loss.open_clip_train` (or `views`, which adds `--views`).
`pretrain` prints this command, checks before any work what can be checked, and runs it. Under
`torchrun` every rank does the same.
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
from .runs import PARAMETERS, load_checkpoint, read_parameters

# A resumed run must have the same settings: the names in params.txt that begin with one of these.
# The number of ranks is one of them: ranks share out the shards, and a validation's loss is over
# the batches of one rank.
KEPT_SETTINGS = """
model pretrained force_ image_ lock_ use_bn_sync siglip distill_ coca_ views
train_num train_data_up train_shards val_num val_shards dataset_ aug_cfg seed
world_size batch_size accum_freq epochs precision local_loss gather_with_grad
opt lr warmup skip_scheduler wd beta eps momentum grad_clip
lambda_ reference_batch_size same_captions
"""
DESCRIPTION = """\
Pretrains with OpenCLIP's trainer and the CyCLIP loss. The command that a preset stands for is
printed first; what follows -- is added to it, and so changes it. Flags of
cyclip_loss.open_clip_train itself (--reference-batch-size) need no --. Given again, it resumes
after the last epoch. Across GPUs:
  torchrun --nproc-per-node 8 -m reference_train pretrain ..."""


def main(argv: Sequence[str]) -> None:
    """Trains, or resumes the run of the same name.

    argv: the command line after `pretrain`. Raises `CannotStart` if something is wrong with it.
    """
    asked, launcher_flags = parse(argv)
    register_models()
    _, rank, world_size = ranks.world_info_from_env()
    if world_size > 1 and not ranks.is_using_distributed():
        raise CannotStart(f"{world_size} ranks of MPI: OpenCLIP takes torchrun's and Slurm's only")
    flags = command_line(asked, launcher_flags, world_size)
    ours, theirs = parsed(open_clip_train.parse, flags)
    args = parsed(trainer.parse_args, theirs)
    vars(args).update(vars(ours), rank=rank, world_size=world_size)
    sizes, shard_names = check_data(args, flags)
    settings = {**shard_names, "views": asked.views}
    vars(args).update(settings)
    if rank == 0:
        launcher = [open_clip_train.__name__]
        if asked.views:
            launcher = [views.__name__, "--views", asked.views]
        # torchrun would take --logs for one of its own flags, if there were no "--".
        print("python -m", shlex.join([*launcher, "--", *flags]), flush=True)
    check(args)
    folder = Path(args.logs) / args.name
    done = epochs_done(folder, args)
    lock = locked(folder) if rank == 0 else contextlib.nullcontext()
    if asked.dry_run:
        with lock if folder.exists() else contextlib.nullcontext():
            return
    if done < args.epochs:
        with lock:
            if asked.views:
                views.Views(asked.views).into(trainer)
            training.Guards(sizes, settings).into(trainer)
            train(flags, folder)
    if rank == 0:
        losses = training.validations(folder / "checkpoints")
        said = f"{folder}: finished, {args.epochs} epochs"
        if losses:
            best = min(losses, key=losses.__getitem__)
            said += f"; the best was {best}, {training.LOSS} {losses[best]:.4f}"
        print(said + "; nothing left to do" * (done >= args.epochs))


def train(flags: list[str], folder: Path) -> None:
    """Runs OpenCLIP's trainer. If the disk is full, the error is one line."""
    if not torch.cuda.is_available():
        # PyTorch's fused attention on a CPU is slower than plain products at a dozen tokens
        torch.backends.cuda.enable_flash_sdp(False)
    # OpenCLIP does not tell wandb that it resumes. wandb would then replace its record of the run.
    os.environ.setdefault("WANDB_RESUME", "allow")
    logging.raiseExceptions = False  # on a full disk; saving a checkpoint says that it is full
    for left in (folder / "checkpoints").glob(".*.pt.*"):  # of a save that was killed
        left.unlink(missing_ok=True)
    try:
        open_clip_train.main(flags)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS):
            raise
        raise Stopped(f"{error.filename or folder} can't be written: {error.strerror}") from error
    finally:
        logging.disable(logging.INFO)  # PyTorch's compiler logs at exit, after our last line


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Our arguments; then the launcher's, and those after `--`."""
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
    add("--val", metavar="SHARDS", help="held-out pairs; default: those of a folder --data")
    add("--batch-size", type=whole_number(1), metavar="N", help="of all ranks")
    add("--seed", type=int, default=0, help="default: 0")
    # not --logs, as OpenCLIP's: torchrun would take it for the start of one of its own
    add("--out", default="logs", metavar="DIR", help="where runs go; default: logs")
    add("--name", help="the run's folder in DIR; default: PRESET-LOSS[-views]-SEED")
    add("--dry-run", action="store_true", help="check and print the command, and stop")
    asked, others = parser.parse_known_args(argv[:end])
    _, unknown = parsed(open_clip_train.parse, others)
    if unknown:
        raise CannotStart(f"{unknown[0]}: OpenCLIP's own flags go after --")
    return asked, [*others, *argv[end + 1 :]]


def command_line(
    asked: argparse.Namespace, launcher_flags: Sequence[str], world_size: int
) -> list[str]:
    """The launcher's flags: those of the preset, of the data and of this run, then the user's."""
    batch_size = asked.batch_size or BATCH_SIZES[asked.preset]
    if batch_size % world_size:
        why = f"is of all ranks and does not divide by {world_size}"
        raise CannotStart(f"--batch-size {batch_size} {why}")
    loss = LOSSES[asked.loss]
    name = f"{asked.preset}-{asked.loss}{'-views' if asked.views else ''}-{asked.seed}"
    val = asked.val or (asked.data if Path(asked.data).is_dir() else None)
    held_out = shards.find(val, "val", needed=bool(asked.val)) if val else ""
    flags = [*preset(asked.preset), "--dataset-type", "webdataset"]
    flags += ["--lambda-inmodal", str(WEIGHT * loss.inmodal)]
    flags += ["--lambda-crossmodal", str(WEIGHT * loss.crossmodal)]
    flags += ["--batch-size", str(batch_size // world_size)]
    flags += ["--train-data", shards.find(asked.data, "train")]
    if held_out:
        flags += ["--val-data", held_out]
    flags += ["--seed", str(asked.seed), "--logs", asked.out, "--name", asked.name or name]
    # The newest epoch is kept under one name, replaced whole. A run begins if there is none.
    flags += ["--save-frequency", "0", "--save-most-recent", "--resume", "latest"]
    return [*flags, *launcher_flags]


def parsed(parse: Callable[[Sequence[str]], Any], flags: Sequence[str]) -> Any:
    """The result of OpenCLIP's or the launcher's parser. Its error becomes one line."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return parse(flags)
    except SystemExit as error:
        raise CannotStart(said.getvalue().strip().rpartition("error: ")[2]) from error


def check(args: argparse.Namespace) -> None:
    """Raises `CannotStart` for errors that OpenCLIP would raise later, or in many lines."""
    if ":" not in args.model and args.model not in open_clip.list_models():
        raise CannotStart(f"--model {args.model}: OpenCLIP has none of that name")
    if args.world_size > 1 and not torch.cuda.is_available() and not getattr(args, "fsdp", False):
        what = "several ranks on a CPU: OpenCLIP 3 can't do that"
        raise CannotStart(f"{what}; 4 can, by -- --fsdp --precision fp32")
    for package in ("tensorboard", "wandb"):
        wanted = package in args.report_to or "all" in args.report_to
        if wanted and importlib.util.find_spec(package) is None:
            raise CannotStart(f"--report-to {args.report_to}: pip install {package}")
    for flag in ("same_captions", "distill_model"):
        if args.views and getattr(args, flag, None):
            raise CannotStart(f"--{flag.replace('_', '-')} does not go with --views")
    check_writable(Path(args.logs) / args.name)


def check_data(args: argparse.Namespace, flags: list[str]) -> tuple[dict[str, int], dict[str, str]]:
    """Shard -> its number of pairs, where that is known; and fingerprints of the shards.

    If OpenCLIP would not find the number of training pairs, it is added to the flags. Raises
    `CannotStart` if the data can't be used.
    """
    if args.dataset_type != "webdataset":
        others = "python -m cyclip_loss.open_clip_train takes others"
        only = f"--dataset-type {args.dataset_type}: pretrain takes webdataset only"
        raise CannotStart(f"{only}; {others}")
    if args.train_num_samples is not None and args.train_num_samples < 1:
        raise CannotStart(f"--train-num-samples must be >= 1, not {args.train_num_samples}")
    train = expand_urls(args.train_data)
    known = shards.check("--data", train, held_out=False)
    # OpenCLIP reads the first of these two files that is there, and no *_stats.json.
    theirs = [n for n in ("sizes.json", "__len__") if (Path(train[0]).parent / n).exists()][:1]
    if args.train_num_samples is None and theirs != ["__len__"]:
        if len(known) < len(train):
            what = "how many pairs the shards hold is not known (no sizes.json, *_stats.json or "
            what += "__len__ beside them): say it after --, e.g. -- --train-num-samples 2905954"
            raise CannotStart(what)
        if not theirs:
            args.train_num_samples = sum(known.values())
            flags += ["--train-num-samples", str(args.train_num_samples)]
    if not args.dataset_resampled:
        shards.check_shared(train, known, max(args.workers, 1), args.world_size, args.batch_size)
    names = {"train_shards": fingerprint(train)}
    if args.val_data:
        val = expand_urls(args.val_data)
        known |= shards.check("--val", val, held_out=args.rank == 0)
        names["val_shards"] = fingerprint(val)
    elif args.rank == 0:
        say("no held-out pairs (--val, or 'val' in the shards' names): no best epoch is kept")
    return known, names


def epochs_done(folder: Path, args: argparse.Namespace) -> int:
    """The number of epochs that a run of this name has finished.

    Raises `CannotStart` if it was begun with other settings, or its checkpoint can't be loaded.
    """
    # OpenCLIP 4 writes sharded checkpoints into a folder
    latest = next((folder / "checkpoints").glob("epoch_latest*"), None)
    if latest is None:
        return 0
    done = 0 if latest.is_dir() else int(load_checkpoint(latest)["epoch"])
    before = read_parameters(folder / PARAMETERS)
    if before.pop("ignore_same_captions", False):  # the flag's name until 0.3
        before["same_captions"] = "ignored"
    before.setdefault("views", None)  # of a run from before there was the flag
    if before.get("epochs") == done and args.epochs > done:  # finished, and asked for more
        before["epochs"] = args.epochs
    kept = tuple(KEPT_SETTINGS.split())
    for name, value in vars(args).items():
        # [before]: OpenCLIP writes a list of one --force-image-size as the number
        same = name not in before or value in (before[name], [before[name]])
        if name.startswith(kept) and not same:
            begun = f"{folder} was begun with {name} = {before[name]}, not {value}"
            raise CannotStart(f"{begun}: choose another --name")
    return done
