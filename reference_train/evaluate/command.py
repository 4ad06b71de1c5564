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
from . import report
from .checkpoints import find_checkpoints, load
from .datasets import DataSet
from .measure import measure
from .paper import SPLITS
from .suites import Open, find, lines, open_emoji, open_folders
from .table import Result

DESCRIPTION = """\
Evaluates OpenCLIP checkpoints, next to the paper's numbers. Nothing is downloaded, but for weights
that --pretrained names. Interrupted, the same command resumes with the data sets that are missing.
`python -m reference_train report DIR` makes table and picture again."""
EPILOG = """\
data sets of --data (DIR itself, or folders in it), besides the emoji that ship:
  clip-benchmark's WebDatasets   as they are on the hub: wds_vtab-cifar10, wds_vtab-cifar100,
                                 wds_imagenet1k, wds_imagenetv2, wds_imagenet_sketch,
                                 wds_imagenet-a, wds_imagenet-r, wds_flickr30k, or any other
  torchvision's CIFAR            cifar-10-batches-py, cifar-100-python
  ImageNet as folders            imagenet1k/val and imagenet1k/train, imagenetv2, imagenet-sketch,
                                 imagenet-a, imagenet-r: in them a folder of images for each
                                 WordNet identifier (or number, as imagenetv2 comes)
  icons                          as python -m reference_train.data.icons makes them"""


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments, with their defaults. Raises `CannotStart`."""
    parser = Parser(
        prog="python -m reference_train evaluate",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=DESCRIPTION,
        epilog=EPILOG,
    )
    add = parser.add_argument
    words = "logs/NAME (its best.pt, else its newest epoch) or a file; several: several columns"
    add("checkpoint", nargs="*", type=Path, metavar="CHECKPOINT", help=words)
    add("--data", nargs="+", type=folder, default=[], metavar="DIR", help="where data sets are")
    words = "your own data set: in DIR (or DIR/test, DIR/train) a folder of images for each class"
    add("--imagefolder", nargs="+", type=named_folder, default=[], metavar="NAME=DIR", help=words)
    add("--only", nargs="+", metavar="NAME", help="data sets to evaluate; default: all there are")
    add("--model", help="OpenCLIP's name of the model; default: as the run's params.txt says")
    add("--pretrained", metavar="TAG", help="OpenCLIP's own weights of --model, one more column")
    words = "fit one as the paper's authors do, on the features of the whole train split"
    add("--linear-probe", action="store_true", help=words)
    words = "prompts, {c} for the class; default: the paper's 80, or the data set's own"
    add("--templates", type=templates, metavar="FILE", help=words)
    words = "of ImageNet's classes in its order, 1,000 lines (the paper's 67 do not ship)"
    add("--superclasses", type=superclasses, metavar="FILE", help=words)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", type=device, default=default, help="default: cuda if there is one, else cpu")
    words = "default: amp_bf16 on cuda, fp32 elsewhere"
    add("--precision", choices=["fp32", "amp", "amp_bf16"], help=words)
    add("--batch-size", type=whole_number(1), default=256, metavar="N", help="default %(default)s")
    workers, words = min(8, os.cpu_count() or 1), "processes that decode images; here %(default)s"
    add("--workers", type=whole_number(0), default=workers, metavar="N", help=words)
    out = Path("runs/evaluation")
    add("--out", type=Path, default=out, metavar="DIR", help="default %(default)s")
    arguments = parser.parse_args(argv)
    if arguments.precision is None:
        arguments.precision = "amp_bf16" if arguments.device.type == "cuda" else "fp32"
    return arguments


def folder(text: str) -> Path:
    """An argument's type: a folder that is there."""
    if not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"no such folder: {text}")
    return Path(text)


def named_folder(text: str) -> tuple[str, Path]:
    """An argument's type: NAME=DIR."""
    name, equals, path = text.partition("=")
    if not (name and equals):
        raise argparse.ArgumentTypeError(f"should be NAME=DIR, not {text}")
    return name, folder(path)


def some_lines(path: str) -> list[str]:
    """The lines of a text file that was named."""
    try:
        content = lines(Path(path))
    except (OSError, UnicodeDecodeError) as error:
        raise argparse.ArgumentTypeError(f"{path}: {error}") from error
    if not content:
        raise argparse.ArgumentTypeError(f"no such file, or an empty one: {path}")
    return content


def templates(path: str) -> list[str]:
    """An argument's type: prompts, with {} for the class."""
    content = [line.replace("{c}", "{}") for line in some_lines(path)]
    for line in content:
        if "{}" not in line:
            raise argparse.ArgumentTypeError(f"{path}: no {{c}} in {line!r}")
    return content


def superclasses(path: str) -> list[str]:
    """An argument's type: one for each of ImageNet's classes."""
    content = some_lines(path)
    if len(content) != SPLITS["imagenet1k"].classes:
        raise argparse.ArgumentTypeError(f"{path}: {len(content)} lines, not 1000")
    return content


