"""`python -m reference_train evaluate`: measures checkpoints on datasets."""

import argparse
import os
import shlex
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from webdataset.shardlists import expand_urls

from ..command_line import Parser, RunFailed, UsageError, add_device, at_least, say
from ..data.emoji import read_emoji
from ..files import locked
from . import demonstration, records, report
from .checkpoints import (
    DEMONSTRATION,
    RELEASED_MODEL,
    Checkpoint,
    default_precision,
    find_checkpoints,
    load,
)
from .datasets import Dataset, Images, TarImages, Unusable, find, open_emoji, open_folders
from .demonstration import DATASETS, open_dataset
from .metrics import feature_means, measure

SHARDS = 8  # whose pairs the means of features are of; shards may be sorted
DESCRIPTION = """\
Evaluates checkpoints of OpenCLIP, or of the CyCLIP authors' code, and shows the paper's numbers
beside them. Nothing is downloaded except the weights of --pretrained or --model hf-hub:... If the
command is interrupted, the same command resumes with the datasets that are missing.
`python -m reference_train report DIR` makes the table again."""
EPILOG = """\
datasets of the demonstration    by their names in its table: --only "new concepts, new styles" …
datasets of --data DIR (DIR itself, or folders in it); the emoji are always there:
  clip-benchmark's WebDatasets   as they are on the Hugging Face hub: wds_vtab-cifar10,
                                 wds_vtab-cifar100, wds_imagenet1k, wds_imagenetv2,
                                 wds_imagenet_sketch, wds_imagenet-a, wds_imagenet-r,
                                 wds_flickr30k, or any other
datasets of --imagefolder NAME=DIR:
  your own                       a folder of images for each class, in DIR or in DIR/test and
                                 DIR/train
  ImageNet's                     the same. NAME is imagenet1k, imagenetv2, imagenet-sketch,
                                 imagenet-a or imagenet-r, and the names of the folders are WordNet
                                 identifiers or class numbers"""


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments, with their defaults. Raises `UsageError`."""
    parser = Parser("python -m reference_train evaluate", description=DESCRIPTION, epilog=EPILOG)
    add = parser.add_argument
    add("checkpoint", nargs="*", type=Path, metavar="CHECKPOINT", help="logs/NAME, or a file")
    add("--data", nargs="+", type=Path, default=[], metavar="DIR", help="folders of datasets")
    text = "a dataset of image folders, and the name to give it"
    add("--imagefolder", nargs="+", type=named_folder, default=[], metavar="NAME=DIR", help=text)
    text = "datasets to evaluate; default: all except the demonstration's"
    add("--only", nargs="+", metavar="NAME", help=text)
    text = "OpenCLIP's name of the model; default: from the run's params.txt; use "
    add("--model", help=f"{text}{RELEASED_MODEL} for checkpoints of the CyCLIP authors")
    text = "also evaluate OpenCLIP's own weights TAG of --model"
    add("--pretrained", metavar="TAG", help=text)
    text = "also fit a linear probe on the train split, with the authors' recipe"
    add("--linear-probe", action="store_true", help=text)
    add_device(parser)
    add("--precision", choices=["fp32", "amp", "amp_bf16"], help="default: amp_bf16 on cuda")
    add("--batch-size", type=at_least(1), default=256, metavar="N", help="default %(default)s")
    workers = min(8, os.cpu_count() or 1)
    text = "processes that decode images; default, on this machine: %(default)s"
    add("--workers", type=at_least(0), default=workers, metavar="N", help=text)
    add("--out", type=Path, default="runs/evaluation", metavar="DIR", help="default %(default)s")
    arguments = parser.parse_args(argv)
    arguments.precision = arguments.precision or default_precision(arguments.device)
    return arguments


def named_folder(text: str) -> tuple[str, Path]:
    """The type of an argument that is NAME=DIR."""
    name, _, path = text.partition("=")
    if not name or not path:
        raise argparse.ArgumentTypeError(f"must be NAME=DIR, not {text}")
    return name, Path(path)


def main(argv: Sequence[str]) -> None:
    """Finds checkpoints and datasets, evaluates them, and writes the table.

    Raises `UsageError` if nothing can be evaluated, and `RunFailed` at the end if a dataset or a
    checkpoint failed.
    """
    arguments = parse_arguments(argv)
    checkpoints = find_checkpoints(arguments.checkpoint, arguments.model, arguments.pretrained)
    with locked(arguments.out):
        settings = {"precision": arguments.precision, "linear_probe": arguments.linear_probe}
        result = records.start(arguments.out, settings, ["evaluate", *argv])
        failed = result["failed"] = dict[str, str]()
        datasets = open_all(arguments, failed)
        for name, data in datasets.items():
            if result["data_sets"].get(name) != (described := records.describe(data)):
                result["data_sets"][name] = described
                for results in result["results"].values():
                    results.pop(name, None)  # of another dataset
        for checkpoint in checkpoints:
            title, source = checkpoint.title, checkpoint.source
            stored = result["checkpoints"].get(title, source)
            if not source.items() <= stored.items():
                say(f"{title}: measuring again: earlier results came from different weights")
                result["results"].pop(title, None)
            done = result["results"].get(title, {})
            if missing := {name: data for name, data in datasets.items() if name not in done}:
                evaluate(result, checkpoint, missing, arguments)
        if not any(result["results"].values()):
            raise UsageError(f"nothing to evaluate: {join_reasons(failed)}")
        records.save(result, arguments.out)
        report.write(result, arguments.out)
    if failed:
        raise RunFailed(f"not in the table: {join_reasons(failed)}")


def evaluate(
    result: records.Result,
    checkpoint: Checkpoint,
    datasets: dict[str, Dataset],
    arguments: argparse.Namespace,
) -> None:
    """Measures a checkpoint on datasets, and saves the result after each.

    Adds to `result["failed"]` what cannot be measured, and why.
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
        result["failed"][title] = str(error)
        return
    records.note_environment(result, arguments.device)
    result["checkpoints"][title] = {
        **checkpoint.source,
        "path": str(checkpoint.weights),
        # Of the run; None if they are not known.
        **{name: checkpoint.parameters.get(name) for name in ("seed", "commit")},
    }
    clip.means = feature_means(clip, *training_pairs(checkpoint))
    for name, data in datasets.items():
        clip.progress = f"{title}: {name}"
        print(f"{clip.progress}, {len(data.images):,} images", flush=True)  # also to a log file
        try:
            measured = measure(clip, data, arguments.linear_probe)
        except Exception as error:  # any error: go on with the next dataset
            result["failed"][f"{name}, {title}"] = last_line(error)
            continue
        result["results"].setdefault(title, {})[name] = measured
        records.save(result, arguments.out)


