"""`python -m reference_train pretrain`: OpenCLIP's trainer with the CyCLIP loss, by presets.

A preset stands for one command of `cyclip_loss.open_clip_train` (or `views`, which adds `--views`).
`pretrain` prints this command, checks its flags and data, and runs it. Under `torchrun` every rank
checks and runs the command.
"""

import argparse
import contextlib
import io
import logging
import os
import shlex
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip_train import distributed
from open_clip_train import main as trainer
from webdataset.shardlists import expand_urls

from cyclip_loss import open_clip_train

from ..command_line import Parser, RunFailed, UsageError, at_least, first_line, say
from ..data.samples import fingerprint
from ..files import locked
from ..losses import LOSSES, PENALTY_WEIGHT, SIGLIP_PENALTY_WEIGHT
from ..runs import PARAMETERS, add_to_list, code_version, read_parameters, register_models
from . import patches, shards, views
from .presets import BATCH_SIZES, NO_AUGMENTATION, PENALTY_PRESETS, preset
from .resume import epochs_done

DESCRIPTION = """\
Pretrains with OpenCLIP's trainer and CLIP's loss, CyCLIP or others. A preset stands for a command,
which is printed first. Flags of OpenCLIP go after -- and override the preset. Flags that
cyclip_loss.open_clip_train adds, such as --penalties, need no --. The same command again
resumes after the last epoch. On several GPUs:
  torchrun --nproc-per-node 8 -m reference_train pretrain ..."""


def main(argv: Sequence[str]) -> None:
    """Trains, or resumes the run of the same name.

    argv: the arguments after `pretrain`. Raises `UsageError` if the flags or the data are wrong.
    """
    options, launcher_flags = parse(argv)
    register_models()
    _, rank, world_size = distributed.world_info_from_env()
    flags = launcher_command(options, launcher_flags, world_size)
    args = all_settings(flags, rank=rank, world_size=world_size)
    args.views = options.views
    added_settings = {**check_data(args, flags), "views": options.views}
    vars(args).update(added_settings)
    if rank == 0:
        launcher = [open_clip_train.__name__]
        if options.views:
            launcher = [views.__name__, "--views", options.views]
        # Without "--", torchrun would take --logs as one of its own flags.
        print("python -m", shlex.join([*launcher, "--", *flags]), flush=True)
    check_settings(args, options.loss)
    folder = Path(args.logs) / args.name
    # One lock for all ranks.
    with contextlib.nullcontext() if options.dry_run or rank else locked(folder):
        done = epochs_done(folder, args)
        # A run that is resumed with other code has all of its commits.
        earlier = str(read_parameters(folder / PARAMETERS).get("commit")) if done else ""
        added_settings["commit"] = add_to_list(earlier, str(code_version()))
        if options.dry_run:
            return
        if done < args.epochs:
            if options.views:
                views.ViewPatches(options.views).install(trainer)
            patches.TrainerPatches(added_settings).install(trainer)
            train(flags)
        if rank == 0:
            report(folder, args.epochs, was_finished=done >= args.epochs)


def report(folder: Path, epochs: int, was_finished: bool) -> None:
    """Prints that the run is finished, and which epoch has the lowest loss."""
    line = f"{folder}: finished, {epochs} epochs"
    if best := patches.load_best(folder / "checkpoints"):
        line += f"; the best was {best['epoch']}, {patches.LOSS} {best[patches.LOSS]:.4f}"
    print(line + ("; nothing left to do" if was_finished else ""))


