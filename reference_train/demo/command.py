"""The command line. `python -m reference_train --help`."""

import argparse
import json
import math
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from cyclip_loss.warn import PAPER_BATCH_SIZE

from ..data.emoji import EMOJI_FOLDER, EmojiSet, fingerprint, is_emoji_folder, read_emoji
from ..errors import CannotStart
from . import ranks, report, results
from .batch_norm import global_batch_norm
from .batches import EmojiBatches, StreamedBatches, find_shards
from .evaluate import evaluate, validation_measures
from .model import Clip, build_model, check_model_name
from .train import Batches, RunConfig, train

# loss -> which of the two penalties it has (in-modal, cross-modal)
LOSSES = {"clip": (0, 0), "cyclip": (1, 1), "c-cyclip": (0, 1), "i-cyclip": (1, 0)}
# The batch size at which a weight is the paper's, there: the records in results/ were made by the
# paper's formula in batches of 256.
OF_THE_EMOJI = 256
PRESETS = {
    "short": {"steps": 620, "lr": 3e-3, "logit_scale": 33.0},
    "long": {"steps": 1500, "lr": 2e-3, "logit_scale": 14.3},
}


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments, with the preset filled in."""
    parser = argparse.ArgumentParser(
        prog="python -m reference_train",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Trains CLIP models with CyCLIPLoss on image-caption pairs and shows what the\n"
        "cyclic penalties changed. With no argument: the demonstration, CLIP beside CyCLIP on the\n"
        "emoji that ship with the repository, about five minutes on two CPU cores.",
        epilog="A command that was interrupted goes on where it stopped when it is given again;\n"
        "runs that are finished are not repeated. `python -m reference_train report FOLDER` makes\n"
        "the table and the pictures again, without training. Over several processes:\n"
        "`torchrun --nproc-per-node 8 -m reference_train ...`.",
    )
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
    what.add_argument(
        "--lambda-inmodal",
        type=float,
        default=0.25,
        metavar="λ",
        help="weight of the in-modal penalty where the loss has it (default 0.25)",
    )
    what.add_argument(
        "--lambda-crossmodal",
        type=float,
        default=0.25,
        metavar="λ",
        help="weight of the cross-modal penalty where the loss has it (default 0.25)",
    )
    what.add_argument(
        "--reference-batch-size",
        type=int,
        metavar="N",
        help="multiply the penalties by N / the batch size of all ranks, so that λ means the same "
        f"at every batch size; default {PAPER_BATCH_SIZE}, the paper's, with --data, and "
        f"{OF_THE_EMOJI}, the default --batch-size, on the emoji; 0: the paper's formula",
    )
    what.add_argument("--seeds", type=int, default=1, metavar="N", help="runs of each loss")
    what.add_argument("--seed", type=int, default=0, help="the first run's seed (default 0)")
    what.add_argument(
        "--model",
        default="tiny",
        help="tiny (default: 8 M parameters, 32 pixels) or an OpenCLIP model name, from scratch",
    )
    what.add_argument(
        "--data",
        nargs="+",
        metavar="TAR",
        help="image-caption WebDataset to train on instead of the emoji: tar files, brace patterns "
        "or folders of tars (png, jpg or webp + txt); the evaluation stays on the emoji",
    )

    how = parser.add_argument_group("how long and how fast")
    how.add_argument(
        "--preset",
        choices=PRESETS,
        default="short",
        help="short (the default): 620 steps, lr 3e-3, logit scale 33; "
        "long: 1,500 steps, lr 2e-3, logit scale 14.3",
    )
    how.add_argument("--steps", type=int, help="overrides the preset")
    how.add_argument("--lr", type=float, help="overrides the preset: the highest learning rate")
    how.add_argument(
        "--logit-scale",
        type=float,
        help="overrides the preset: the scale of the logits at the start",
    )
    how.add_argument(
        "--batch-size",
        type=int,
        default=256,
        help="distinct concepts in a batch (default 256); over several ranks in each rank's "
        "part of it, as in OpenCLIP",
    )
    how.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="default: cuda if there is one, else cpu; on cuda bfloat16 autocast is used, and over "
        "several ranks each takes the GPU of its local rank",
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


def check_numbers(arguments: argparse.Namespace) -> None:
    """Raises `CannotStart` for a number that makes no sense."""
    for name in ("lambda_inmodal", "lambda_crossmodal"):
        value = getattr(arguments, name)
        if not (math.isfinite(value) and value >= 0):
            raise CannotStart(f"--{name.replace('_', '-')} must be a number >= 0, not {value}")
    for name, least in (("seeds", 1), ("seed", 0), ("steps", 1), ("batch_size", 2)):
        value = getattr(arguments, name)
        if value < least:
            raise CannotStart(f"--{name.replace('_', '-')} must be at least {least}, not {value}")
    if (arguments.reference_batch_size or 0) < 0:
        raise CannotStart(
            f"--reference-batch-size must be at least 0, not {arguments.reference_batch_size}"
        )
    if not 0 < arguments.lr < math.inf:
        raise CannotStart(f"--lr must be a number above 0, not {arguments.lr}")
    if not 1 <= arguments.logit_scale <= 100:
        raise CannotStart(f"--logit-scale must be from 1 to 100, not {arguments.logit_scale}")


def check_device(name: str, local_rank: int | None = None) -> torch.device:
    """The device, once something has been put on it.

    local_rank: among several ranks, which GPU this one takes.
    """
    try:
        device = torch.device(name)
        if device.type != "cuda" or local_rank is None:
            torch.empty(1, device=device)
        elif device.index is None:
            device = torch.device("cuda", local_rank)
            torch.empty(1, device=device)
            torch.cuda.set_device(device)
        else:
            raise CannotStart(f"--device {name}: each of several ranks takes its own: say cuda")
    except (RuntimeError, AssertionError) as error:  # "not compiled with CUDA" is an assertion
        raise CannotStart(f"--device {name}: {str(error).splitlines()[0]}") from error
    return device


def check_out(folder: Path) -> None:
    """Makes the folder and writes to it, to know that it can be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise CannotStart(f"--out {folder}: can't be written: {error.strerror}") from error


