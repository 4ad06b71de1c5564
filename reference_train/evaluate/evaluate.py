"""The command line: `python -m reference_train evaluate --help`."""

import argparse
import os
import shlex
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from rich.console import Console

from ..command_line import CannotStart, Parser, Stopped, add_device, whole_number
from ..files import locked
from . import report
from .checkpoints import find_checkpoints, load
from .datasets import SPLITS, DataSet, Open, find, open_emoji, open_folders
from .measure import measure
from .table import Result

DESCRIPTION = """\
Evaluates OpenCLIP checkpoints, next to the paper's numbers. Nothing is downloaded, but for weights
that --pretrained names. Interrupted, the same command resumes with the data sets that are missing.
`python -m reference_train report DIR` makes table and pictures again."""
EPILOG = """\
data sets of --data (DIR itself, or folders in it), besides the emoji that ship:
  clip-benchmark's WebDatasets   as they are on the hub: wds_vtab-cifar10, wds_vtab-cifar100,
                                 wds_imagenet1k, wds_imagenetv2, wds_imagenet_sketch,
                                 wds_imagenet-a, wds_imagenet-r, wds_flickr30k, or any other
  torchvision's CIFAR            cifar-10-batches-py, cifar-100-python
  icons                          as python -m reference_train.data.icons makes them
with --imagefolder: ImageNet as a folder for each WordNet identifier (or number, as imagenetv2
comes), called imagenet1k, imagenetv2, imagenet-sketch, imagenet-a or imagenet-r"""


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments, with their defaults. Raises `CannotStart`."""
    parser = Parser("python -m reference_train evaluate", description=DESCRIPTION, epilog=EPILOG)
    add = parser.add_argument
    add("checkpoint", nargs="*", type=Path, metavar="CHECKPOINT", help="logs/NAME, or a file")
    add("--data", nargs="+", type=Path, default=[], metavar="DIR", help="where data sets are")
    words = "your own data set: a folder of images for each class, in DIR or DIR/test, DIR/train"
    add("--imagefolder", nargs="+", default=[], metavar="NAME=DIR", help=words)
    add("--only", nargs="+", metavar="NAME", help="data sets to evaluate; default: all there are")
    add("--model", help="OpenCLIP's name of the model; default: as the run's params.txt says")
    add("--pretrained", metavar="TAG", help="OpenCLIP's own weights of --model, one more column")
    add("--linear-probe", action="store_true", help="fit one, as the paper's authors do")
    add_device(parser)
    add("--precision", choices=["fp32", "amp", "amp_bf16"], help="default: amp_bf16 on cuda")
    add("--batch-size", type=whole_number(1), default=256, metavar="N", help="default %(default)s")
    workers, words = min(8, os.cpu_count() or 1), "processes that decode images; here %(default)s"
    add("--workers", type=whole_number(0), default=workers, metavar="N", help=words)
    add("--out", type=Path, default="runs/evaluation", metavar="DIR", help="default %(default)s")
    arguments = parser.parse_args(argv)
    if arguments.precision is None:
        arguments.precision = "amp_bf16" if arguments.device.type == "cuda" else "fp32"
    return arguments


def main(argv: Sequence[str]) -> None:
    """Finds, evaluates, writes. Raises `CannotStart` if nothing can be evaluated.

    Raises `Stopped` at the end if a data set or a checkpoint failed.
    """
    arguments = parse_arguments(argv)
    given = vars(arguments)
    checkpoints = find_checkpoints(arguments.checkpoint, arguments.model, arguments.pretrained)
    settings = {n: given[n] for n in ("precision", "linear_probe")}
    feeding = {n: given[n] for n in ("precision", "batch_size", "workers")}
    command = shlex.join(["python", "-m", "reference_train", "evaluate", *argv])
    out, absent, failed = arguments.out, dict[str, str](), dict[str, str]()
    report.start(out, settings, command, arguments.device)  # refuses other settings
    with Console().status("Looking at the data sets"):
        sets = open_all(arguments, absent, failed)
    described = {name: report.describe(name, data) for name, data in sets.items()}

    def evaluation() -> Result:
        """What --out holds by now, less the results of other images or weights."""
        result = report.start(out, settings, command, arguments.device)
        for name, data in described.items():
            if result["data_sets"].setdefault(name, data) != data:
                result["data_sets"][name] = data
                for results in result["results"].values():
                    results.pop(name, None)
        for checkpoint in checkpoints:
            before = result["checkpoints"].get(checkpoint.title, checkpoint.source)
            if not before.items() >= checkpoint.source.items():
                result["results"].pop(checkpoint.title, None)
        return result

    for checkpoint in checkpoints:
        title = checkpoint.title
        missing = [n for n in sets if n not in evaluation()["results"].get(title, {})]
        if not missing:
            continue
        try:
            clip = load(checkpoint, arguments.device, **feeding)
        except CannotStart as error:
            failed[title] = str(error)
            continue
        for name in missing:
            clip.at_work, began = f"{title}: {name}", time.perf_counter()
            try:
                has_pairs = sets[name].captions is not None
                measured = measure(clip, sets[name], arguments.linear_probe, has_pairs)
            except Exception as error:  # whatever it is: the others may have taken hours
                failed[f"{name}, {title}"] = reason(error)
                continue
            measured["seconds"] = time.perf_counter() - began
            weights = {**checkpoint.source, "seed": checkpoint.seed, "epoch": clip.epoch}
            with locked(out, wait=True):  # another process may write there too
                result = evaluation()
                result["checkpoints"][title] = weights
                result["results"].setdefault(title, {})[name] = measured
                report.save(result, out)
    if not any(evaluation()["results"].values()):
        raise CannotStart(f"nothing to evaluate: {listed(failed)}")
    with locked(out, wait=True):
        result = evaluation()
        tried = {*sets, *(checkpoint.title for checkpoint in checkpoints), "train split"}
        old = {what: why for what, why in result["failed"].items() if {*what.split(", ")} - tried}
        result["failed"] = {**old, **failed}
        result["absent"] = {n: why for n, why in absent.items() if n not in result["data_sets"]}
        report.write(result, out)
    if failed:
        raise Stopped(f"not in the table: {listed(failed)}")


def open_all(
    arguments: argparse.Namespace, absent: dict[str, str], failed: dict[str, str]
) -> dict[str, DataSet]:
    """The data sets that were asked for and are there. Raises `CannotStart` if there is none.

    absent, failed: get the reasons of those that are not there, and of those that failed.
    """
    named = [text.partition("=") for text in arguments.imagefolder]
    for folder in (*arguments.data, *(Path(path) for _, _, path in named)):
        if not folder.is_dir():
            raise CannotStart(f"--data, --imagefolder NAME=DIR: no such folder: {folder}")
    known, unknown = find(arguments.data)
    found: dict[str, Open] = {**known, "emoji": open_emoji}
    for name, _, path in named:
        if name in found:
            raise CannotStart(f"--imagefolder: {name} is the name of another data set")
        found[name] = partial(open_folders, Path(path), name)
    if unknown:
        names = ", ".join(str(path) for path in unknown[:10]) + ", …" * (len(unknown) > 10)
        absent["under --data"] = f"no data set is recognised in {len(unknown)}: {names}"
    if arguments.only is None:
        absent |= {name: "not under --data" for name in SPLITS if name not in found}
    elif missing := [name for name in arguments.only if name not in found]:
        there = f"no data set {' or '.join(missing)}; there are {', '.join(found)}"
        raise CannotStart(f"--only: {there}{'; ' * bool(absent)}{listed(absent)}")
    sets: dict[str, DataSet] = {}
    for name in arguments.only or found:
        try:
            data = sets[name] = found[name]()
        except Exception as error:  # whatever a data set that is not as it should be raises
            failed[name] = reason(error)
            continue
        if data.train_lacks:
            failed[f"{name}, train split"] = data.train_lacks
    if not sets:
        raise CannotStart(f"nothing to evaluate: {listed(failed)}")
    return sets


def listed(reasons: dict[str, str]) -> str:
    """Reasons in one line."""
    return "; ".join(f"{name}: {why}" for name, why in reasons.items())


def reason(error: BaseException) -> str:
    """An error as one line: its last, as a worker's traceback comes before."""
    return ([type(error).__name__, *str(error).strip().splitlines()][-1])[:300]
