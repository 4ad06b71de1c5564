"""The command line: `python -m benchmarks [command]`. Without a command: compare."""

import argparse
import os
import signal
import sys
from importlib import import_module
from pathlib import Path

MODULES = {
    "compare": "benchmarks.compare.side_by_side",
    "gpu": "benchmarks.gpu.sections",
    "gate": "benchmarks.gate.compile",
    "predict": "benchmarks.predict",
}


def make_parser() -> argparse.ArgumentParser:
    """The commands and their options."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    compare = commands.add_parser("compare", help="the loss and its alternatives, on this machine")
    compare.add_argument(
        "--sizes", nargs="+", type=int, metavar="N", help="batch sizes, with D = 512"
    )

    gpu = commands.add_parser("gpu", help="test and time everything on this machine's GPU")
    gpu.add_argument("--dry-run", action="store_true", help="tiny sizes, interpreted on the CPU")
    gpu.add_argument(
        "--budget", type=float, default=440.0, metavar="SECONDS", help="for all sections together"
    )
    gpu.add_argument("--sections", nargs="+", help="run only these (default: all)")

    gate = commands.add_parser("gate", help="compile every kernel for every chip, without a GPU")
    gate.add_argument("--arch", nargs="+", help="only these (default: all that this Triton knows)")

    predict = commands.add_parser("predict", help="what a step should take on GPUs you do not have")
    predict.add_argument("--d", type=int, default=512, help="feature size")

    for command in (compare, gpu):
        command.add_argument("--out", type=Path, help="folder for the record (default: results/)")
    return parser


def main(arguments: list[str]) -> int:
    """Parse, run one command, return its exit code."""
    if not arguments or (arguments[0].startswith("-") and arguments[0] not in ("-h", "--help")):
        arguments = ["compare", *arguments]
    options = make_parser().parse_args(arguments)
    # A kernel is interpreted or compiled depending on this variable at its import, which follows.
    interpreted = options.command == "gpu" and options.dry_run
    os.environ["TRITON_INTERPRET"] = str(int(interpreted))
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else PyTorch's profiler logs each start
    # `timeout` sends SIGTERM: treat it as Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    code: int = import_module(MODULES[options.command]).main(options)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
