"""The command line of the demonstration. `python -m reference_train --help`."""

import argparse
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from ..command_line import Parser, add_device, number, whole_number
from ..data.emoji import fingerprint, read_emoji
from ..evaluate import report
from ..evaluate.measure import measure
from ..evaluate.pictures import draw_training
from ..losses import LOSSES
from .batches import EmojiBatches
from .model import build_model
from .questions import SITUATIONS, situation, validation_pairs
from .train import RunConfig, train

BATCH_SIZE = 256  # at which a weight is the paper's, as in results/
PRESETS = {
    "short": {"steps": 620, "lr": 3e-3, "logit_scale": 33.0},
    "long": {"steps": 1500, "lr": 2e-3, "logit_scale": 14.3},
}
DESCRIPTION = """\
Trains small CLIP models with CyCLIPLoss and shows what the cyclic penalties changed: CLIP next to
CyCLIP on the emoji that ship with the repository. With no argument about five minutes on two CPU
cores. Interrupted, the same command resumes; runs that are finished are not repeated."""
EPILOG = """\
other commands, each with its own --help:
  python -m reference_train pretrain   OpenCLIP's trainer with CyCLIPLoss
  python -m reference_train evaluate   any OpenCLIP checkpoint
  python -m reference_train report     table and picture of an evaluation again"""


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments, with the preset filled in. Raises `CannotStart`."""
    parser = Parser(prog="python -m reference_train", description=DESCRIPTION, epilog=EPILOG)
    add = parser.add_argument
    words = "of clip, cyclip, c-cyclip (cross-modal penalty alone), i-cyclip (in-modal one alone)"
    losses = ["clip", "cyclip"]
    add("--loss", nargs="+", choices=LOSSES, default=losses, metavar="LOSS", help=words)
    weight = number(">= 0", lambda value: value >= 0)
    for kind in ("inmodal", "crossmodal"):
        words = f"weight of the {kind[:-5]}-modal penalty where the loss has it (default 0.25)"
        add(f"--lambda-{kind}", type=weight, default=0.25, metavar="λ", help=words)
    count, size = whole_number(0), BATCH_SIZE
    words = "multiply the penalties by N / the batch size, so that λ means the same at every "
    words += f"batch size; default {size}, the default --batch-size; 0: the paper's formula"
    add("--reference-batch-size", type=count, default=size, metavar="N", help=words)
    add("--seeds", type=whole_number(1), default=1, metavar="N", help="runs of each loss")
    add("--seed", type=count, default=0, help="the first run's seed (default 0)")
    words = "short (default): 620 steps, lr 3e-3, logit scale 33; long: 1,500, 2e-3 and 14.3"
    add("--preset", choices=PRESETS, default="short", help=words)
    add("--steps", type=whole_number(1), help="overrides the preset")
    positive = number("above 0", lambda value: value > 0)
    add("--lr", type=positive, help="the highest learning rate; overrides the preset")
    words = f"distinct concepts in a batch (default {size})"
    add("--batch-size", type=whole_number(2), default=size, help=words)
    add_device(parser)
    words = "what to evaluate on (default test); choose settings on validation"
    add("--split", choices=["validation", "test"], default="test", help=words)
    add("--out", type=Path, metavar="DIR", help="default: runs/PRESET")
    arguments = parser.parse_args(argv)
    for name, value in PRESETS[arguments.preset].items():
        if getattr(arguments, name, None) is None:
            setattr(arguments, name, value)
    arguments.out = arguments.out or Path("runs") / arguments.preset
    return arguments


def main(argv: Sequence[str]) -> None:
    """Trains what is not trained yet, evaluates, reports."""
    arguments = parse_arguments(argv)
    out = arguments.out
    # a folder holds runs that can be compared: they differ in loss and seed alone
    names = ("lambda_inmodal", "lambda_crossmodal", "reference_batch_size", "steps", "batch_size")
    settings = {n: getattr(arguments, n) for n in (*names, "lr", "logit_scale")}
    asked = {**settings, "split": arguments.split, "data": fingerprint()}
    command = shlex.join(["python", "-m", "reference_train", *argv])
    result = report.start(out, asked, command, arguments.device)
    emoji = read_emoji()
    EmojiBatches(emoji, lambda texts: torch.zeros(len(texts), 1), arguments.batch_size, 0)
    pairs = validation_pairs(emoji)
    sets = {name: situation(emoji, arguments.split, name) for name in SITUATIONS}
    result["data_sets"] = {name: report.describe(name, data) for name, data in sets.items()}
    histories = result.setdefault("history", {})
    report.save(result, out)
    # seed by seed, so that an early stop leaves every loss with as many runs
    seeds = range(arguments.seed, arguments.seed + arguments.seeds)
    runs = [(loss, seed) for seed in seeds for loss in dict.fromkeys(arguments.loss)]
    for count, (loss, seed) in enumerate(runs, start=1):
        config = RunConfig(loss=loss, seed=seed, **settings)
        if config.name in result["results"]:
            print(f"{config.name}: finished before")
            continue
        print(f"run {count} of {len(runs)}: {config.name}", flush=True)
        torch.manual_seed(seed)
        clip = build_model(config.name, config.logit_scale, arguments.device)
        batches = EmojiBatches(emoji, clip.tokenizer, config.batch_size, seed)
        (out / config.name).mkdir(exist_ok=True)
        trained = train(config, clip, batches, pairs, out / config.name)
        histories[config.name] = trained.pop("history")
        result["checkpoints"][config.name] = {**asdict(config), **trained}
        result["results"][config.name] = {name: measure(clip, data) for name, data in sets.items()}
        report.save(result, out)
    report.write(result, out)
    of_losses: dict[str, list[list[dict[str, float]]]] = {}
    for name, run in result["checkpoints"].items():
        of_losses.setdefault(run["loss"], []).append(histories[name])
    draw_training(of_losses, out / "training.png")
    print(f"and {out}/training.png")
