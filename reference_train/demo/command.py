"""The command line of the demonstration. `python -m reference_train --help`."""

import argparse
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console

from ..arguments import Parser, device, number, whole_number
from ..data.emoji import fingerprint, read_emoji
from ..evaluate import report
from ..evaluate.measure import measure
from ..files import written_whole
from ..losses import LOSSES
from .batches import EmojiBatches
from .evaluate import SITUATIONS, situation, validation_pairs
from .model import build_model
from .pictures import draw_training
from .train import RunConfig, train

# The batch size at which a weight is the paper's: the records in results/ were made by the paper's
# formula in batches of 256.
BATCH_SIZE = 256
PRESETS = {
    "short": {"steps": 620, "lr": 3e-3, "logit_scale": 33.0},
    "long": {"steps": 1500, "lr": 2e-3, "logit_scale": 14.3},
}


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments, with the preset filled in. Raises `CannotStart`."""
    parser = Parser(
        prog="python -m reference_train",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Trains small CLIP models with CyCLIPLoss and shows what the cyclic penalties\n"
        "changed: CLIP next to CyCLIP on the emoji that ship with the repository.\n"
        "With no argument about five minutes on two CPU cores.",
        epilog="Interrupted, the same command resumes; runs that are finished are not repeated.\n\n"
        "other commands, each with its own --help:\n"
        "  python -m reference_train pretrain   OpenCLIP's trainer with CyCLIPLoss\n"
        "  python -m reference_train evaluate   any OpenCLIP checkpoint\n"
        "  python -m reference_train report     table and picture of an evaluation again",
    )
    add = parser.add_argument
    words = "of clip, cyclip, c-cyclip (cross-modal penalty alone), i-cyclip (in-modal one alone)"
    losses = ["clip", "cyclip"]
    add("--loss", nargs="+", choices=LOSSES, default=losses, metavar="LOSS", help=words)
    weight = number(">= 0", lambda value: value >= 0)
    for kind in ("inmodal", "crossmodal"):
        words = f"weight of the {kind[:-5]}-modal penalty where the loss has it (default 0.25)"
        add(f"--lambda-{kind}", type=weight, default=0.25, metavar="λ", help=words)
    add(
        "--reference-batch-size",
        type=whole_number(0),
        default=BATCH_SIZE,
        metavar="N",
        help="multiply the penalties by N / the batch size, so that λ means the same at every "
        f"batch size; default {BATCH_SIZE}, the default --batch-size; 0: the paper's formula",
    )
    add("--seeds", type=whole_number(1), default=1, metavar="N", help="runs of each loss")
    add("--seed", type=whole_number(0), default=0, help="the first run's seed (default 0)")
    words = "short (default): 620 steps, lr 3e-3, logit scale 33; long: 1,500, 2e-3 and 14.3"
    add("--preset", choices=PRESETS, default="short", help=words)
    add("--steps", type=whole_number(1), help="overrides the preset")
    positive = number("above 0", lambda value: value > 0)
    add("--lr", type=positive, help="the highest learning rate; overrides the preset")
    words = f"distinct concepts in a batch (default {BATCH_SIZE})"
    add("--batch-size", type=whole_number(2), default=BATCH_SIZE, help=words)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    words = "default: cuda if there is one, else cpu; on cuda bfloat16 autocast is used"
    add("--device", type=device, default=default, help=words)
    words = "what to evaluate on (default test); choose settings on validation"
    add("--split", choices=["validation", "test"], default="test", help=words)
    add("--out", type=Path, metavar="DIR", help="default: runs/PRESET")
    arguments = parser.parse_args(argv)
    for name in ("steps", "lr"):
        if getattr(arguments, name) is None:
            setattr(arguments, name, PRESETS[arguments.preset][name])
    arguments.out = arguments.out or Path("runs") / arguments.preset
    return arguments


def run_configs(arguments: argparse.Namespace) -> list[RunConfig]:
    """Seed by seed, so that an early stop leaves every loss with as many runs."""
    return [
        RunConfig(
            loss=loss,
            lambda_inmodal=LOSSES[loss].inmodal * arguments.lambda_inmodal,
            lambda_crossmodal=LOSSES[loss].crossmodal * arguments.lambda_crossmodal,
            reference_batch_size=arguments.reference_batch_size or None,
            seed=arguments.seed + k,
            steps=arguments.steps,
            batch_size=arguments.batch_size,
            lr=arguments.lr,
            logit_scale=PRESETS[arguments.preset]["logit_scale"],
        )
        for k in range(arguments.seeds)
        for loss in dict.fromkeys(arguments.loss)
    ]


def main(argv: Sequence[str]) -> None:
    """Trains what is not trained yet, evaluates, reports."""
    arguments, console = parse_arguments(argv), Console()
    out, configs = arguments.out, run_configs(arguments)
    # a folder holds runs that can be compared: they differ in loss and seed alone
    names = ("lambda_inmodal", "lambda_crossmodal", "reference_batch_size", "steps", "batch_size")
    settings = {name: getattr(arguments, name) for name in (*names, "lr", "split")}
    settings |= {"logit_scale": configs[0].logit_scale, "data": fingerprint()}
    command = shlex.join(["python", "-m", "reference_train", *argv])
    result = report.start(out, settings, command, arguments.device)
    emoji = read_emoji()
    EmojiBatches(emoji, lambda texts: torch.zeros(len(texts), 1), arguments.batch_size, 0)
    pairs = validation_pairs(emoji)
    sets = {name: situation(emoji, arguments.split, name) for name in SITUATIONS}
    result["data_sets"] = {name: report.describe(name, data) for name, data in sets.items()}
    histories = result.setdefault("history", {})
    report.save(result, out)
    for count, config in enumerate(configs, start=1):
        if config.name in result["results"]:
            console.print(f"{config.name}: finished before", highlight=False)
            continue
        console.print(f"run {count} of {len(configs)}: {config.name}", highlight=False)
        torch.manual_seed(config.seed)
        clip = build_model(config.name, config.logit_scale, arguments.device)
        batches = EmojiBatches(emoji, clip.tokenizer, config.batch_size, config.seed)
        (out / config.name).mkdir(exist_ok=True)
        trained = train(config, clip, batches, pairs, out / config.name, console)
        histories[config.name] = trained.pop("history")
        result["checkpoints"][config.name] = {**asdict(config), **trained}
        result["results"][config.name] = {name: measure(clip, data) for name, data in sets.items()}
        report.save(result, out)
    report.write(result, out, console)
    of_losses: dict[str, list[str]] = {}
    for name, run in result["checkpoints"].items():
        of_losses.setdefault(run["loss"], []).append(name)
    with written_whole(out / "training.png") as path:
        draw_training(
            {loss: [histories[n] for n in runs] for loss, runs in of_losses.items()}, path
        )
    console.print(f"and {out}/training.png", highlight=False)
