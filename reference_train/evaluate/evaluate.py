"""`python -m reference_train evaluate`: measures checkpoints on data sets."""

import argparse
import os
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from ..command_line import CannotStart, Parser, Stopped, add_device, whole_number
from ..files import locked
from . import records, report
from .checkpoints import load
from .datasets import DataSet, Opener
from .emoji_set import open_emoji
from .find import find
from .folder_sets import open_folders
from .measure import measure
from .paper import ZERO_SHOT_SETS
from .records import Result
from .runs import RELEASED_MODEL, Checkpoint, find_checkpoints

DESCRIPTION = """\
Evaluates checkpoints of OpenCLIP, or of the CyCLIP authors' code, and shows the paper's numbers
beside them. Nothing is downloaded except the weights of --pretrained or --model hf-hub:... If the
command is interrupted, the same command resumes with the data sets that are missing.
`python -m reference_train report DIR` makes the table and the pictures again."""
EPILOG = """\
data sets of --data DIR (DIR itself, or folders in it); the emoji are always there:
  clip-benchmark's WebDatasets   as they are on the Hugging Face hub: wds_vtab-cifar10,
                                 wds_vtab-cifar100, wds_imagenet1k, wds_imagenetv2,
                                 wds_imagenet_sketch, wds_imagenet-a, wds_imagenet-r,
                                 wds_flickr30k, or any other
  torchvision's CIFAR            cifar-10-batches-py, cifar-100-python
  icons                          as python -m reference_train.data.icons makes them
data sets of --imagefolder NAME=DIR:
  your own                       a folder of images for each class, in DIR or in DIR/test and
                                 DIR/train
  ImageNet's                     the same. NAME is imagenet1k, imagenetv2, imagenet-sketch,
                                 imagenet-a or imagenet-r, and the names of the folders are WordNet
                                 identifiers or class numbers
  the CyCLIP authors'            DIR is a folder of their code, with a labels.csv"""


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments, with their defaults. Raises `CannotStart`."""
    parser = Parser("python -m reference_train evaluate", description=DESCRIPTION, epilog=EPILOG)
    add = parser.add_argument
    add("checkpoint", nargs="*", type=Path, metavar="CHECKPOINT", help="logs/NAME, or a file")
    add("--data", nargs="+", type=Path, default=[], metavar="DIR", help="folders of data sets")
    text = "a data set of image folders, and the name to give it"
    add("--imagefolder", nargs="+", default=[], metavar="NAME=DIR", help=text)
    add("--only", nargs="+", metavar="NAME", help="data sets to evaluate; default: all")
    text = "OpenCLIP's name of the model; default: from the run's params.txt; use "
    add("--model", help=f"{text}{RELEASED_MODEL} for checkpoints of the CyCLIP authors")
    text = "also evaluate OpenCLIP's own weights TAG of --model"
    add("--pretrained", metavar="TAG", help=text)
    text = "also fit a linear probe on the train split, with the authors' recipe"
    add("--linear-probe", action="store_true", help=text)
    add_device(parser)
    add("--precision", choices=["fp32", "amp", "amp_bf16"], help="default: amp_bf16 on cuda")
    add("--batch-size", type=whole_number(1), default=256, metavar="N", help="default %(default)s")
    workers = min(8, os.cpu_count() or 1)
    text = "processes that decode images; default, on this machine: %(default)s"
    add("--workers", type=whole_number(0), default=workers, metavar="N", help=text)
    add("--out", type=Path, default="runs/evaluation", metavar="DIR", help="default %(default)s")
    arguments = parser.parse_args(argv)
    if arguments.precision is None:
        arguments.precision = "amp_bf16" if arguments.device.type == "cuda" else "fp32"
    return arguments


@dataclass
class Evaluation:
    """The evaluation in --out. Several processes may add results to it at the same time."""

    arguments: argparse.Namespace
    command: str
    checkpoints: list[Checkpoint]
    described: dict[str, Any] = field(default_factory=dict)  # name -> `report.describe`

    def read(self) -> Result:
        """Reads the evaluation in --out, without results that are out of date.

        A result is out of date if its data set or its checkpoint has changed.

        Raises `CannotStart` if the evaluation was made with other settings, or has results of
        another run with the title of one of these checkpoints.
        """
        arguments = self.arguments
        settings = {"precision": arguments.precision, "linear_probe": arguments.linear_probe}
        result = records.start(arguments.out, settings, self.command, arguments.device)
        for name, data in self.described.items():
            if result["data_sets"].setdefault(name, data) != data:
                result["data_sets"][name] = data
                for results in result["results"].values():
                    results.pop(name, None)
        for checkpoint in self.checkpoints:
            title, source = checkpoint.title, checkpoint.source
            stored = result["checkpoints"].get(title, source)
            if records.have_same_weights(stored, source):
                continue
            # Older evaluations have no paths.
            earlier = Path(stored.get("path", source["path"]))
            if checkpoint.path and earlier.resolve().parent != checkpoint.path.resolve().parent:
                what = f"--out {arguments.out}: has results of another {title}, {earlier}"
                raise CannotStart(f"{what}: choose another --out")
            result["results"].pop(title, None)  # the run has been trained on
        return result

    def add(self, checkpoint: Checkpoint, epoch: int | None, name: str, measured: Any) -> None:
        """Adds the results of a checkpoint on one data set."""
        with locked(self.arguments.out, wait=True):
            result = self.read()
            about = {**checkpoint.source, **checkpoint.run, "epoch": epoch}
            result["checkpoints"][checkpoint.title] = about
            result["results"].setdefault(checkpoint.title, {})[name] = measured
            records.save(result, self.arguments.out)

    def finish(self, absent: dict[str, str], failed: dict[str, str]) -> None:
        """Writes the table and the pictures. Raises `CannotStart` if there are no results."""
        if not any(self.read()["results"].values()):
            raise CannotStart(f"nothing to evaluate: {join_reasons(failed)}")
        with locked(self.arguments.out, wait=True):
            result = self.read()
            titles = [checkpoint.title for checkpoint in self.checkpoints]
            # Failures of earlier commands stay, unless this command tried the same again. They are
            # called "DATA SET", "CHECKPOINT" or "DATA SET, CHECKPOINT".
            tried = {*self.described, *titles, "train split"}
            not_tried = {
                what: why for what, why in result["failed"].items() if {*what.split(", ")} - tried
            }
            result["failed"] = {**not_tried, **failed}
            result["absent"] = {
                name: why for name, why in absent.items() if name not in result["data_sets"]
            }
            report.write(result, self.arguments.out)


def main(argv: Sequence[str]) -> None:
    """Finds checkpoints and data sets, evaluates them, and writes the table and the pictures.

    Raises `CannotStart` if nothing can be evaluated, and `Stopped` at the end if a data set or a
    checkpoint failed.
    """
    arguments = parse_arguments(argv)
    checkpoints = find_checkpoints(arguments.checkpoint, arguments.model, arguments.pretrained)
    command = shlex.join(["python", "-m", "reference_train", "evaluate", *argv])
    evaluation = Evaluation(arguments, command, checkpoints)
    evaluation.read()  # raises an error for other settings before any work
    absent, failed = dict[str, str](), dict[str, str]()
    with Console().status("Looking at the data sets"):
        sets = open_all(arguments, absent, failed)
    evaluation.described = {name: report.describe(name, data) for name, data in sets.items()}
    done = evaluation.read()["results"]
    for checkpoint in checkpoints:
        missing = [name for name in sets if name not in done.get(checkpoint.title, {})]
        if missing:
            evaluate(evaluation, checkpoint, {name: sets[name] for name in missing}, failed)
    evaluation.finish(absent, failed)
    if failed:
        raise Stopped(f"not in the table: {join_reasons(failed)}")


def evaluate(
    evaluation: Evaluation,
    checkpoint: Checkpoint,
    sets: dict[str, DataSet],
    failed: dict[str, str],
) -> None:
    """Measures a checkpoint on data sets. Adds to `failed` what cannot be measured, and why."""
    arguments = evaluation.arguments
    try:
        clip = load(
            checkpoint,
            arguments.device,
            precision=arguments.precision,
            batch_size=arguments.batch_size,
            workers=arguments.workers,
        )
    except CannotStart as error:
        failed[checkpoint.title] = str(error)
        return
    for name, data in sets.items():
        clip.progress, began = f"{checkpoint.title}: {name}", time.perf_counter()
        try:
            has_captions = data.captions is not None
            measured = measure(clip, data, arguments.linear_probe, keep_similarities=has_captions)
        except Exception as error:  # any error: go on with the next data set
            failed[f"{name}, {checkpoint.title}"] = last_line(error)
            continue
        measured["seconds"] = time.perf_counter() - began
        evaluation.add(checkpoint, clip.epoch, name, measured)


def open_all(
    arguments: argparse.Namespace, absent: dict[str, str], failed: dict[str, str]
) -> dict[str, DataSet]:
    """Opens the data sets that the command asks for.

    Adds to `absent` which data sets do not exist, and to `failed` which cannot be read, with the
    reasons. Raises `CannotStart` if no data set can be opened.
    """
    found = find_all(arguments, absent)
    if arguments.only is None:
        absent |= {name: "not under --data" for name in ZERO_SHOT_SETS if name not in found}
    elif missing := [name for name in arguments.only if name not in found]:
        message = f"--only: no data set {' or '.join(missing)}; there are {', '.join(found)}"
        raise CannotStart(f"{message}; {join_reasons(absent)}" if absent else message)
    sets: dict[str, DataSet] = {}
    for name in arguments.only or found:
        try:
            data = sets[name] = found[name]()
        except Exception as error:  # any error that a damaged data set causes
            failed[name] = last_line(error)
            continue
        if data.train_error:
            failed[f"{name}, train split"] = data.train_error
    if not sets:
        raise CannotStart(f"nothing to evaluate: {join_reasons(failed)}")
    return sets


def find_all(arguments: argparse.Namespace, absent: dict[str, str]) -> dict[str, Opener]:
    """The openers of all data sets: those of --data and --imagefolder, and the emoji.

    Adds to `absent` what is not recognised. Raises `CannotStart` for folders that do not exist.
    """
    image_folders = [text.partition("=") for text in arguments.imagefolder]
    for name, _, path in image_folders:
        if not name or not path:
            raise CannotStart(f"--imagefolder: must be NAME=DIR, not {name or path}")
    for folder in (*arguments.data, *(Path(path) for _, _, path in image_folders)):
        if not folder.is_dir():
            raise CannotStart(f"--data, --imagefolder NAME=DIR: no such folder: {folder}")
    recognised, repeated, unrecognised = find(arguments.data)
    found: dict[str, Opener] = {**recognised, "emoji": open_emoji}
    for name, _, path in image_folders:
        if name in found:
            raise CannotStart(f"--imagefolder: {name} is the name of another data set")
        found[name] = partial(open_folders, Path(path), name)
    if unrecognised:
        absent["under --data"] = f"no data set is recognised in {count_and_names(unrecognised)}"
    if repeated:
        absent["again under --data"] = (
            f"another data set of the same name is used instead of {count_and_names(repeated)}"
        )
    return found


def count_and_names(paths: Sequence[Path]) -> str:
    """How many files and folders there are, and the first ten."""
    names = [str(path) for path in paths[:10]]
    names += ["…"] if len(paths) > 10 else []
    return f"{len(paths)} files and folders: {', '.join(names)}"


def join_reasons(reasons: dict[str, str]) -> str:
    """Reasons in one line."""
    return "; ".join(f"{name}: {why}" for name, why in reasons.items())


def last_line(error: BaseException) -> str:
    """The last line of an error's message. The lines before it may be a worker's traceback."""
    return ([type(error).__name__, *str(error).strip().splitlines()][-1])[:300]
