"""`python -m reference_train pretrain`: OpenCLIP's trainer with the CyCLIP loss, by presets.

Prints the one command of `cyclip_loss.open_clip_train` that a preset stands for, checks what can be
checked before any work, and runs it. Under `torchrun` every rank does the same.
"""

import argparse
import importlib
import importlib.util
import os
import re
import shlex
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import open_clip
import torch
from braceexpand import braceexpand

from cyclip_loss import open_clip_train

from ..arguments import Parser, whole_number
from ..data.samples import read_samples
from ..errors import CannotStart, is_first
from ..losses import LOSSES
from ..runs import read_parameters
from . import best, models
from .presets import NAMES, WEIGHT, preset

# What a run is: how OpenCLIP's names in params.txt begin. The number of ranks is among them, as a
# validation's loss is over batches of one rank, and shards are shared out to ranks.
KEPT_SETTINGS = (
    *("model", "pretrained", "force_", "image_", "lock_", "use_bn_sync", "siglip", "distill_"),
    *("coca_", "train_", "val_data", "val_num", "dataset_", "aug_cfg", "seed", "world_size"),
    *("batch_size", "accum_freq", "epochs", "precision", "opt", "lr", "warmup", "skip_scheduler"),
    *("wd", "beta", "eps", "momentum", "grad_clip", "lambda_", "reference_batch_size"),
)


