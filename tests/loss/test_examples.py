"""The examples in docstrings run, and print what the docstrings show."""

import doctest
from importlib import import_module

import pytest
import torch

MODULES = ["cyclip_loss.logsumexp", "cyclip_loss.loss"]


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples_print_what_they_show(name: str) -> None:
    outcome = doctest.testmod(import_module(name), extraglobs={"torch": torch})
    assert outcome.attempted > 0
    assert outcome.failed == 0
