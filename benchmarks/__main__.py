"""The command line: `python -m benchmarks [command]`. Without a command: compare."""

import argparse
import os
import sys
from importlib import import_module
from pathlib import Path

MODULES = {
    "compare": "benchmarks.compare.side_by_side",
    "plot": "benchmarks.compare.plot",
    "gpu": "benchmarks.gpu.command",
    "gate": "benchmarks.gate.command",
    "predict": "benchmarks.predict",
    "semantics": "benchmarks.semantics",
    "launches": "benchmarks.launches",
}
ARCHITECTURES = ("sm_80", "sm_86", "sm_90", "sm_100", "gfx942")
SECTIONS = ("cuda", "tests", "ceilings", "kernels", "sizes", "ablations", "sweep", "competitors",
            "slow", "ranks")  # fmt: skip


def main(arguments: list[str]) -> int:
    """Parse, run one command, return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    compare = commands.add_parser("compare", help="the loss beside the alternatives, here")
    compare.add_argument(
        "--sizes", nargs="+", type=int, metavar="N", help="batches, D = 512 (default: the plan)"
    )

    plot = commands.add_parser("plot", help="tables and pictures of a record of compare, made anew")
    plot.add_argument("record", type=Path, help="its JSON file")

    gpu = commands.add_parser("gpu", help="test and time everything on the GPU at hand")
    gpu.add_argument("--dry-run", action="store_true", help="tiny sizes on CPU, interpreted")
    gpu.add_argument("--budget", type=float, default=440.0, metavar="SECONDS", help="of all")
    gpu.add_argument("--sections", nargs="+", choices=SECTIONS, help="only these (default: all)")

    gate = commands.add_parser("gate", help="compile every kernel for every chip, no GPU needed")
    gate.add_argument(
        "--arch", nargs="+", choices=ARCHITECTURES, help="default: all that this Triton can"
    )
    gate.add_argument(
        "--markdown", type=Path, help="also write the table there, in place of this Triton's"
    )

    predict = commands.add_parser("predict", help="what a step should take on GPUs you don't have")
    predict.add_argument("--chip", choices=("A100", "H100", "B200"), default="H100")
    predict.add_argument("--d", type=int, default=512)

    semantics = commands.add_parser("semantics", help="what OpenCLIP's flags do to gradients")

    launches = commands.add_parser("launches", help="count what a step launches, no GPU needed")
    launches.add_argument("--size", nargs=2, type=int, metavar=("N", "D"), default=(2048, 512))

    for command in (compare, gpu, semantics):
        command.add_argument("--out", type=Path, help="folder of the record (default: results/)")
    for command in (compare, gpu):
        command.add_argument("--seed", type=int, default=0)

    if not arguments or (arguments[0].startswith("-") and arguments[0] not in ("-h", "--help")):
        arguments = ["compare", *arguments]
    options = parser.parse_args(arguments)
    # Only now: importing a kernel fixes whether it is interpreted.
    interpreted = options.command == "gpu" and options.dry_run
    os.environ["TRITON_INTERPRET"] = str(int(interpreted))
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # PyTorch's profiler, which tells of each start
    code: int = import_module(MODULES[options.command]).main(options)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
