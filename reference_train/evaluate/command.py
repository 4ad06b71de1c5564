"""The command line: `python -m reference_train evaluate --help`."""

import argparse
import os
import shlex
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from ..arguments import Parser, device, whole_number
from ..errors import CannotStart
from ..files import write_json
from . import report
from .checkpoints import Clip, find_checkpoints, load
from .datasets import Classes, DataSet, Images
from .measure import measure
from .suites import BROKEN, PAPER, Open, find, lines, open_emoji

DESCRIPTION = """\
Evaluates OpenCLIP checkpoints and sets their numbers beside the paper's. What is not there is
skipped with its reason. Nothing is downloaded, but for weights that --pretrained names."""
EPILOG = """\
data sets of --data (DIR itself, or folders in it):
  clip-benchmark's WebDatasets   FOLDER/test/0.tar, …, FOLDER/train/…, classnames.txt; by their
                                 names on the hub: wds_vtab-cifar10, wds_vtab-cifar100,
                                 wds_imagenet1k, wds_imagenetv2, wds_imagenet_sketch,
                                 wds_imagenet-a, wds_imagenet-r, wds_flickr30k,
                                 wds_mscoco_captions, or any other
  torchvision's CIFAR            cifar-10-batches-py, cifar-100-python
  ImageNet as folders            imagenet1k/val and imagenet1k/train, imagenetv2, imagenet-sketch,
                                 imagenet-a, imagenet-r: in them a folder of images for each
                                 WordNet identifier (or number, as imagenetv2 comes)
  stamps, icons                  as python -m reference_train.data.stamps and .icons make them

The paper's 67 superclasses of ImageNet do not ship: --superclasses names a file of 1,000 lines, the
superclass of each class in ImageNet's order."""


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments, with their defaults. Raises `CannotStart`."""
    parser = Parser(
        prog="python -m reference_train evaluate",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=DESCRIPTION,
        epilog=EPILOG,
    )
    add = parser.add_argument
    add(
        "checkpoint",
        nargs="*",
        type=Path,
        metavar="CHECKPOINT",
        help="logs/NAME (its best.pt, else its newest epoch) or a file; several: several columns",
    )
    add("--data", nargs="+", type=folder, default=[], metavar="DIR", help="where data sets are")
    add(
        "--suite",
        choices=["paper", "rehearsal"],
        help="paper: CIFAR, ImageNet and its shifts; rehearsal: the emoji that ship, and whatever "
        "else is under --data; default: both",
    )
    add("--model", help="OpenCLIP's name of the model; default: as the run's params.txt says")
    add("--pretrained", metavar="TAG", help="OpenCLIP's own weights of --model, one more column")
    add(
        "--linear-probe",
        action="store_true",
        help="fit one as the paper's authors do, on the features of the whole train split",
    )
    add(
        "--templates",
        type=templates,
        metavar="FILE",
        help="prompts, one a line, {c} for the class; default: the 80 of ImageNet for the paper's "
        "data sets, as in the paper, and their own for others",
    )
    add(
        "--classnames",
        nargs="+",
        type=class_names,
        default=[],
        metavar="NAME=FILE",
        help="other class names for a data set, one a line in the order of its labels",
    )
    add("--superclasses", type=superclasses, metavar="FILE", help="of ImageNet; see below")
    add(
        "--device",
        type=device,
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="default: cuda if there is one, else cpu",
    )
    add(
        "--precision",
        choices=["fp32", "amp", "amp_bf16"],
        help="default: amp_bf16 on cuda, fp32 elsewhere",
    )
    add("--batch-size", type=whole_number(1), default=256, metavar="N", help="default %(default)s")
    add(
        "--workers",
        type=whole_number(0),
        default=min(8, os.cpu_count() or 1),
        metavar="N",
        help="processes that decode images; default: one a core, at most 8",
    )
    add(
        "--out",
        type=Path,
        default=Path("runs/evaluation"),
        metavar="DIR",
        help="where evaluation.json, table.md and picture.png go; default %(default)s",
    )
    arguments = parser.parse_args(argv)
    if arguments.precision is None:
        arguments.precision = "amp_bf16" if arguments.device.type == "cuda" else "fp32"
    return arguments


# ------------------------------------------------------------------------------------------------
# Types of arguments


def folder(text: str) -> Path:
    """A folder that is there."""
    if not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"no such folder: {text}")
    return Path(text)


def some_lines(path: str) -> list[str]:
    """The lines of a text file."""
    try:
        content = lines(Path(path))
    except (OSError, UnicodeDecodeError) as error:
        raise argparse.ArgumentTypeError(f"{path}: {error}") from error
    if not content:
        raise argparse.ArgumentTypeError(f"no such file, or an empty one: {path}")
    return content


def templates(path: str) -> list[str]:
    """Prompts, with {} for the class."""
    content = [line.replace("{c}", "{}") for line in some_lines(path)]
    for line in content:
        if "{}" not in line:
            raise argparse.ArgumentTypeError(f"{path}: no {{c}} in {line!r}")
    return content


def class_names(text: str) -> tuple[str, list[str]]:
    """NAME=FILE."""
    name, equals, path = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"should be NAME=FILE, not {text}")
    return name, some_lines(path)


def superclasses(path: str) -> list[str]:
    """One for each of ImageNet's classes."""
    content = some_lines(path)
    if len(content) != PAPER["imagenet1k"]:
        raise argparse.ArgumentTypeError(f"{path}: {len(content)} lines, not 1000")
    return content