def train(flags: list[str]) -> None:
    """Runs OpenCLIP's trainer."""
    if not torch.cuda.is_available():
        # For a dozen tokens on a CPU, fused attention is slower than matrix products.
        torch.backends.cuda.enable_flash_sdp(False)
        # Several times faster for an embedding of 49,408 words. PyTorch doesn't choose it on a CPU.
        trainer.optim.AdamW = partial(torch.optim.AdamW, fused=True)
    # OpenCLIP does not tell wandb that a run is resumed, and wandb would overwrite its record.
    os.environ.setdefault("WANDB_RESUME", "allow")
    try:
        open_clip_train.main(flags)
    except RuntimeError as error:
        if "inline_container" not in str(error):  # where torch.save fails
            raise
        why = f"is the disk full? {first_line(error)}"
        raise RunFailed(f"a checkpoint can't be written: {why}") from error
    finally:
        logging.disable(logging.INFO)  # PyTorch's compiler logs at exit, after our last line


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Returns the options of `pretrain`, and the other flags: the launcher's and OpenCLIP's."""
    end = argv.index("--") if "--" in argv else len(argv)
    parser = Parser("python -m reference_train pretrain", description=DESCRIPTION)
    add = parser.add_argument
    add("--preset", choices=BATCH_SIZES, required=True, help="model, schedule, batch size")
    losses = [*LOSSES]
    text = f"{', '.join(losses)} (default: clip), or MODULE:NAME: cyclip_loss.open_clip_train"
    add("--loss", default="clip", help=f"{text} says what the loss takes and returns")
    views.add_flag(parser)
    add("--data", required=True, metavar="SHARDS", help="tar files (braces allowed), or a folder")
    add(
        "--val",
        metavar="SHARDS",
        help="held-out pairs; default: the 'val' files in the folder --data",
    )
    add(
        "--batch-size",
        type=at_least(1),
        metavar="N",
        help="pairs in a batch of all ranks together; default: the preset's",
    )
    add("--seed", type=at_least(0), default=0, help="default: 0")
    # The flag is not called --logs, because torchrun would take that as one of its own flags.
    add("--out", default="logs", metavar="DIR", help="the folder of all runs; default: logs")
    add("--name", help="the run's folder in DIR; default: PRESET-LOSS[-views]-SEED")
    add("--dry-run", action="store_true", help="print and check the command, but do not run it")
    options, others = parser.parse_known_args(argv[:end])
    if options.loss not in losses and ":" not in options.loss:
        raise UsageError(f"--loss {options.loss}: take {', '.join(losses)} or MODULE:NAME")
    _, unknown = parse_with(open_clip_train.parse, [*loss_flags(options), *others])
    if "--siglip" in unknown:  # of loss_flags
        unknown.remove("--siglip")
    if unknown:
        raise UsageError(f"{unknown[0]}: OpenCLIP's own flags go after --")
    return options, [*others, *argv[end + 1 :]]


def launcher_command(
    options: argparse.Namespace, launcher_flags: Sequence[str], world_size: int
) -> list[str]:
    """The flags of the launcher: the preset's, the data's and the run's, and then the user's.

    Later flags override earlier ones.
    """
    batch_size = options.batch_size or BATCH_SIZES[options.preset]
    if batch_size % world_size:
        what = f"--batch-size {batch_size}, of all ranks together,"
        raise UsageError(f"{what} is not divisible by {world_size} ranks")
    title = options.loss.rpartition(":")[2]
    name = f"{options.preset}-{title}{'-views' if options.views else ''}-{options.seed}"
    val = options.val or (options.data if Path(options.data).is_dir() else None)
    held_out = shards.find(val, "val", needed=bool(options.val)) if val else ""
    flags = [*preset(options.preset), "--dataset-type", "webdataset", *loss_flags(options)]
    flags += ["--batch-size", str(batch_size // world_size)]
    flags += ["--train-data", shards.find(options.data, "train")]
    if held_out:
        flags += ["--val-data", held_out]
    flags += ["--seed", str(options.seed), "--logs", options.out, "--name", options.name or name]
    # Each epoch replaces epoch_latest.pt. Without this file, "--resume latest" begins a new run.
    flags += ["--save-frequency", "0", "--save-most-recent", "--resume", "latest"]
    return [*flags, *launcher_flags]


def loss_flags(options: argparse.Namespace) -> list[str]:
    """The launcher's flags for `--loss`. A loss without penalties has none for them."""
    loss = LOSSES.get(options.loss)
    if loss is None:
        return ["--loss", options.loss]
    flags = ["--siglip"] if loss.siglip else []
    if not (loss.inmodal or loss.crossmodal):
        return flags
    if loss.siglip:
        weight = SIGLIP_PENALTY_WEIGHT
        flags += ["--reference-batch-size", "128"]
    else:
        weight = PENALTY_WEIGHT
        flags += ["--penalties", PENALTY_PRESETS[options.preset]]
    flags += ["--lambda-inmodal", str(weight * loss.inmodal)]
    return [*flags, "--lambda-crossmodal", str(weight * loss.crossmodal)]


