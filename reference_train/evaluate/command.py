"""The command line: `python -m reference_train evaluate --help`."""

import argparse
import os
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)
from torch import Tensor

from ..errors import CannotStart
from . import report
from .checkpoints import Clip, find_checkpoints, load
from .datasets import DataSet, Images, Unusable
from .measure import measure
from .suites import BROKEN, PAPER, Open, find, lines, open_emoji

PRECISIONS = ("fp32", "amp", "amp_bf16")


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments, with their defaults."""
    parser = argparse.ArgumentParser(
        prog="python -m reference_train evaluate",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Evaluates OpenCLIP checkpoints and sets their numbers beside the paper's.\n"
        "Nothing is downloaded, but for weights that --pretrained names.",
        epilog="""\
data sets under --data (in DIR itself, its folders, and their folders):
  clip-benchmark's WebDatasets   FOLDER/test/0.tar, …, FOLDER/train/…, classnames.txt; by their
                                 names on the hub: wds_vtab-cifar10, wds_vtab-cifar100,
                                 wds_imagenet1k, wds_imagenetv2, wds_imagenet_sketch,
                                 wds_imagenet-a, wds_imagenet-r, wds_flickr30k,
                                 wds_mscoco_captions, or any other
  torchvision's CIFAR            cifar-10-batches-py, cifar-100-python
  ImageNet as folders            imagenet1k/val and imagenet1k/train, imagenetv2, imagenet-sketch,
                                 imagenet-a, imagenet-r: a folder of images for each WordNet
                                 identifier (or number, as in imagenetv2)
  stamps, icons                  what python -m reference_train.data.stamps and .icons have made

ImageNet's superclasses: the paper's 67 do not ship. `--superclasses FILE` names a file of 1,000
lines, the superclass of each class.""",
    )
    parser.add_argument(
        "checkpoint",
        nargs="*",
        type=Path,
        metavar="CHECKPOINT",
        help="logs/NAME (its best.pt, else its newest epoch) or a file; several: several columns",
    )
    parser.add_argument("--data", nargs="+", type=Path, default=[], metavar="DIR")
    parser.add_argument(
        "--suite",
        choices=["paper", "rehearsal"],
        help="paper: CIFAR, ImageNet and its shifts; rehearsal: the emoji that ship, and whatever "
        "else is under --data; default: both",
    )
    parser.add_argument("--model", help="OpenCLIP's name; default: what the run's params.txt says")
    parser.add_argument(
        "--pretrained", metavar="TAG", help="weights as OpenCLIP has them, of --model"
    )
    parser.add_argument(
        "--linear-probe",
        action="store_true",
        help="fit one as the paper's authors do, on the features of the whole train split",
    )
    parser.add_argument(
        "--templates",
        type=Path,
        metavar="FILE",
        help="prompts, one a line, {c} for the class; default: the 80 of ImageNet for the paper's "
        "data sets, as in the paper, and their own for others",
    )
    parser.add_argument(
        "--classnames",
        nargs="+",
        default=[],
        metavar="NAME=FILE",
        help="other class names for a data set, one a line in the order of its labels",
    )
    parser.add_argument("--superclasses", type=Path, metavar="FILE", help="of ImageNet; see below")
    parser.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="default %(default)s",
    )
    parser.add_argument(
        "--precision", choices=PRECISIONS, help="default: amp_bf16 on cuda, fp32 elsewhere"
    )
    parser.add_argument("--batch-size", type=int, default=256, help="images; default %(default)s")
    parser.add_argument(
        "--workers",
        type=int,
        default=min(8, os.cpu_count() or 1),
        help="processes that decode images; default %(default)s",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/evaluation"),
        metavar="DIR",
        help="default %(default)s",
    )
    arguments = parser.parse_args(argv)
    if arguments.precision is None:
        arguments.precision = "amp_bf16" if arguments.device.startswith("cuda") else "fp32"
    return arguments


def read_lines(path: Path, argument: str) -> list[str]:
    """A text file that the user named. Raises `CannotStart` if it is not there or empty."""
    try:
        content = lines(path)
    except (OSError, UnicodeDecodeError) as error:
        raise CannotStart(f"{argument} {path}: {error}") from error
    if not content:
        raise CannotStart(f"{argument} {path}: no such file, or an empty one")
    return content


def own_words(arguments: argparse.Namespace) -> tuple[list[str], dict[str, list[str]]]:
    """--templates, none if it is not given, and --classnames by data set."""
    templates = []
    if arguments.templates:
        for number, line in enumerate(read_lines(arguments.templates, "--templates"), start=1):
            if "{c}" not in line and "{}" not in line:
                raise CannotStart(f"--templates {arguments.templates}: no {{c}} in line {number}")
            templates.append(line.replace("{c}", "{}"))
    names = {}
    for entry in arguments.classnames:
        name, equals, path = entry.partition("=")
        if not equals:
            raise CannotStart(f"--classnames {entry}: should be NAME=FILE")
        names[name] = read_lines(Path(path), "--classnames")
    return templates, names


def choose(arguments: argparse.Namespace) -> dict[str, Open]:
    """The data sets that were asked for and are there. Raises `CannotStart` if there is none."""
    for root in arguments.data:
        if not root.is_dir():
            raise CannotStart(f"--data {root}: no such folder")
    superclasses = None
    if arguments.superclasses:
        superclasses = read_lines(arguments.superclasses, "--superclasses")
        if len(superclasses) != PAPER["imagenet1k"]:
            raise CannotStart(
                f"--superclasses {arguments.superclasses}: {len(superclasses)} lines, not 1000"
            )
    found = {**find(arguments.data, superclasses), "emoji": open_emoji}
    if arguments.suite:
        found = {n: o for n, o in found.items() if (n in PAPER) == (arguments.suite == "paper")}
    if not found:
        raise CannotStart("no data set of the paper's suite under --data (--help has their names)")
    return found


def opened(name: str, opener: Open, templates: list[str], names: dict[str, list[str]]) -> DataSet:
    """The data set, with the user's own templates and class names."""
    data = opener()
    for classes in data.classes.values():
        classes.templates = templates or classes.templates
    if name in names:
        if "" not in data.classes or len(names[name]) != len(data.classes[""].names):
            has = len(data.classes[""].names) if "" in data.classes else 0
            raise Unusable(f"--classnames has {len(names[name])} names for its {has} classes")
        data.classes[""].names = names[name]
    return data