# ------------------------------------------------------------------------------------------------
# What is done


def main(argv: Sequence[str]) -> None:
    """Finds, evaluates, writes. Raises `CannotStart` if there is nothing to evaluate."""
    arguments = parse_arguments(argv)
    written = arguments.out / "evaluation.json"
    if written.exists():
        raise CannotStart(f"--out {arguments.out}: holds an evaluation already")
    checkpoints = find_checkpoints(arguments.checkpoint, arguments.model, arguments.pretrained)
    console = Console()
    result = report.start(
        arguments, shlex.join(["python", "-m", "reference_train", "evaluate", *argv])
    )
    skipped = result["skipped"]
    with console.status("Looking at the data sets"):
        sets = open_all(arguments, skipped)
    result["data_sets"] = {name: report.describe(data) for name, data in sets.items()}
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CannotStart(f"--out {arguments.out}: {error.strerror}") from error
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    clip = None
    with Progress(*columns, console=console, transient=True) as progress:
        for checkpoint in checkpoints:
            try:
                clip = load(
                    checkpoint,
                    arguments.device,
                    arguments.precision,
                    arguments.batch_size,
                    arguments.workers,
                )
            except CannotStart as error:
                skipped[checkpoint.title] = str(error)
                continue
            result["checkpoints"].append(report.describe_checkpoint(clip))
            numbers = result["results"].setdefault(checkpoint.title, {})
            for name, data in sets.items():
                start = time.perf_counter()
                encode = partial(with_progress, clip, name, progress)
                try:
                    measured = measure(clip, data, arguments.linear_probe, encode)
                except Exception as error:  # whatever it is: the others may have taken hours
                    skipped[f"{name}, {checkpoint.title}"] = reason(error)
                else:
                    numbers[name] = {**measured, "seconds": time.perf_counter() - start}
                    write_json(result, written)
    if not any(result["results"].values()):
        raise CannotStart(nothing(skipped))
    report.write(result, arguments.out, console)


def open_all(arguments: argparse.Namespace, skipped: dict[str, str]) -> dict[str, DataSet]:
    """The data sets that were asked for and are there. Raises `CannotStart` if there is none.

    skipped: gets the reasons of those that are not.
    """
    found: dict[str, Open] = {**find(arguments.data, arguments.superclasses), "emoji": open_emoji}
    if arguments.suite:
        found = {n: o for n, o in found.items() if (n in PAPER) == (arguments.suite == "paper")}
    own_names = dict(arguments.classnames)
    for name in own_names:
        if name not in found:
            raise CannotStart(f"--classnames: no data set {name!r}, but {', '.join(found)}")
    if arguments.suite != "rehearsal":
        skipped |= {name: "not under --data" for name in PAPER if name not in found}
    sets: dict[str, DataSet] = {}
    for name, opener in found.items():
        try:
            data = opener()
        except BROKEN as error:
            skipped[name] = reason(error)
            continue
        for classes in data.classes.values():
            classes.templates = arguments.templates or classes.templates
        if name in own_names:
            rename(name, data.classes, own_names[name])
        if data.train_lacks:
            skipped[f"{name}, train split"] = data.train_lacks
        sets[name] = data
    if not sets:
        raise CannotStart(nothing(skipped))
    return sets


def rename(name: str, classes: dict[str, Classes], names: list[str]) -> None:
    """Gives a data set the user's class names."""
    has = len(classes[""].names) if "" in classes else 0
    if len(names) != has:
        raise CannotStart(f"--classnames {name}: {len(names)} names for {has} classes")
    classes[""].names = names


def with_progress(clip: Clip, name: str, progress: Progress, images: Images, what: str) -> Tensor:
    """`Clip.encode_images` with a progress bar."""
    task = progress.add_task(f"{clip.checkpoint.title}: {name}, {what}", total=len(images))
    try:
        return clip.encode_images(images, partial(progress.advance, task))
    finally:
        progress.remove_task(task)


def nothing(skipped: dict[str, Any]) -> str:
    """The message if nothing could be evaluated."""
    return "nothing to evaluate: " + "; ".join(f"{name}: {why}" for name, why in skipped.items())


def reason(error: BaseException) -> str:
    """An error as one line: its last, as a worker's traceback comes before."""
    return ([type(error).__name__, *str(error).strip().splitlines()][-1])[:300]
