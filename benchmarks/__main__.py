"""The command line: `python -m benchmarks [command]`. Each command has its own file.

Without a command: compare.
"""

import argparse
import os
import sys
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def main(arguments: list[str]) -> int:
    """Parse, run one command, return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    compare = commands.add_parser("compare", help="the loss beside the alternatives, here")
    compare.add_argument("--dry-run", action="store_true", help="tiny sizes on CPU")
    compare.add_argument(
        "--out", type=Path, help="folder of the record (results/; dry run: temporary)"
    )
    compare.add_argument("--seed", type=int, default=0)

    plot = commands.add_parser("plot", help="tables and pictures of a record of compare, made anew")
    plot.add_argument("record", type=Path, help="its JSON file")
    plot.add_argument("--out", type=Path, help="where to (beside the record)")

    model = commands.add_parser("model", help="predict the kernels' times from first principles")
    model.add_argument("--chip", nargs="+", default=["A100", "H100", "B200"], metavar="NAME")
    model.add_argument("--size", nargs=2, type=int, metavar=("N", "D"), default=(65536, 768))
    model.add_argument(
        "--count-instructions",
        action="store_true",
        help="compile the kernels and print the instruction table that the model holds",
    )

    scaling = commands.add_parser("scaling", help="predict time, traffic, memory on many ranks")
    scaling.add_argument("--chip", default="H100", metavar="NAME")
    scaling.add_argument("--d", type=int, default=512)
    scaling.add_argument("--out", type=Path, default=RESULTS, help="folder of record and picture")

    semantics = commands.add_parser("semantics", help="what OpenCLIP's flags do to gradients")
    semantics.add_argument("--out", type=Path, default=RESULTS, help="folder of the record")

    launches = commands.add_parser("launches", help="count what a step launches, no GPU needed")
    launches.add_argument("--size", nargs=2, type=int, metavar=("N", "D"), default=(2048, 512))
    launches.add_argument("--names", action="store_true", help="print each launch")

    gpu = commands.add_parser("gpu", help="check and time everything on the GPU at hand")
    gpu.add_argument("--dry-run", action="store_true", help="tiny sizes on CPU, interpreted")
    gpu.add_argument("--out", type=Path, help="folder of the record (results/; dry run: temporary)")
    gpu.add_argument("--seed", type=int, default=0)
    gpu.add_argument("--budget", type=float, default=440.0, metavar="SECONDS")
    gpu.add_argument("--sections", nargs="+", metavar="NAME", help="only these (default: all)")

    if not arguments or (arguments[0].startswith("-") and arguments[0] not in ("-h", "--help")):
        arguments = ["compare", *arguments]
    options = parser.parse_args(arguments)
    if options.command in ("compare", "gpu", "launches"):
        _fit_interpreter(options.command == "gpu" and options.dry_run, arguments)

    if options.command == "plot":
        from benchmarks import plots as plot_command

        return plot_command.main(options)

    # Only now: importing a kernel fixes whether it is interpreted.
    from benchmarks.checkout import make_kernels_importable

    make_kernels_importable()
    if options.command == "model":
        from benchmarks import model_report as model_command

        return model_command.main(options)
    if options.command == "launches":
        from benchmarks import launches as launches_command

        return launches_command.main(options)
    if options.command == "scaling":
        from benchmarks import scaling_report as scaling_command

        return scaling_command.main(options)
    if options.command == "semantics":
        from benchmarks import semantics as semantics_command

        return semantics_command.main(options)
    options.out = options.out or (None if options.dry_run else RESULTS)
    if options.command == "compare":
        from benchmarks import compare as compare_command

        return compare_command.main(options)
    from benchmarks import gpu as gpu_command

    return gpu_command.main(options)


def _fit_interpreter(dry_run: bool, arguments: list[str]) -> None:
    """A dry run of `gpu` is interpreted, no other is: start again where the environment differs."""
    if dry_run == (os.environ.get("TRITON_INTERPRET", "0") == "1"):
        return
    environment = {**os.environ, "TRITON_INTERPRET": "1" if dry_run else "0"}
    os.execve(sys.executable, [sys.executable, "-m", "benchmarks", *arguments], environment)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
