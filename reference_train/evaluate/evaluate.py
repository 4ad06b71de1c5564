"""`python -m reference_train evaluate`: measures checkpoints on datasets."""

import argparse
import os
import shlex
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from rich.console import Console

from cyclip_loss.open_clip_train import model_config

from ..command_line import Parser, RunFailed, UsageError, add_device, whole_number
from ..data.emoji import read_emoji
from ..demo.datasets import DATASETS, open_dataset
from ..files import locked
from . import report
from .checkpoints import RELEASED_MODEL, Checkpoint, describe_run, find_checkpoints, load
from .datasets import Dataset, Opener, find, open_emoji, open_folders
from .metrics import measure
from .paper import ZERO_SHOT_SETS

DESCRIPTION = """\
Evaluates checkpoints of OpenCLIP, or of the CyCLIP authors' code, and shows the paper's numbers
beside them. Nothing is downloaded except the weights of --pretrained or --model hf-hub:... If the
command is interrupted, the same command resumes with the datasets that are missing.
`python -m reference_train report DIR` makes the table and the figures again."""
EPILOG = """\
datasets of the demonstration    by their names in its table: --only "new concepts, new styles" …
datasets of --data DIR (DIR itself, or folders in it); the emoji are always there:
  clip-benchmark's WebDatasets   as they are on the Hugging Face hub: wds_vtab-cifar10,
                                 wds_vtab-cifar100, wds_imagenet1k, wds_imagenetv2,
                                 wds_imagenet_sketch, wds_imagenet-a, wds_imagenet-r,
                                 wds_flickr30k, or any other
  torchvision's CIFAR            cifar-10-batches-py, cifar-100-python
  icons                          as python -m reference_train.data.icons makes them
datasets of --imagefolder NAME=DIR:
  your own                       a folder of images for each class, in DIR or in DIR/test and
                                 DIR/train
  ImageNet's                     the same. NAME is imagenet1k, imagenetv2, imagenet-sketch,
                                 imagenet-a or imagenet-r, and the names of the folders are WordNet
                                 identifiers or class numbers
  the CyCLIP authors'            DIR is a folder of their code, with a labels.csv"""


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments, with their defaults. Raises `UsageError`."""
    parser = Parser("python -m reference_train evaluate", description=DESCRIPTION, epilog=EPILOG)
    add = parser.add_argument
    add("checkpoint", nargs="*", type=Path, metavar="CHECKPOINT", help="logs/NAME, or a file")
    add("--data", nargs="+", type=Path, default=[], metavar="DIR", help="folders of datasets")
    text = "a dataset of image folders, and the name to give it"
    add("--imagefolder", nargs="+", default=[], metavar="NAME=DIR", help=text)
    text = "datasets to evaluate; default: all except the demonstration's"
    add("--only", nargs="+", metavar="NAME", help=text)
    text = "OpenCLIP's name of the model; default: from the run's params.txt; use "
    add("--model", help=f"{text}{RELEASED_MODEL} for checkpoints of the CyCLIP authors")
    text = "a model configuration of OpenCLIP's, FILE.json, for --model FILE"
    add("--model-config", type=model_config, metavar="FILE.json", help=text)
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


def main(argv: Sequence[str]) -> None:
    """Finds checkpoints and datasets, evaluates them, and writes the table and the figures.

    Raises `UsageError` if nothing can be evaluated, and `RunFailed` at the end if a dataset or a
    checkpoint failed.
    """
    arguments = parse_arguments(argv)
    checkpoints = find_checkpoints(arguments.checkpoint, arguments.model, arguments.pretrained)
    command = shlex.join(["python", "-m", "reference_train", "evaluate", *argv])
    settings = {"precision": arguments.precision, "linear_probe": arguments.linear_probe}
    report.start(arguments.out, settings, command, arguments.device)  # raises an error before work
    absent, failed = dict[str, str](), dict[str, str]()
    with Console().status("Looking at the datasets"):
        datasets = open_all(arguments, absent, failed)
    with locked(arguments.out):
        result = report.start(arguments.out, settings, command, arguments.device)
        for name, data in datasets.items():
            described = report.describe(data)
            if result["data_sets"].setdefault(name, described) != described:
                result["data_sets"][name] = described
                for results in result["results"].values():
                    results.pop(name, None)  # of another dataset
        for checkpoint in checkpoints:
            forget_other_weights(result, checkpoint, arguments.out)
            done = result["results"].get(checkpoint.title, {})
            if missing := {name: data for name, data in datasets.items() if name not in done}:
                evaluate(result, checkpoint, missing, arguments, failed)
        if not any(result["results"].values()):
            raise UsageError(f"nothing to evaluate: {join_reasons(failed)}")
        result |= {"failed": failed, "absent": absent}
        report.write(result, arguments.out)
    if failed:
        raise RunFailed(f"not in the table: {join_reasons(failed)}")


def forget_other_weights(result: report.Result, checkpoint: Checkpoint, out: Path) -> None:
    """Removes the results of a checkpoint that has been trained on.

    Raises `UsageError` if there are results of another run with its title.
    """
    title, source = checkpoint.title, checkpoint.source
    stored = result["checkpoints"].get(title, source)
    if report.have_same_weights(stored, source):
        return
    earlier = Path(stored["path"])
    if checkpoint.path and earlier.resolve().parent != checkpoint.path.resolve().parent:
        what = f"--out {out}: has results of another {title}, {earlier}"
        raise UsageError(f"{what}: choose another --out")
    result["results"].pop(title, None)


def evaluate(
    result: report.Result,
    checkpoint: Checkpoint,
    datasets: dict[str, Dataset],
    arguments: argparse.Namespace,
    failed: dict[str, str],
) -> None:
    """Measures a checkpoint on datasets, and saves the result after each.

    Adds to `failed` what cannot be measured, and why.
    """
    title = checkpoint.title
    try:
        clip = load(
            checkpoint,
            arguments.device,
            precision=arguments.precision,
            batch_size=arguments.batch_size,
            workers=arguments.workers,
        )
    except UsageError as error:
        failed[title] = str(error)
        return
    run = describe_run(title, checkpoint.parameters)
    result["checkpoints"][title] = {**checkpoint.source, **run, "epoch": clip.epoch}
    for name, data in datasets.items():
        clip.progress, began = f"{title}: {name}", time.perf_counter()
        try:
            has_captions = data.captions is not None
            measured = measure(clip, data, arguments.linear_probe, keep_similarities=has_captions)
        except Exception as error:  # any error: go on with the next dataset
            failed[f"{name}, {title}"] = last_line(error)
            continue
        measured["seconds"] = time.perf_counter() - began
        result["results"].setdefault(title, {})[name] = measured
        report.save(result, arguments.out)


def open_all(
    arguments: argparse.Namespace, absent: dict[str, str], failed: dict[str, str]
) -> dict[str, Dataset]:
    """Opens the datasets that the command asks for.

    Adds to `absent` which datasets do not exist, and to `failed` which cannot be read, with the
    reasons. Raises `UsageError` if no dataset can be opened.
    """
    found = find_all(arguments, absent)
    if arguments.only is None:
        absent |= {name: "not under --data" for name in ZERO_SHOT_SETS if name not in found}
    elif missing := [name for name in arguments.only if name not in found]:
        message = f"--only: no dataset {' or '.join(missing)}; there are {', '.join(found)}"
        raise UsageError(f"{message}; {join_reasons(absent)}" if absent else message)
    datasets: dict[str, Dataset] = {}
    for name in arguments.only or [name for name in found if name not in DATASETS]:
        try:
            datasets[name] = found[name]()
        except Exception as error:  # any error that a damaged dataset causes
            failed[name] = last_line(error)
    if not datasets:
        raise UsageError(f"nothing to evaluate: {join_reasons(failed)}")
    return datasets


def find_all(arguments: argparse.Namespace, absent: dict[str, str]) -> dict[str, Opener]:
    """The openers of all datasets: those of --data and --imagefolder, and the emoji.

    Adds to `absent` what is not used. Raises `UsageError` for folders that do not exist.
    """
    image_folders: dict[str, Path] = {}
    for text in arguments.imagefolder:
        name, _, path = text.partition("=")
        if not name or not path:
            raise UsageError(f"--imagefolder: must be NAME=DIR, not {text}")
        if name in image_folders:
            raise UsageError(f"--imagefolder: {name} is given twice")
        image_folders[name] = Path(path)
    for folder in (*arguments.data, *image_folders.values()):
        if not folder.is_dir():
            raise UsageError(f"--data, --imagefolder NAME=DIR: no such folder: {folder}")
    recognised, unused = find(arguments.data)
    found: dict[str, Opener] = {**recognised, "emoji": open_emoji}
    found |= {name: partial(open_demonstration, name) for name in DATASETS}
    for name, folder in image_folders.items():
        if name in found:
            raise UsageError(f"--imagefolder: {name} is the name of another dataset")
        found[name] = partial(open_folders, folder, name)
    if unused:
        shown = ", ".join(map(str, unused[:10])) + (", …" if len(unused) > 10 else "")
        why = "not recognised, or the name of another dataset"
        absent[f"{len(unused)} files and folders under --data"] = f"{why}: {shown}"
    return found


def open_demonstration(name: str) -> Dataset:
    """A dataset of the demonstration, with the emoji of the repository."""
    return open_dataset(read_emoji(), name)


def join_reasons(reasons: dict[str, str]) -> str:
    """Reasons in one line."""
    return "; ".join(f"{name}: {why}" for name, why in reasons.items())


def last_line(error: BaseException) -> str:
    """The last line of an error's message. The lines before it may be a worker's traceback."""
    return ([type(error).__name__, *str(error).strip().splitlines()][-1])[:300]
