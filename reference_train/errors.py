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


def is_first(rank: str) -> bool:
    """Whether this process speaks for all ("RANK") or for those of its node ("LOCAL_RANK").

    It does if it is alone, and the first of `torchrun`'s or Slurm's.
    """
    slurm = {"RANK": "SLURM_PROCID", "LOCAL_RANK": "SLURM_LOCALID"}[rank]
    return os.environ.get(rank, os.environ.get(slurm, "0")) == "0"


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
