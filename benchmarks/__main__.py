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


def main(arguments: list[str]) -> int:
    """Parse, run one command, return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    compare = commands.add_parser("compare", help="the loss and its alternatives, on this machine")
    compare.add_argument(
        "--sizes", nargs="+", type=int, metavar="N", help="batches, D = 512 (default: the plan)"
    )

    gpu = commands.add_parser("gpu", help="test and time everything on the GPU at hand")
    gpu.add_argument("--dry-run", action="store_true", help="tiny sizes on CPU, interpreted")
    gpu.add_argument("--budget", type=float, default=440.0, metavar="SECONDS", help="of all")
    gpu.add_argument("--sections", nargs="+", help="only these (default: all)")

    gate = commands.add_parser("gate", help="compile every kernel for every chip, no GPU needed")
    gate.add_argument("--arch", nargs="+", help="only these (default: all that this Triton can)")

    predict = commands.add_parser("predict", help="what a step should take on GPUs you don't have")
    predict.add_argument("--d", type=int, default=512)

    for command in (compare, gpu):
        command.add_argument("--out", type=Path, help="folder of the record (default: results/)")

    if not arguments or (arguments[0].startswith("-") and arguments[0] not in ("-h", "--help")):
        arguments = ["compare", *arguments]
    options = parser.parse_args(arguments)
    # Only now: importing a kernel fixes whether it is interpreted.
    interpreted = options.command == "gpu" and options.dry_run
    os.environ["TRITON_INTERPRET"] = str(int(interpreted))
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # PyTorch's profiler reports each start
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: `timeout` sends it
    code: int = import_module(MODULES[options.command]).main(options)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
