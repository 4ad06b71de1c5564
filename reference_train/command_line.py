"""What all command lines share: one-line errors, exit codes, progress, and types of arguments."""

import argparse
import math
import os
import re
import sys
import tarfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NoReturn

import torch
from rich import progress


class RunFailed(Exception):
    """The command failed after it had begun. The message is one line for the user."""

    exit_code = 1


class UsageError(RunFailed):
    """The command can't start, for example because an argument or a data set is wrong."""

    exit_code = 2


def first_line(error: object) -> str:
    """The first line of an error's message, without file objects (`<_io.BufferedReader ...>`)."""
    # WebDataset adds arguments to a TarError, so `str(error)` would be a tuple.
    message = str(error.args[0] if isinstance(error, tarfile.TarError) and error.args else error)
    message = re.sub(r"( @)? <_io\.[^>]*>", "", message)
    return (message or type(error).__name__).partition("\n")[0].rstrip(":")


def say(message: object) -> None:
    """Prints a one-line message to stderr. The command's output goes to stdout."""
    print(f"reference_train: {message}", file=sys.stderr)


def track(items: Iterable[Any], text: str, total: int) -> Iterator[Any]:
    """Yields the items. Shows a bar in a terminal, and else prints a line each minute."""
    if sys.stdout.isatty():
        yield from progress.track(items, text, total, transient=True)
        return
    printed = time.monotonic()
    for count, item in enumerate(items):
        if time.monotonic() >= printed + 60:
            printed = time.monotonic()
            print(f"{text}: {count:,} of {total:,}", flush=True)
        yield item


def run(main: Callable[[Sequence[str]], None]) -> None:
    """Runs `main` with the command line's arguments.

    Exit codes: 0 done, 1 failed, 2 can't start, 130 interrupted.
    """
    try:
        main(sys.argv[1:])
    except RunFailed as error:
        # One rank of each node prints the error, because a file may be missing on one node only.
        if (os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or "0") == "0":
            say(error)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        say("interrupted")
        sys.exit(130)


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, and whose help keeps the description's line breaks.

    Options can't be abbreviated.
    """

    def __init__(self, prog: str, **settings: Any) -> None:
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(prog, formatter_class=formatter, allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        """Raises `UsageError`."""
        raise UsageError(message)


def at_least(minimum: int, kind: Callable[[str], Any] = int) -> Callable[[str], Any]:
    """The type of an argument that is a finite number of at least `minimum`."""

    def number(text: str) -> Any:
        if not minimum <= kind(text) < math.inf:  # NaN is not, either
            raise argparse.ArgumentTypeError(f"must be >= {minimum}, not {text}")
        return kind(text)

    return number


def add_device(parser: Parser) -> None:
    """Adds `--device`. Parsing it checks that a tensor can be created on the device."""

    def device(name: str) -> torch.device:
        try:
            return torch.empty(1, device=name).device
        except (RuntimeError, AssertionError) as error:  # "not compiled with CUDA" is an assertion
            raise argparse.ArgumentTypeError(f"{name}: {first_line(error)}") from error

    default = "cuda" if torch.cuda.is_available() else "cpu"
    text = "default: cuda (in bfloat16) if available, else cpu"
    parser.add_argument("--device", type=device, default=default, help=text)
