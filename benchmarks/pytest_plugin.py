"""A plugin, `pytest -p benchmarks.pytest_plugin`: kernels of a bare checkout, and --seconds."""

import math
import time

import pytest

from benchmarks.checkout import make_kernels_importable

BEGUN = time.monotonic()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Take --seconds."""
    parser.addoption("--seconds", type=float, default=math.inf, help="begin no test after so many")


def pytest_load_initial_conftests() -> None:
    """Before any test is imported."""
    make_kernels_importable()


def pytest_runtest_teardown(item: pytest.Item) -> None:
    """After each test."""
    if time.monotonic() - BEGUN > item.config.getoption("--seconds"):
        item.session.shouldstop = "the seconds are over"