def main(argv: Sequence[str]) -> None:
    """Trains, or goes on with what was begun under the same name.

    argv: the command line after `pretrain`. Raises `CannotStart` for what can't be trained.
    """
    asked, more = parse(argv)
    models.register()
    trainer = open_clip_trainer()
    ranks = importlib.import_module("open_clip_train.distributed")
    _, _, world_size = ranks.world_info_from_env()
    if world_size > 1 and not ranks.is_using_distributed():
        raise CannotStart(f"{world_size} ranks of MPI: OpenCLIP takes torchrun's and Slurm's only")
    flags = command_line(asked, more, world_size)
    if is_first("RANK"):
        # the "--" is for torchrun, which would take --logs for one of its own flags
        print("python -m cyclip_loss.open_clip_train --", shlex.join(flags), flush=True)
    check(trainer, flags, world_size)
    if asked.dry_run:
        return
    if not torch.cuda.is_available():
        # PyTorch's fused attention on a CPU is several times slower than plain products at the
        # dozen tokens of a caption.
        torch.backends.cuda.enable_flash_sdp(False)
    # OpenCLIP does not tell wandb that it goes on, and wandb would replace what it has of the run.
    os.environ.setdefault("WANDB_RESUME", "allow")
    best.add_to(trainer, importlib.import_module("open_clip_train.train"))
    open_clip_train.main(flags)


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Our arguments, and those after `--`."""
    ours, more = list(argv), []
    if "--" in ours:
        at = ours.index("--")
        ours, more = ours[:at], ours[at + 1 :]
    parser = Parser(
        prog="python -m reference_train pretrain",
        description="Pretrains with OpenCLIP's trainer and the CyCLIP loss. The command that a "
        "preset stands for is printed first; what follows -- is added to it, and so changes it. "
        "Given again, it goes on from the last epoch. Over GPUs: "
        "torchrun --nproc-per-node 8 -m reference_train pretrain ...",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--preset", choices=NAMES, required=True, help="model, schedule, batch size")
    add("--loss", choices=LOSSES, default="cyclip", help="default: cyclip")
    add(
        "--data",
        required=True,
        metavar="SHARDS",
        help="WebDataset of images and captions: tar files (braces allowed) or their folder, of "
        "which those with 'train' in their names are taken if there are such",
    )
    add(
        "--val",
        metavar="SHARDS",
        help="held-out pairs, likewise; default: if --data is a folder, those with 'val' in their "
        "names",
    )
    add(
        "--batch-size",
        type=whole_number(1),
        metavar="N",
        help="of all ranks; default: the preset's",
    )
    add("--model", help="an OpenCLIP model; default: the preset's")
    add("--seed", type=int, default=0, help="default: 0")
    # not --logs, as OpenCLIP's: torchrun would take it for the start of one of its own
    add("--out", default="logs", metavar="DIR", help="where runs go; default: logs")
    add("--name", help="of the run, a folder of DIR; default: PRESET-LOSS-SEED")
    add("--dry-run", action="store_true", help="check and print the command, and stop")
    return parser.parse_args(ours), more


def command_line(asked: argparse.Namespace, more: Sequence[str], world_size: int) -> list[str]:
    """The launcher's flags."""
    chosen = preset(asked.preset)
    batch_size = asked.batch_size or chosen.batch_size
    if batch_size % world_size:
        raise CannotStart(
            f"--batch-size {batch_size} is of all ranks and does not divide by {world_size}"
        )
    name = asked.name or f"{asked.preset}-{asked.loss}-{asked.seed}"
    loss = LOSSES[asked.loss]
    flags = {
        **chosen.flags,
        "--lambda-inmodal": str(WEIGHT * loss.inmodal),
        "--lambda-crossmodal": str(WEIGHT * loss.crossmodal),
        "--batch-size": str(batch_size // world_size),
        "--dataset-type": "webdataset",
        "--train-data": shards(asked.data, "train"),
        "--seed": str(asked.seed),
        "--logs": asked.out,
        "--name": name,
        # The newest epoch is kept under one name, replaced whole; without one, a run begins.
        "--save-frequency": "0",
        "--resume": "latest",
    }
    if asked.model:
        flags["--model"] = asked.model
    val = asked.val or (asked.data if Path(asked.data).is_dir() else None)
    if val and (found := shards(val, "val", needed=bool(asked.val))):
        flags["--val-data"] = found
    switches = ["--save-most-recent"]
    if aug := flags.pop("--aug-cfg", ""):  # the one flag that takes several values
        switches += ["--aug-cfg", *aug.split()]
    return [*chain(*flags.items()), *switches, *more]


def shards(data: str, part: str, needed: bool = True) -> str:
    """A folder -> the pattern of its tar files, those of a part if they are named so.

    Anything else stays as it is: OpenCLIP expands braces, and takes pipes and addresses.
    """
    folder = Path(data)
    if not folder.is_dir():
        return data
    found = sorted(folder.glob(f"*{part}*.tar"))
    if not found and needed:  # whatever it is called, but nothing held out to train on
        found = [p for p in sorted(folder.glob("*.tar")) if part == "val" or "val" not in p.name]
    if not found and needed:
        raise CannotStart(f"no tar file in {data}" + (" but for validation" * (part == "train")))
    names = [str(path) for path in found]
    numbers = [re.fullmatch(r"(.*?)(\d+)\.tar", name) for name in names]
    if len(names) > 1 and numbers[0] and numbers[-1]:
        pattern = f"{numbers[0][1]}{{{numbers[0][2]}..{numbers[-1][2]}}}.tar"
        if list(braceexpand(pattern)) == names:
            return pattern
    return "::".join(names)


def open_clip_trainer() -> Any:
    """The module `open_clip_train.main`."""
    try:
        return importlib.import_module("open_clip_train.main")
    except ImportError as error:
        raise CannotStart(
            f'open_clip_train can\'t be imported ({error}): pip install "open_clip_torch[training]"'
        ) from error


def check(trainer: Any, flags: Sequence[str], world_size: int) -> None:
    """Raises `CannotStart` for what OpenCLIP would stumble over later, or in many lines."""
    ours, theirs = open_clip_train.flags().parse_known_args(flags)
    try:
        args = trainer.parse_args(theirs)
    except SystemExit as error:
        raise CannotStart("OpenCLIP does not take these flags") from error
    check_same_settings(Path(args.logs) / args.name, {**vars(args), **vars(ours)}, world_size)
    try:
        known = open_clip.get_model_config(args.model) is not None
    except (OSError, ValueError) as error:  # of local-dir: and hf-hub:
        raise CannotStart(f"--model {args.model}: {' '.join(str(error).split())}") from error
    if not known and not args.model.startswith(("local-dir:", "hf-hub:")):
        raise CannotStart(f"--model {args.model}: OpenCLIP has none of that name")
    if world_size > 1 and not torch.cuda.is_available() and not getattr(args, "fsdp", False):
        raise CannotStart(
            "several ranks on a CPU: OpenCLIP 3 can't do that; 4 can, by -- --fsdp --precision fp32"
        )
    for package in ("tensorboard", "wandb"):
        wanted = package in args.report_to or "all" in args.report_to
        if wanted and importlib.util.find_spec(package) is None:
            raise CannotStart(f"--report-to {args.report_to}: pip install {package}")
    train = check_shards("--data", args.train_data)
    if args.val_data:
        check_shards("--val", args.val_data)
    if args.train_num_samples is None and not has_sizes(Path(train[0]).parent):
        raise CannotStart(
            "how many pairs the shards hold is not known (no sizes.json or __len__ beside them): "
            "say it after --, e.g. -- --train-num-samples 2905954"
        )
    workers = max(args.workers, 1) * world_size
    if len(train) < workers and not args.dataset_resampled:
        raise CannotStart(
            f"--data has {len(train)} shards for {workers} workers (--workers × ranks): "
            "each needs one"
        )


def check_same_settings(folder: Path, settings: dict[str, Any], world_size: int) -> None:
    """Raises `CannotStart` if a run that would go on was begun with other settings."""
    path = folder / "params.txt"
    # OpenCLIP 4 writes sharded checkpoints into a folder
    if not path.is_file() or next((folder / "checkpoints").glob("epoch_latest*"), None) is None:
        return
    before = read_parameters(path)
    settings = {"world_size": world_size, **settings}
    for name, value in settings.items():
        # [before]: OpenCLIP writes a list of one --force-image-size as the number
        same = name not in before or value in (before[name], [before[name]])
        if name.startswith(KEPT_SETTINGS) and not same:
            raise CannotStart(
                f"{folder} was begun with {name} = {before[name]}, not {value}: "
                "choose another --name"
            )


def check_shards(argument: str, data: str) -> list[str]:
    """The tar files. If they are local they are there, and the first of them has pairs."""
    found = [path for pattern in data.split("::") for path in braceexpand(pattern)]
    if any("://" in path or path.startswith("pipe:") for path in found):
        return found
    for path in found:
        if not Path(path).is_file():
            raise CannotStart(f"{argument}: no such shard: {path}")
    if next(read_samples(found[:1]), None) is None:
        raise CannotStart(f"{argument}: {found[0]} holds no image with a caption")
    return found


def has_sizes(folder: Path) -> bool:
    """Whether OpenCLIP finds there how many pairs the shards hold."""
    return (folder / "sizes.json").exists() or (folder / "__len__").exists()
