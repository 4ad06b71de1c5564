"""The command line: `python -m reference_train evaluate --help`."""

import argparse
import os
import shlex
import time
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

from ..arguments import Parser, device, whole_number
from ..errors import CannotStart, Stopped
from ..files import write_json
from . import report
from .checkpoints import find_checkpoints, load
from .datasets import DataSet
from .measure import measure
from .paper import SPLITS
from .suites import BROKEN, Open, find, lines, open_emoji, open_folders
from .table import Result

DESCRIPTION = """\
Evaluates OpenCLIP checkpoints, next to the paper's numbers. Nothing is downloaded, but for weights
that --pretrained names. Interrupted, the same command resumes with the data sets that are missing.
`python -m reference_train report DIR` makes table and picture again."""
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
  icons                          as python -m reference_train.data.icons makes them
The emoji that ship need no --data.

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
        "--imagefolder",
        nargs="+",
        type=named_folder,
        default=[],
        metavar="NAME=DIR",
        help="a data set of your own: in DIR (or DIR/test or DIR/val, and DIR/train) a folder of "
        "images for each class, called by the class",
    )
    add("--only", nargs="+", metavar="NAME", help="data sets to evaluate; default: all there are")
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


def named_folder(text: str) -> tuple[str, Path]:
    """NAME=DIR."""
    name, equals, path = text.partition("=")
    if not (name and equals):
        raise argparse.ArgumentTypeError(f"should be NAME=DIR, not {text}")
    return name, folder(path)


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
    if len(content) != SPLITS["imagenet1k"].classes:
        raise argparse.ArgumentTypeError(f"{path}: {len(content)} lines, not 1000")
    return content


# ------------------------------------------------------------------------------------------------
# What is done


def main(argv: Sequence[str]) -> None:
    """Finds, evaluates, writes. Raises `CannotStart` if nothing can be evaluated.

    Raises `Stopped` at the end if a data set or a checkpoint failed.
    """
    arguments = parse_arguments(argv)
    console = Console()
    checkpoints = find_checkpoints(arguments.checkpoint, arguments.model, arguments.pretrained)
    settings = {
        "precision": arguments.precision,
        "linear_probe": arguments.linear_probe,
        "templates": arguments.templates,
        "classnames": dict(arguments.classnames),
        "superclasses": arguments.superclasses,
    }
    command = shlex.join(["python", "-m", "reference_train", "evaluate", *argv])
    result = report.start(arguments.out, settings, command, arguments.device)
    with console.status("Looking at the data sets"):
        sets = open_all(arguments, result)
    for name, data in sets.items():
        described = report.describe(name, data, name in settings["classnames"])
        if result["data_sets"].setdefault(name, described) != described:  # other images since
            result["data_sets"][name] = described
            for results in result["results"].values():
                results.pop(name, None)
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CannotStart(f"--out {arguments.out}: {error.strerror}") from error

    def progress(of: str, batches: Iterable[Any], what: str) -> Iterable[Any]:
        return track(batches, f"{of}, {what}", console=console, transient=True)

    for checkpoint in checkpoints:
        title = checkpoint.title
        source = {"model": checkpoint.model, "path": str(checkpoint.path or checkpoint.tag)}
        if checkpoint.path:
            source["written"] = str(checkpoint.path.stat().st_mtime_ns)
        before = result["checkpoints"].get(title, {})
        if before and source != {key: before.get(key) for key in source}:
            result["results"].pop(title)  # of other weights
        numbers = result["results"].setdefault(title, {})
        missing = [name for name in sets if name not in numbers]
        if not missing:
            continue
        try:
            clip = load(
                checkpoint,
                arguments.device,
                precision=arguments.precision,
                batch_size=arguments.batch_size,
                workers=arguments.workers,
            )
        except CannotStart as error:
            result["failed"][title] = str(error)
            continue
        result["checkpoints"][title] = {**source, "epoch": clip.epoch}
        for name in missing:
            clip.track = partial(progress, f"{title}: {name}")
            began = time.perf_counter()
            try:
                measured = measure(clip, sets[name], arguments.linear_probe)
            except Exception as error:  # whatever it is: the others may have taken hours
                result["failed"][f"{name}, {title}"] = reason(error)
            else:
                numbers[name] = {**measured, "seconds": time.perf_counter() - began}
                write_json(result, arguments.out / "evaluation.json")
    failed = "; ".join(f"{name}: {why}" for name, why in result["failed"].items())
    if not any(result["results"].values()):
        raise CannotStart(f"nothing to evaluate: {failed}")
    write_json(result, arguments.out / "evaluation.json")
    report.write(result, arguments.out, console)
    if failed:
        raise Stopped(f"failed, and not in the table: {failed}")


def open_all(arguments: argparse.Namespace, result: Result) -> dict[str, DataSet]:
    """The data sets that were asked for and are there. Raises `CannotStart` if there is none.

    result: gets the reasons of those that failed, and of those that are not there.
    """
    known, other = find(arguments.data, arguments.superclasses)
    found: dict[str, Open] = {**known, "emoji": open_emoji}
    for name, path in arguments.imagefolder:
        if name in found or name in SPLITS:
            raise CannotStart(f"--imagefolder: {name} is the name of another data set")
        found[name] = partial(open_folders, path, name, None)
    named = dict.fromkeys([*(arguments.only or []), *dict(arguments.classnames)])
    if unknown := [name for name in named if name not in found]:
        there = ", ".join(found)
        raise CannotStart(f"no data set {' or '.join(unknown)}; there are {there}{listed(other)}")
    if arguments.only:
        found = {name: opener for name, opener in found.items() if name in arguments.only}
    else:
        result["absent"] |= {name: "not under --data" for name in SPLITS if name not in found}
    if other:
        result["absent"]["under --data"] = listed(other).strip("; ")
    own_names = dict(arguments.classnames)
    sets: dict[str, DataSet] = {}
    for name, opener in found.items():
        try:
            data = opener()
        except BROKEN as error:
            result["failed"][name] = reason(error)
            continue
        for classes in data.classes.values():
            classes.templates = arguments.templates or classes.templates
        if name in own_names:
            has = len(data.classes[""].names) if "" in data.classes else 0
            if len(own_names[name]) != has:
                given = len(own_names[name])
                raise CannotStart(f"--classnames {name}: {given} names for {has} classes")
            data.classes[""].names = own_names[name]
        if data.train_lacks:
            result["failed"][f"{name}, train split"] = data.train_lacks
        sets[name] = data
    if not sets:
        failed = "; ".join(f"{name}: {why}" for name, why in result["failed"].items())
        raise CannotStart(f"nothing to evaluate: {failed}")
    return sets


def listed(other: list[Path]) -> str:
    """What no data set was found in."""
    names = ", ".join(str(path) for path in other[:10]) + ", …" * (len(other) > 10)
    return f"; no data set is known in {len(other)}: {names}" if other else ""


def reason(error: BaseException) -> str:
    """An error as one line: its last, as a worker's traceback comes before."""
    return ([type(error).__name__, *str(error).strip().splitlines()][-1])[:300]
