"""What several test files need besides fixtures: examples, PyTorch's settings, small strips."""

from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec

import pytest
import torch
from hypothesis import settings

from cyclip_loss import inputs, numerics, plan, usage_warnings
from cyclip_loss.engines import eager

HAS_TRITON = find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
needs_inductor = pytest.mark.skipif(
    " " in torch.__file__, reason="Inductor does not quote PyTorch's path in its linker command"
)


def examples(share):
    """The number of a test's examples, relative to the profile's."""
    return settings(max_examples=max(1, round(share * settings.default.max_examples)))


def fill_fresh_memory_with_nan():
    """Fill uninitialised tensors with NaN, so that tests notice elements never written."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True


def forget_warnings():
    """As if this process had not warned yet, nor checked the inputs of a first call."""
    usage_warnings._warned.clear()
    inputs._checked.clear()


@contextmanager
def setting(name, value):
    """Set a setting of PyTorch, such as "float32_matmul_precision", and reset it at the end."""
    before = getattr(torch, f"get_{name}")()
    getattr(torch, f"set_{name}")(value)
    try:
        yield
    finally:
        getattr(torch, f"set_{name}")(before)


def set_small_blocks(monkeypatch):
    """Let kernels that sum take several blocks."""
    from cyclip_loss.kernels import configs

    for sizes in (configs.JOIN_LSE.tile, configs.JOIN_LSE.kwargs):  # a copy, made once
        monkeypatch.setitem(sizes, "TILES", 2)


@contextmanager
def strips_of(rows):
    """Strips are `rows` high (one tile in kernels), and blocks are small. None: as shipped.

    Forward keeps at most 2^10 exponentials for backward.
    """
    with pytest.MonkeyPatch.context() as monkeypatch:
        if rows is not None:
            _set_strip_rows(monkeypatch, rows)
        yield


def _set_strip_rows(monkeypatch, rows):
    monkeypatch.setattr(numerics, "MIN_STRIP_ROWS", rows)
    monkeypatch.setitem(numerics.STRIP_ELEMENTS, "cpu", 1)
    monkeypatch.setattr(numerics, "STRIP_ELEMENTS_OTHER_DEVICES", 1)
    monkeypatch.setattr(numerics, "FULL_SPEED_ELEMENTS", 1)
    monkeypatch.setattr(plan, "MAX_KEPT_EXPONENTIALS", 2**10)
    monkeypatch.setattr(eager, "GRAM_ROWS", rows)
    if HAS_TRITON:
        set_small_blocks(monkeypatch)
        for name, limit, value in (
            ("contrastive_lse", "PARTIAL_ELEMENTS", 1),
            ("contrastive_grads", "BLOCK_ROWS", 1),
            ("contrastive_grads", "BLOCK_ELEMENTS", 1),
            ("gram_matrices", "MIN_SPLIT_ROWS", 4 * rows),
        ):
            monkeypatch.setattr(import_module(f"cyclip_loss.kernels.{name}"), limit, value)
