"""Command lines: a parser whose errors are one line, and the types of its arguments."""

import argparse
import math
from collections.abc import Callable
from typing import NoReturn

import torch

from .errors import CannotStart


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


def number(condition: str, holds: Callable[[float], bool]) -> Callable[[str], float]:
    """An argument's type: a finite number for which `holds`."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and holds(value)):
            raise argparse.ArgumentTypeError(f"must be a number {condition}, not {text}")
        return value

    return parse


def device(name: str) -> torch.device:
    """An argument's type: a device on which something can be put."""
    try:
        return torch.empty(1, device=name).device
    except (RuntimeError, AssertionError) as error:  # "not compiled with CUDA" is an assertion
        raise argparse.ArgumentTypeError(f"{name}: {str(error).splitlines()[0]}") from error
