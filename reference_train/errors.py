"""How a command ends: an error is one line, and the exit code says what kind it was."""

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn


class Stopped(Exception):
    """The command went wrong under way; the message is one line for the user."""

    exit_code = 1


class CannotStart(Stopped):
    """What the user asked for can't be done."""

    exit_code = 2


class Interrupted(Stopped):
    """Ctrl-C came, and what was done so far is saved."""

    exit_code = 130


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Raises `CannotStart`."""
        raise CannotStart(message)


def whole_number(least: int) -> Callable[[str], int]:
    """An argument's type: an integer of at least `least`."""

    def parse(text: str) -> int:
        if not text.lstrip("-").isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"must be a whole number >= {least}, not {text}")
        return int(text)

    return parse


def run(main: Callable[[Sequence[str]], None]) -> None:
    """Runs `main` with the command line's arguments.

    Exit codes: 0 done, 1 it went wrong, 2 it can't start, 130 interrupted.
    """
    try:
        main(sys.argv[1:])
    except Stopped as error:
        print(f"reference_train: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("reference_train: interrupted", file=sys.stderr)
        sys.exit(130)
