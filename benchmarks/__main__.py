"""The command line: `python -m benchmarks cpu | model | gpu`. Each command has its own file."""

import argparse
import os
import sys
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def main(arguments: list[str]) -> int:
    """Parse, run one command, return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    cpu = commands.add_parser("cpu", help="time, memory and accuracy on this CPU, side by side")
    cpu.add_argument("--out", type=Path, default=RESULTS, help="folder of the record")
    cpu.add_argument("--seed", type=int, default=0)
    cpu.add_argument("--seconds", type=float, default=10.0, help="to spend on each size at least")
    cpu.add_argument("--peak-of", nargs=3, help=argparse.SUPPRESS)  # what a fresh process measures

    model = commands.add_parser("model", help="predict the kernels' times from first principles")
    model.add_argument("--chip", nargs="+", default=["A100", "H100", "B200"], metavar="NAME")
    model.add_argument("--size", nargs=2, type=int, metavar=("N", "D"), default=(65536, 768))
    model.add_argument(
        "--count-instructions",
        action="store_true",
        help="compile the kernels and print the instruction table that the model holds",
    )

    gpu = commands.add_parser("gpu", help="check and time everything on the GPU at hand")
    gpu.add_argument("--dry-run", action="store_true", help="tiny sizes on CPU, interpreted")
    gpu.add_argument("--out", type=Path, help="folder of the record (results/; dry run: temporary)")
    gpu.add_argument("--seed", type=int, default=0)
    gpu.add_argument("--budget", type=float, default=440.0, metavar="SECONDS")
    gpu.add_argument("--sections", nargs="+", metavar="NAME", help="only these (default: all)")

    options = parser.parse_args(arguments)
    if options.command == "gpu":
        _fit_interpreter(options.dry_run, arguments)

    if options.command == "cpu":
        from benchmarks import cpu as cpu_command

        return cpu_command.main(options)

    # Only now: importing a kernel fixes whether it is interpreted.
    from benchmarks.checkout import make_kernels_importable

    make_kernels_importable()
    if options.command == "model":
        from benchmarks import model_report as model_command

        return model_command.main(options)
    from benchmarks import gpu as gpu_command

    options.out = options.out or (None if options.dry_run else RESULTS)
    return gpu_command.main(options)


def _fit_interpreter(dry_run: bool, arguments: list[str]) -> None:
    """A dry run is interpreted, a real one never is: start again where the environment differs."""
    if dry_run == (os.environ.get("TRITON_INTERPRET", "0") == "1"):
        return
    environment = {**os.environ, "TRITON_INTERPRET": "1" if dry_run else "0"}
    os.execve(sys.executable, [sys.executable, "-m", "benchmarks", *arguments], environment)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