def training_pairs(checkpoint: Checkpoint) -> tuple[Images, list[str]]:
    """Pairs that a run was trained on: those of up to `SHARDS` shards, first to last.

    Without pairs, if one of these shards is not there.
    """
    if Path(checkpoint.weights or "").name == DEMONSTRATION:
        return demonstration.training_pairs(read_emoji())
    shards = expand_urls(checkpoint.parameters.get("train_data") or "")
    step = max(1, -(-len(shards) // SHARDS))
    try:
        images = TarImages([Path(shard) for shard in shards[::step]])
        return images, images.texts("txt") or []
    except Unusable:
        return Images([]), []


def open_all(arguments: argparse.Namespace, failed: dict[str, str]) -> dict[str, Dataset]:
    """Opens the datasets that the command asks for.

    Adds to `failed` which cannot be read, and why. Raises `UsageError` if a folder is missing, or
    two datasets have the same name.
    """
    for path in (*arguments.data, *(path for _, path in arguments.imagefolder)):
        if not path.is_dir():
            raise UsageError(f"no such folder: {path}")
    found = {**find(arguments.data), "emoji": open_emoji}
    found |= {name: partial(open_demonstration, name) for name in DATASETS}
    for name, path in arguments.imagefolder:
        if name in found:
            raise UsageError(f"--imagefolder: {name} is the name of another dataset")
        found[name] = partial(open_folders, path, name)
    if missing := [name for name in arguments.only or [] if name not in found]:
        there_are = ", ".join(map(shlex.quote, found))  # some names have commas
        raise UsageError(f"--only: no dataset {' or '.join(missing)}; there are {there_are}")
    datasets: dict[str, Dataset] = {}
    for name in arguments.only or [name for name in found if name not in DATASETS]:
        try:
            datasets[name] = found[name]()
        except Exception as error:  # any error that a damaged dataset causes
            failed[name] = last_line(error)
    return datasets


def open_demonstration(name: str) -> Dataset:
    """A dataset of the demonstration, with the emoji of the repository."""
    return open_dataset(read_emoji(), name)


def join_reasons(reasons: dict[str, str]) -> str:
    """Reasons in one line."""
    return "; ".join(f"{name}: {why}" for name, why in reasons.items())


def last_line(error: BaseException) -> str:
    """The last line of an error's message. The lines before it may be a worker's traceback."""
    return [type(error).__name__, *str(error).strip().splitlines()][-1][:300]