def main(argv: Sequence[str]) -> None:
    """Finds, evaluates, writes `evaluation.json`, `table.md` and `picture.png`."""
    arguments = parse_arguments(argv)
    for name in ("batch_size", "workers"):
        if getattr(arguments, name) < (name == "batch_size"):
            raise CannotStart(f"--{name.replace('_', '-')}: {getattr(arguments, name)} is too few")
    try:
        device = torch.device(arguments.device)
        torch.empty(1, device=device)
        arguments.out.mkdir(parents=True, exist_ok=True)
    except (RuntimeError, AssertionError) as error:  # "not compiled with CUDA" is an assertion
        raise CannotStart(f"--device {arguments.device}: {str(error).splitlines()[0]}") from error
    except OSError as error:
        raise CannotStart(f"--out {arguments.out}: {error.strerror}") from error
    templates, names = own_words(arguments)
    checkpoints = find_checkpoints(arguments.checkpoint, arguments.model, arguments.pretrained)
    found = choose(arguments)
    for name in names:
        if name not in found:
            raise CannotStart(f"--classnames: no data set {name!r}; there are {', '.join(found)}")
    console = Console()
    result = report.start(
        arguments, shlex.join(["python", "-m", "reference_train", "evaluate", *argv])
    )
    skipped = result["skipped"]
    if arguments.suite != "rehearsal":
        skipped |= {name: "not under --data" for name in PAPER if name not in found}

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        sets: dict[str, DataSet] = {}
        for name, opener in found.items():
            try:
                sets[name] = opened(name, opener, templates, names)
                result["data_sets"][name] = report.describe(sets[name])
            except BROKEN as error:
                skipped[name] = reason(error)
        for checkpoint in checkpoints:
            clip = load(
                checkpoint, device, arguments.precision, arguments.batch_size, arguments.workers
            )
            result["checkpoints"].append(report.describe_checkpoint(clip))
            of_checkpoint = result["results"].setdefault(checkpoint.title, {})
            for name, data in list(sets.items()):
                start = time.perf_counter()
                try:
                    numbers = measured(clip, name, data, arguments.linear_probe, progress)
                except (Unusable, OSError, FloatingPointError) as error:
                    skipped[f"{name}, {checkpoint.title}"] = reason(error)
                    continue
                of_checkpoint[name] = {**numbers, "seconds": time.perf_counter() - start}
    if not any(result["results"].values()):
        reasons = "; ".join(f"{name}: {why}" for name, why in skipped.items())
        raise CannotStart(f"nothing could be evaluated: {reasons}")
    report.write(result, arguments.out, console)


def measured(
    clip: Clip, name: str, data: DataSet, linear_probe: bool, progress: Progress
) -> dict[str, Any]:
    """`measure` with a progress bar."""

    def encode(images: Images, what: str) -> Tensor:
        title = f"{clip.checkpoint.title}: {name}, {what}"
        task = progress.add_task(title, total=len(images))
        features = clip.encode_images(images, lambda n: progress.advance(task, n))
        progress.remove_task(task)
        return features

    return measure(clip, data, linear_probe, encode)


def reason(error: BaseException) -> str:
    """An error's message as one line, of its last line if a worker's traceback comes before."""
    text = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
    return text[:300]
