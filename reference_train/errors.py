"""How a command ends: an error is one line, and the exit code says what kind it was."""

import os
import sys
from collections.abc import Callable, Sequence


class Stopped(Exception):
    """The command went wrong under way; the message is one line for the user."""

    exit_code = 1


class CannotStart(Stopped):
    """What the user asked for can't be done."""

    exit_code = 2


class Interrupted(Stopped):
    """Ctrl-C came, and what was done so far is saved."""

    exit_code = 130


# Where a rank stands in the environment: torchrun's, MPI's and Slurm's names, as OpenCLIP has them.
RANKS = {
    "RANK": ("RANK", "PMI_RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK"),
    "LOCAL_RANK": ("LOCAL_RANK", "MPI_LOCALRANKID", "SLURM_LOCALID", "OMPI_COMM_WORLD_LOCAL_RANK"),
}


def is_first(rank: str) -> bool:
    """Whether this process speaks for all ("RANK") or for those of its node ("LOCAL_RANK")."""
    return next((os.environ[name] for name in RANKS[rank] if name in os.environ), "0") == "0"


def first_line(error: object) -> str:
    """What an error says, cut to one line."""
    return (str(error) or type(error).__name__).partition("\n")[0].rstrip(":")


def say(message: str) -> None:
    """One line to the user, of all ranks together, beside a command's output."""
    if is_first("RANK"):
        print(f"reference_train: {message}", file=sys.stderr, flush=True)


def run(main: Callable[[Sequence[str]], None]) -> None:
    """Runs `main` with the command line's arguments.

    Exit codes: 0 done, 1 it went wrong, 2 it can't start, 130 interrupted.
    """
    try:
        main(sys.argv[1:])
    except Stopped as error:
        if is_first("LOCAL_RANK"):  # a file may be missing on one node only
            print(f"reference_train: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("reference_train: interrupted", file=sys.stderr)
        sys.exit(130)