def all_settings(flags: Sequence[str], *, rank: int, world_size: int) -> argparse.Namespace:
    """The settings that the flags stand for, OpenCLIP's and the launcher's, and the rank."""
    launcher_args, openclip_flags = parse_with(open_clip_train.parse, flags)
    args: argparse.Namespace = parse_with(trainer.parse_args, openclip_flags)
    vars(args).update(vars(launcher_args), rank=rank, world_size=world_size)
    return args


def parse_with(parse: Callable[[Sequence[str]], Any], flags: Sequence[str]) -> Any:
    """The result of OpenCLIP's or the launcher's parser. Its error becomes a `UsageError`."""
    stderr = io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr):
            return parse(flags)
    except SystemExit as error:
        if not error.code:  # after --help
            raise
        raise UsageError(stderr.getvalue().strip().rpartition("error: ")[2]) from error


def check_settings(args: argparse.Namespace, loss: str) -> None:
    """Raises `UsageError` for errors that OpenCLIP would raise later, or in many lines."""
    if ":" not in args.model and args.model not in open_clip.list_models():
        raise UsageError(f"--model {args.model}: OpenCLIP has no model of this name")
    if args.views == "own" and args.aug_cfg == NO_AUGMENTATION:
        what = "the preset's augmentation changes no picture, so both views would be equal"
        raise UsageError(f"--views own: {what}; take --views, or another --aug-cfg after --")
    for penalty in ("inmodal", "crossmodal"):  # a run is called after its loss
        has_it = loss not in LOSSES or getattr(LOSSES[loss], penalty)
        if vars(args)[f"lambda_{penalty}"] and not has_it:
            raise UsageError(f"--loss {loss} has no {penalty} penalty: choose another --loss")
    for flag in ("same_captions", "distill_model", "siglip"):
        if args.views and getattr(args, flag, None):
            raise UsageError(f"--{flag.replace('_', '-')} can't be combined with --views")


def check_data(args: argparse.Namespace, flags: list[str]) -> dict[str, str]:
    """Checks the shards. Returns their fingerprints.

    If OpenCLIP would not find the number of training pairs, this function adds it to `flags`.
    Raises `UsageError` if the data can't be used.
    """
    if args.dataset_type != "webdataset":
        what = f"--dataset-type {args.dataset_type}: pretrain takes webdataset only"
        other = f"{views.__name__} --views" if args.views else open_clip_train.__name__
        raise UsageError(f"{what}; python -m {other} takes other types")
    train = expand_urls(args.train_data)
    sizes = shards.check("--data", train)
    if args.train_num_samples is None:
        # OpenCLIP reads sizes.json and __len__ of the first shard's folder only.
        if len(sizes) == len(train):
            args.train_num_samples = sum(sizes.values())
            flags += ["--train-num-samples", str(args.train_num_samples)]
        elif not (Path(train[0]).parent / "__len__").exists():
            raise UsageError(
                "how many pairs the shards hold is not known (no sizes.json, *_stats.json or "
                "__len__ beside them): add it after --, e.g. -- --train-num-samples 2905954"
            )
    if not args.dataset_resampled:
        shards.check_workers(train, sizes, max(args.workers, 1), args.world_size, args.batch_size)
    fingerprints = {"train_shards": fingerprint(train)}
    if args.val_data:
        val = expand_urls(args.val_data)
        shards.check("--val", val)
        fingerprints["val_shards"] = fingerprint(val)
    elif args.rank == 0:
        say("no held-out pairs (--val, or 'val' in the shards' names): no best epoch is kept")
    return fingerprints