def run_configs(arguments: argparse.Namespace, shards: list[str], emoji: str) -> list[RunConfig]:
    """Seed by seed, so that an early stop leaves every loss with as many runs."""
    reference = arguments.reference_batch_size
    if reference is None:
        reference = PAPER_BATCH_SIZE if shards else OF_THE_EMOJI
    return [
        RunConfig(
            loss=loss,
            lambda_inmodal=LOSSES[loss][0] * arguments.lambda_inmodal,
            lambda_crossmodal=LOSSES[loss][1] * arguments.lambda_crossmodal,
            reference_batch_size=reference or None,
            seed=arguments.seed + k,
            steps=arguments.steps,
            batch_size=arguments.batch_size * ranks.part().world_size,
            lr=arguments.lr,
            logit_scale=arguments.logit_scale,
            model=arguments.model,
            data=shards or [emoji],
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


def make_batches(config: RunConfig, emoji: EmojiSet, shards: list[str], clip: Clip) -> Batches:
    """The emoji in memory, or any other data streamed."""
    part = ranks.part()
    if not shards:
        return EmojiBatches(emoji, clip.tokenize, config.batch_size, config.seed, part)
    size = max(64, clip.image_size)
    return StreamedBatches(shards, clip.tokenize, config.batch_size, size, config.seed, part)


def main(argv: Sequence[str]) -> None:
    """Checks, trains what is not trained yet, evaluates, reports.

    All ranks train; the first one alone does everything else, while the others wait for it.
    """
    first = ranks.is_first()
    if argv[:1] == ["report"]:
        return report.main(argv[1:]) if first else None
    with ranks.first_speaks():
        arguments = parse_arguments(argv)
    console = Console() if first else Console(quiet=True, force_terminal=False)
    emoji_folder, shards = EMOJI_FOLDER, []
    with ranks.together(CannotStart):
        check_numbers(arguments)
        check_model_name(arguments.model)
        device = check_device(arguments.device, ranks.local_rank())
        if first:
            check_out(arguments.out)
        if arguments.data and len(arguments.data) == 1 and is_emoji_folder(Path(arguments.data[0])):
            emoji_folder = Path(arguments.data[0])
        elif arguments.data:
            shards = find_shards(arguments.data)
        emoji = read_emoji(emoji_folder)
        configs = run_configs(arguments, shards, fingerprint(emoji_folder))
        for config in configs if first else []:
            check_same_settings(config, arguments.out)

    for number, config in enumerate(configs, start=1):
        folder = arguments.out / config.name
        if ranks.from_first(results.evaluated(folder, arguments.split)):
            console.print(f"{config.name}: finished before, in {folder}", highlight=False)
            continue
        trained = ranks.from_first((folder / "model.pt").exists())
        with ranks.together(CannotStart):
            torch.manual_seed(config.seed)
            clip = build_model(config.model, config.logit_scale, device)
            if not trained:
                data = make_batches(config, emoji, shards, clip)
                if ranks.part().world_size > 1:
                    clip.model = global_batch_norm(clip.model)
        if not trained:
            if first:
                folder.mkdir(exist_ok=True)
                results.write_json(asdict(config), folder / "config.json")
            if len(configs) > 1:
                console.print(f"run {number} of {len(configs)}: {config.name}", highlight=False)
            measures = partial(validation_measures, clip, emoji)
            seconds = train(config, clip, data, measures, folder, console)
        elif first:
            saved = torch.load(folder / "model.pt", map_location=device, weights_only=True)
            clip.model.load_state_dict(saved["model"])
            seconds = saved["seconds"]
        if first:
            numbers = evaluate(clip, emoji, arguments.split)
            results.save_run(folder, config, arguments.split, seconds, device, numbers)

    ranks.leave()
    if first:
        results.gather_results(arguments.out, arguments.split, emoji_folder)
        report.show(arguments.out, console)