def main(argv: Sequence[str]) -> None:
    """Finds, evaluates, writes. Raises `CannotStart` if nothing can be evaluated.

    Raises `Stopped` at the end if a data set or a checkpoint failed.
    """
    arguments, console = parse_arguments(argv), Console()
    checkpoints = find_checkpoints(arguments.checkpoint, arguments.model, arguments.pretrained)
    settings = {
        name: getattr(arguments, name)
        for name in ("precision", "linear_probe", "templates", "superclasses")
    }
    command = shlex.join(["python", "-m", "reference_train", "evaluate", *argv])
    result = report.start(arguments.out, settings, command, arguments.device)
    failed = result["failed"]
    with console.status("Looking at the data sets"):
        sets = open_all(arguments, result)
    for name, data in sets.items():
        described = report.describe(name, data)
        if result["data_sets"].setdefault(name, described) != described:  # other images since
            result["data_sets"][name] = described
            for results in result["results"].values():
                results.pop(name, None)

    def progress(of: str, batches: Iterable[Any], what: str) -> Iterable[Any]:
        return track(batches, f"{of}, {what}", console=console, transient=True)

    for checkpoint in checkpoints:
        title = checkpoint.title
        source = {"model": checkpoint.model, "path": str(checkpoint.path or checkpoint.tag)}
        if checkpoint.path:
            source["written"] = str(checkpoint.path.stat().st_mtime_ns)
        before = result["checkpoints"].get(title, source)
        if source != {key: before.get(key) for key in source}:
            result["results"].pop(title)  # of other weights
        numbers = result["results"].setdefault(title, {})
        missing = [name for name in sets if name not in numbers]
        if not missing:
            continue
        feeding = {
            name: getattr(arguments, name) for name in ("precision", "batch_size", "workers")
        }
        try:
            clip = load(checkpoint, arguments.device, **feeding)
        except CannotStart as error:
            failed[title] = str(error)
            continue
        result["checkpoints"][title] = {**source, "epoch": clip.epoch}
        for name in missing:
            clip.track = partial(progress, f"{title}: {name}")
            began = time.perf_counter()
            try:
                measured = measure(clip, sets[name], arguments.linear_probe)
            except Exception as error:  # whatever it is: the others may have taken hours
                failed[f"{name}, {title}"] = reason(error)
            else:
                numbers[name] = {**measured, "seconds": time.perf_counter() - began}
                report.save(result, arguments.out)
    if not any(result["results"].values()):
        raise CannotStart(f"nothing to evaluate: {listed(failed)}")
    report.write(result, arguments.out, console)
    if failed:
        raise Stopped(f"not in the table: {listed(failed)}")


def open_all(arguments: argparse.Namespace, result: Result) -> dict[str, DataSet]:
    """The data sets that were asked for and are there. Raises `CannotStart` if there is none.

    result: gets the reasons of those that failed, and of those that are not there.
    """
    known, unknown = find(arguments.data, arguments.superclasses)
    found: dict[str, Open] = {**known, "emoji": open_emoji}
    for name, path in arguments.imagefolder:
        if name in found or name in SPLITS:
            raise CannotStart(f"--imagefolder: {name} is the name of another data set")
        found[name] = partial(open_folders, path, name, None)
    absent, failed = result["absent"], result["failed"]
    if unknown:
        names = ", ".join(str(path) for path in unknown[:10]) + ", …" * (len(unknown) > 10)
        absent["under --data"] = f"no data set is recognised in {len(unknown)}: {names}"
    if arguments.only is None:
        absent |= {name: "not under --data" for name in SPLITS if name not in found}
    elif missing := [name for name in arguments.only if name not in found]:
        there = f"no data set {' or '.join(missing)}; there are {', '.join(found)}"
        raise CannotStart(f"--only: {there}{'; ' * bool(absent)}{listed(absent)}")
    sets: dict[str, DataSet] = {}
    for name, opener in found.items():
        if arguments.only is not None and name not in arguments.only:
            continue
        try:
            sets[name] = opener()
        except Exception as error:  # whatever a data set that is not as it should be raises
            failed[name] = reason(error)
            continue
        for classes in sets[name].classes.values():
            classes.templates = arguments.templates or classes.templates
        if sets[name].train_lacks:
            failed[f"{name}, train split"] = sets[name].train_lacks
    if not sets:
        raise CannotStart(f"nothing to evaluate: {listed(failed)}")
    return sets


def listed(reasons: dict[str, str]) -> str:
    """Reasons in one line."""
    return "; ".join(f"{name}: {why}" for name, why in reasons.items())


def reason(error: BaseException) -> str:
    """An error as one line: its last, as a worker's traceback comes before."""
    return ([type(error).__name__, *str(error).strip().splitlines()][-1])[:300]
