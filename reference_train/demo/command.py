"""The command line of the demonstration. `python -m reference_train --help`."""

import argparse
import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from ..arguments import Parser, device, number, whole_number
from ..data.emoji import EmojiSet, fingerprint, read_emoji
from ..errors import CannotStart
from ..files import write_json
from ..losses import LOSSES
from .batches import EmojiBatches
from .evaluate import evaluate, validation_measures
from .model import build_model
from .report import report
from .results import evaluated, gather_results, save_run
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
        "changed: CLIP beside CyCLIP on the emoji that ship with the repository. With no argument\n"
        "about five minutes on two CPU cores.",
        epilog="A command that was interrupted goes on where it stopped when it is given again;\n"
        "runs that are finished are not repeated.\n\n"
        "other commands, each with its own --help:\n"
        "  python -m reference_train report FOLDER   this table and these pictures again\n"
        "  python -m reference_train pretrain        OpenCLIP's trainer with CyCLIPLoss\n"
        "  python -m reference_train evaluate        any OpenCLIP checkpoint",
    )
    weight = number(">= 0", lambda value: value >= 0)
    what = parser.add_argument_group("what to train")
    what.add_argument(
        "--loss",
        nargs="+",
        choices=LOSSES,
        default=["clip", "cyclip"],
        metavar="LOSS",
        help="one or more of clip, cyclip, c-cyclip (cross-modal penalty only), i-cyclip (in-modal "
        "penalty only); default: clip cyclip",
    )
    for kind in ("inmodal", "crossmodal"):
        what.add_argument(
            f"--lambda-{kind}",
            type=weight,
            default=0.25,
            metavar="λ",
            help=f"weight of the {kind[:-5]}-modal penalty where the loss has it (default 0.25)",
        )
    what.add_argument(
        "--reference-batch-size",
        type=whole_number(0),
        default=BATCH_SIZE,
        metavar="N",
        help="multiply the penalties by N / the batch size, so that λ means the same at every "
        f"batch size; default {BATCH_SIZE}, the default --batch-size; 0: the paper's formula",
    )
    what.add_argument(
        "--seeds", type=whole_number(1), default=1, metavar="N", help="runs of each loss"
    )
    what.add_argument(
        "--seed", type=whole_number(0), default=0, help="the first run's seed (default 0)"
    )
    what.add_argument(
        "--model",
        default="tiny",
        help="tiny (default: 8 M parameters, 32 pixels) or an OpenCLIP model name, from scratch",
    )

    how = parser.add_argument_group("how long and how fast")
    how.add_argument(
        "--preset",
        choices=PRESETS,
        default="short",
        help="short (the default): 620 steps, lr 3e-3, logit scale 33; "
        "long: 1,500 steps, lr 2e-3, logit scale 14.3",
    )
    how.add_argument("--steps", type=whole_number(1), help="overrides the preset")
    how.add_argument(
        "--lr",
        type=number("above 0", lambda value: value > 0),
        help="overrides the preset: the highest learning rate",
    )
    how.add_argument(
        "--logit-scale",
        type=number("from 1 to 100", lambda value: 1 <= value <= 100),
        help="overrides the preset: the scale of the logits at the start",
    )
    how.add_argument(
        "--batch-size",
        type=whole_number(2),
        default=BATCH_SIZE,
        help=f"distinct concepts in a batch (default {BATCH_SIZE})",
    )
    how.add_argument(
        "--device",
        type=device,
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="default: cuda if there is one, else cpu; on cuda bfloat16 autocast is used",
    )

    where = parser.add_argument_group("evaluation and output")
    where.add_argument(
        "--split",
        choices=["validation", "test"],
        default="test",
        help="what to evaluate on (default test); choose settings on validation",
    )
    where.add_argument("--out", type=Path, metavar="DIR", help="default: runs/PRESET")
    arguments = parser.parse_args(argv)
    for name, value in PRESETS[arguments.preset].items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    arguments.out = arguments.out or Path("runs") / arguments.preset
    return arguments


def make_folder(out: Path) -> None:
    """Makes the folder and writes to it, to know that it can be written."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise CannotStart(f"--out {out}: can't be written: {error.strerror}") from error


def run_configs(arguments: argparse.Namespace, data: str) -> list[RunConfig]:
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
            logit_scale=arguments.logit_scale,
            model=arguments.model,
            data=[data],
        )
        for k in range(arguments.seeds)
        for loss in dict.fromkeys(arguments.loss)
    ]


def check_same_settings(config: RunConfig, out: Path) -> None:
    """A folder holds runs that can be compared: they differ in loss and seed alone."""
    wanted = asdict(config)
    for path in sorted(out.glob("*/config.json")):
        found = json.loads(path.read_text())
        same_run = path.parent.name == config.name
        for name in wanted:
            own = name in ("loss", "seed", "lambda_inmodal", "lambda_crossmodal")
            if found.get(name) != wanted[name] and (same_run or not own):
                raise CannotStart(
                    f"{path.parent} was run with {name} = {found.get(name)}, not {wanted[name]}: "
                    "choose another --out, or delete that folder"
                )


def run(
    config: RunConfig, emoji: EmojiSet, arguments: argparse.Namespace, console: Console
) -> None:
    """One run, as far as it is not done yet: trains, evaluates, leaves its folder."""
    folder = arguments.out / config.name
    if evaluated(folder, arguments.split):
        console.print(f"{config.name}: finished before, in {folder}", highlight=False)
        return
    torch.manual_seed(config.seed)
    clip = build_model(config.model, config.logit_scale, arguments.device)
    if (folder / "model.pt").exists():
        saved = torch.load(folder / "model.pt", map_location=arguments.device, weights_only=True)
        clip.model.load_state_dict(saved["model"])
        seconds = saved["seconds"]
    else:
        data = EmojiBatches(emoji, clip.tokenize, config.batch_size, config.seed)
        folder.mkdir(exist_ok=True)
        write_json(asdict(config), folder / "config.json")
        measures = partial(validation_measures, clip, emoji)
        seconds = train(config, clip, data, measures, folder, console)
    numbers = evaluate(clip, emoji, arguments.split)
    save_run(folder, config, arguments.split, seconds, arguments.device, numbers)


def main(argv: Sequence[str]) -> None:
    """Checks, trains what is not trained yet, evaluates, reports."""
    console = Console()
    if argv[:1] == ["report"]:
        parser = Parser(
            prog="python -m reference_train report",
            description="Makes the table and the pictures again from FOLDER/results.json.",
        )
        parser.add_argument(
            "folder", type=Path, metavar="FOLDER", help="an --out folder of earlier runs"
        )
        report(parser.parse_args(argv[1:]).folder, console)
        return
    arguments = parse_arguments(argv)
    make_folder(arguments.out)
    configs = run_configs(arguments, fingerprint())
    for config in configs:
        check_same_settings(config, arguments.out)
    emoji = read_emoji()
    for count, config in enumerate(configs, start=1):
        if len(configs) > 1:
            console.print(f"run {count} of {len(configs)}: {config.name}", highlight=False)
        run(config, emoji, arguments, console)
    gather_results(arguments.out, arguments.split)
    report(arguments.out, console)
