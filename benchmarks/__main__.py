"""Run one of the benchmarks. Without a command, `python -m benchmarks` runs `compare`.

`torchrun --nproc-per-node 2 -m benchmarks` compares losses whose batch is spread over ranks.
"""

import argparse
import math
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from benchmarks.compare.plan import DTYPES

MODULES = {
    "compare": "benchmarks.compare.side_by_side",
    "cached": "benchmarks.cached_backward",
    "gpu": "benchmarks.gpu.sections",
    "tune": "benchmarks.gpu.tune",
    "gate": "benchmarks.gate.compile",
}


def positive(kind: Callable[[str], float]) -> Callable[[str], float]:
    """The type of an argument that is a finite number above 0."""

    def number(text: str) -> float:
        if not 0 < kind(text) < math.inf:
            raise argparse.ArgumentTypeError(f"must be > 0, not {text}")
        return kind(text)

    return number


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    add_command = partial(commands.add_parser, allow_abbrev=False)

    compare = add_command("compare", help="compare the loss with its alternatives on this machine")
    compare.add_argument(
        "--loss",
        nargs="+",
        action="extend",
        default=[],
        metavar="MODULE:NAME",
        help="measure your own losses: nn.Modules whose constructor needs no argument, or functions"
        " of (image_features, text_features, logit_scale)",
    )
    compare.add_argument(
        "--sizes",
        nargs="+",
        type=positive(int),
        metavar="N",
        help="numbers of pairs (of all ranks together)",
    )
    # torchrun takes --d for an abbreviation of its own options, before Python 3.12.
    compare.add_argument("--d", "--dim", type=positive(int), help="feature size (default: 512)")
    compare.add_argument(
        "--dtype",
        nargs="+",
        choices=DTYPES,
        help="of the features; autocast: float32 features, and the loss under bfloat16 autocast",
    )
    compare.add_argument(
        "--step-rate",
        type=positive(float),
        metavar="R",
        help="your trainer's pairs per second on one device; adds each loss's share of a training "
        "step",
    )

    cached = add_command(
        "cached", help="compare a step by cached_backward with one on the whole batch"
    )

    gpu = add_command("gpu", help="test and time the kernels and the loss on this machine's GPU")
    gpu.add_argument(
        "--dry-run",
        action="store_true",
        help="run on the CPU: tiny sizes, kernels in Triton's interpreter",
    )
    gpu.add_argument(
        "--sections", nargs="+", help="sections to run, each for up to nine minutes (default: all)"
    )

    tune = add_command("tune", help="choose the fastest tile sizes of the kernels on this GPU")
    tune.add_argument("--n", type=positive(int), default=8192, help="pairs (%(default)s)")
    tune.add_argument("--d", type=positive(int), default=768, help="features (%(default)s)")
    names = ["bfloat16", "float16", "float32"]
    tune.add_argument("--dtype", nargs="+", choices=names, default=names)
    tune.add_argument("--seconds", type=positive(int), default=300, help="in total (%(default)s)")
    tune.add_argument(
        "--dry-run", action="store_true", help="run on the CPU, in tiny sizes, and keep nothing"
    )

    gate = add_command("gate", help="compile every kernel for every chip, without a GPU")
    gate.add_argument(
        "--arch", nargs="+", help="architectures (default: all that this Triton supports)"
    )

    for command in (compare, cached, gpu):
        command.add_argument(
            "--out",
            type=Path,
            default=Path("runs", "benchmarks"),
            help="folder of the record (default: %(default)s in the current folder)",
        )
        command.add_argument("--name", help="name of the record's page (default: with the date)")
    return parser


def main(arguments: list[str]) -> int:
    """Parse, run one command, return its exit code."""
    if not arguments or (arguments[0].startswith("-") and arguments[0] not in ("-h", "--help")):
        arguments = ["compare", *arguments]
    parser = make_parser()
    options = parser.parse_args(arguments)
    if "out" in options:
        try:  # before minutes of measuring
            options.out.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=options.out).close()
        except OSError as error:
            parser.error(f"--out can't be written: {error}")
    if options.command in ("gpu", "tune", "gate"):
        if not find_spec("triton"):
            print(f"`python -m benchmarks {options.command}` needs Triton: pip install triton")
            return 2
        # Triton reads this variable when kernels are imported, which the command does below.
        interpreted = options.command != "gate" and options.dry_run
        os.environ["TRITON_INTERPRET"] = str(int(interpreted))
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or PyTorch's profiler logs each start
    # `timeout` sends SIGTERM. Handle it like Ctrl-C, so that the record is written.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    return import_module(MODULES[options.command]).main(options)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
