"""The demonstration: `python -m reference_train`, with `--help` for its options."""

import argparse
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..command_line import Parser, UsageError, add_device, at_least
from ..data.emoji import EMOJI_FOLDER, read_emoji
from ..data.samples import fingerprint
from ..evaluate import records, report
from ..evaluate.checkpoints import default_precision
from ..evaluate.demonstration import DATASETS, open_dataset, training_pairs
from ..evaluate.metrics import feature_means, measure
from ..files import locked, write_text
from ..losses import PENALTY_WEIGHT, WITH_CLIPS_TERM
from ..runs import PARAMETERS, code_version
from .batches import EmojiBatches
from .model import MODEL, TINY, build_model
from .train import REFERENCE_BATCH_SIZE, build_loss, compute_loss, train

PRESETS = {
    "short": {"steps": 620, "batch_size": 256, "lr": 3e-3, "logit_scale": 33.0},
    "long": {"steps": 1500, "batch_size": 256, "lr": 2e-3, "logit_scale": 14.3},
}
# Settings that an option changes -> the option's word in the names of runs.
OPTIONS = {
    "steps": "steps",
    "batch_size": "batch",
    "penalty_weight": "lambda",
    "lambda_progress": "progress",
}
DESCRIPTION = """\
Trains small CLIP models on the emoji that ship with the repository, and shows what the cyclic
penalties change: CLIP next to CyCLIP. Without arguments it takes about 10 minutes on two CPU
cores. If it is interrupted, the same command repeats only the run that was not finished."""
EPILOG = """\
other commands, each with its own --help:
  python -m reference_train pretrain   OpenCLIP's trainer with CyCLIPLoss
  python -m reference_train evaluate   evaluates any OpenCLIP checkpoint
  python -m reference_train compare    which loss for your pairs, on a pretrained image tower
  python -m reference_train report     makes the table of evaluations again"""


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments, with their defaults. Raises `UsageError`."""
    parser = Parser("python -m reference_train", description=DESCRIPTION, epilog=EPILOG)
    add = parser.add_argument
    add(
        "--loss",
        nargs="+",
        choices=WITH_CLIPS_TERM,
        default=["clip", "cyclip"],
        help="default: clip cyclip",
    )
    add("--seeds", type=at_least(1), default=1, metavar="N", help="runs of each loss")
    text = "short (default): 620 steps, lr 3e-3, logit scale 33; long: 1,500, 2e-3 and 14.3"
    add("--preset", choices=PRESETS, default="short", help=text)
    add("--steps", type=at_least(1), metavar="N", help="training steps; default: the preset's")
    text = "concepts in a batch; default: the preset's, 256"
    add("--batch-size", type=at_least(1), metavar="N", help=text)
    text = f"λ of each penalty that the loss has; default: {PENALTY_WEIGHT}"
    add("--lambda", type=at_least(0, float), metavar="W", dest="penalty_weight", help=text)
    text = "multiply the penalties by the progress of CLIP's loss"
    add("--lambda-progress", action="store_true", default=None, help=text)
    add_device(parser)
    add("--out", type=Path, metavar="DIR", help="default: runs/PRESET")
    arguments = parser.parse_args(argv)
    arguments.out = arguments.out or Path("runs") / arguments.preset
    return arguments


def main(argv: Sequence[str]) -> None:
    """Trains what is not trained yet, evaluates it, and writes the table."""
    arguments = parse_arguments(argv)
    with locked(arguments.out):
        train_missing(arguments, argv)


def train_missing(arguments: argparse.Namespace, argv: Sequence[str]) -> None:
    """As `main`, in a folder that no other process writes to."""
    out = arguments.out
    given = {name: value for name in OPTIONS if (value := getattr(arguments, name)) is not None}
    series = "".join(f"{value:g}-{OPTIONS[name]}-" for name, value in given.items())
    settings: dict[str, Any] = {
        **PRESETS[arguments.preset],
        "penalty_weight": PENALTY_WEIGHT,
        "reference_batch_size": REFERENCE_BATCH_SIZE,
        "lambda_progress": False,
        **given,
    }
    # `start` refuses other settings, so the runs in a folder differ in loss and seed only.
    shards = [str(path) for path in sorted(EMOJI_FOLDER.glob("*.tar.xz"))]
    compared = {
        **settings,
        "data": fingerprint(shards),
        "precision": default_precision(arguments.device),
    }
    result = records.start(out, compared, argv)
    emoji = read_emoji()
    if settings["batch_size"] > (concepts := len(emoji.in_split("train"))):
        raise UsageError(f"--batch-size {settings['batch_size']}: there are {concepts} concepts")
    datasets = {name: open_dataset(emoji, name) for name in DATASETS}
    result["data_sets"] = {name: records.describe(data) for name, data in datasets.items()}
    records.save(result, out)
    # All losses of a seed come before the next seed: an interrupted command has runs to compare.
    seeds, losses = range(arguments.seeds), dict.fromkeys(arguments.loss)
    runs = [(loss, seed) for seed in seeds for loss in losses]
    for count, (loss, seed) in enumerate(runs, start=1):
        name = f"{series}{loss}-{seed}"
        if name in result["results"]:
            print(f"{name}: finished before")
            continue
        print(f"run {count} of {len(runs)}: {name}", flush=True)
        records.note_environment(result, arguments.device)
        run = {"name": name, "loss": loss, "seed": seed, "commit": code_version()}
        config = argparse.Namespace(**run, **settings)
        config.penalty_weight *= WITH_CLIPS_TERM[loss].inmodal or WITH_CLIPS_TERM[loss].crossmodal
        torch.manual_seed(seed)
        clip = build_model(config.logit_scale, arguments.device)
        batches = EmojiBatches(emoji, clip.tokenizer, config.batch_size, seed)
        (out / name).mkdir(exist_ok=True)
        describe_model(config, out / name)
        loss_fn = build_loss(config, WITH_CLIPS_TERM[loss])
        compute = partial(compute_loss, config, clip, batches, loss_fn)
        seconds = train(config, clip.model, compute, out / name)
        result["checkpoints"][name] = {**vars(config), "seconds": seconds}
        clip.means = feature_means(clip, *training_pairs(emoji))
        result["results"][name] = {
            dataset: measure(clip, data) for dataset, data in datasets.items()
        }
        records.save(result, out)
    report.write(result, out)


def describe_model(config: argparse.Namespace, folder: Path) -> None:
    """Writes what OpenCLIP and `evaluate` have to know of the checkpoint beside it."""
    write_text(json.dumps(TINY, indent=1), folder / f"{MODEL}.json")
    settings = {"model": MODEL, **vars(config)}
    lines = (f"{name}: {value}\n" for name, value in settings.items())
    write_text("".join(lines), folder / PARAMETERS)
