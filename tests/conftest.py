"""Fixtures of all tests: the engines under test, NaN-filled fresh memory, small strips."""

import importlib
import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

# Without a GPU the Triton kernels run in Triton's interpreter, which is chosen at its import.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from pool import Ranks

from cyclip_loss import eager

# Every test of a value or a gradient runs once per engine.
IMPLS_UNDER_TEST = ["eager", "triton"]

# The same examples every time: a red run is a changed program, never an unlucky draw.
settings.register_profile("ci", derandomize=True, deadline=None, max_examples=30)
settings.load_profile("ci")


@pytest.fixture(params=IMPLS_UNDER_TEST, scope="session")
def impl(request: pytest.FixtureRequest) -> str:
    return request.param


def fill_fresh_memory_with_nan() -> None:
    """Uninitialised tensors hold NaN, so that an element nobody wrote is seen.

    PyTorch fills them in deterministic mode. warn_only: on a GPU, deterministic mode would refuse
    matrix products unless an environment variable is set.
    """
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True


@pytest.fixture(autouse=True, scope="session")
def nan_in_fresh_memory() -> Iterator[None]:
    fill_fresh_memory_with_nan()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Processes for tests over ranks: `ranks.run(world_size, task, *arguments)`."""
    ranks = Ranks()
    yield ranks
    ranks.close()


@pytest.fixture
def small_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    """Strips of 7 rows, so that a small batch takes several and a shorter last one."""
    set_strip_rows(monkeypatch, 7)


# What bounds the strips and blocks of the kernels: at least one tile each.
KERNEL_STRIPS = {
    "contrastive_grads": ("BLOCK_ROWS", "BLOCK_ELEMENTS"),
    "contrastive_lse": ("PARTIAL_ELEMENTS",),
}


def set_strip_rows(monkeypatch: pytest.MonkeyPatch, rows: int | None) -> None:
    """Make strips low: `rows` in the eager engine, one tile in the kernels. None leaves them be."""
    if rows is None:
        return
    monkeypatch.setattr(eager, "MIN_STRIP_ROWS", rows)
    monkeypatch.setitem(eager.STRIP_ELEMENTS, "cpu", 1)
    for name, constants in KERNEL_STRIPS.items():
        module = importlib.import_module(f"cyclip_loss.kernels.{name}")
        for constant in constants:
            monkeypatch.setattr(module, constant, 1)
