"""The command line: `python -m benchmarks [command]`. Each command has its own file.

Without a command: compare.
"""

import argparse
import os
import sys
from importlib import import_module
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def main(arguments: list[str]) -> int:
    """Parse, run one command, return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    compare = commands.add_parser("compare", help="the loss beside the alternatives, here")
    compare.add_argument("--dry-run", action="store_true", help="tiny sizes on CPU")

    plot = commands.add_parser("plot", help="tables and pictures of a record of compare, made anew")
    plot.add_argument("record", type=Path, help="its JSON file")
    plot.add_argument("--out", type=Path, help="where to (beside the record)")

    gpu = commands.add_parser("gpu", help="test and time everything on the GPU at hand")
    gpu.add_argument("--dry-run", action="store_true", help="tiny sizes on CPU, interpreted")
    gpu.add_argument(
        "--budget", type=float, default=440.0, metavar="SECONDS", help="of all sections together"
    )
    sections = (
        "tests", "ceilings", "kernels", "sizes", "ablations", "sweep", "competitors", "more tests",
    )  # fmt: skip
    gpu.add_argument("--sections", nargs="+", choices=sections, help="only these (default: all)")

    for command in (compare, gpu):
        command.add_argument(
            "--out", type=Path, help="folder of the record (results/; dry run: temporary)"
        )
        command.add_argument("--seed", type=int, default=0)

    predict = commands.add_parser("predict", help="what a step should take on GPUs you don't have")
    predict.add_argument("--chip", choices=("A100", "H100", "B200"), default="H100")
    predict.add_argument("--d", type=int, default=512)

    semantics = commands.add_parser("semantics", help="what OpenCLIP's flags do to gradients")
    semantics.add_argument("--out", type=Path, default=RESULTS, help="folder of the record")

    launches = commands.add_parser("launches", help="count what a step launches, no GPU needed")
    launches.add_argument("--size", nargs=2, type=int, metavar=("N", "D"), default=(2048, 512))
    launches.add_argument("--names", action="store_true", help="print each launch")

    if not arguments or (arguments[0].startswith("-") and arguments[0] not in ("-h", "--help")):
        arguments = ["compare", *arguments]
    options = parser.parse_args(arguments)
    if options.command in ("compare", "gpu", "launches"):
        _fit_interpreter(options.command == "gpu" and options.dry_run, arguments)
    if options.command in ("compare", "gpu"):
        options.out = options.out or (None if options.dry_run else RESULTS)
    if options.command != "plot":
        from benchmarks.checkout import make_kernels_importable

        make_kernels_importable()
    # Only now: importing a kernel fixes whether it is interpreted.
    code: int = import_module(f"benchmarks.{options.command}").main(options)
    return code


def _fit_interpreter(interpreted: bool, arguments: list[str]) -> None:
    """A dry run of `gpu` is interpreted, no other is: start again where the environment differs."""
    if interpreted == (os.environ.get("TRITON_INTERPRET", "0") == "1"):
        return
    environment = {**os.environ, "TRITON_INTERPRET": "1" if interpreted else "0"}
    os.execve(sys.executable, [sys.executable, "-m", "benchmarks", *arguments], environment)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
