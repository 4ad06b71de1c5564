"""Fixtures of all tests: the device and the engines, NaN-filled fresh memory, small strips.

Tests run on one device, CUDA if it is there: `pytest --device cpu` says otherwise. The oracle is on
the CPU, and so are the ranks of gloo. On CUDA the Triton kernels are compiled, elsewhere Triton's
interpreter runs them; where there is no Triton, as on macOS, their tests are skipped.
"""

import importlib
import os
import sys
from collections.abc import Iterator
from importlib.util import find_spec

import pytest
import torch
from hypothesis import settings
from pool import Ranks

from benchmarks.interpreter import why_unusable
from cyclip_loss import eager, ops

HAS_TRITON = find_spec("triton") is not None
needs_triton = pytest.mark.triton
needs_interpreter = pytest.mark.triton("interpreted")
# What imports the kernels at its top.
collect_ignore = [] if HAS_TRITON else ["kernels", "test_cuda.py", "benchmarks/test_gpu.py"]

# Every test of a value or a gradient runs once per engine.
IMPLS_UNDER_TEST = [pytest.param("triton", marks=needs_triton), "eager"]

# The same examples every time: a red run is a changed program, never an unlucky draw.
settings.register_profile("ci", derandomize=True, deadline=None, max_examples=30)
settings.load_profile("ci")


def pytest_addoption(parser: pytest.Parser) -> None:
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.addoption("--device", default=default, help=f"where tensors are made, here {default}")


def pytest_configure(config: pytest.Config) -> None:
    # Triton reads it at its import, which comes with the first test file, or with cyclip_loss.
    assert "triton" not in sys.modules
    interpreted = not config.getoption("--device").startswith("cuda")
    os.environ["TRITON_INTERPRET"] = str(int(interpreted))
    config.addinivalue_line("markers", "triton: launches kernels; interpreted: on a CPU always")
    # PyTorch 2.8 warns of every product in deterministic mode without it.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips tests marked gpu, or gpu(2), where there are fewer, or tensors are made elsewhere; and
    those marked triton where there is no Triton, or it would be interpreted and can't be.
    """
    on_cuda = item.config.getoption("--device").startswith("cuda")
    for marker in item.iter_markers("triton"):
        if not HAS_TRITON:
            pytest.skip("needs Triton")
        # Ranks compute on the CPU, but for those of NCCL.
        by_gloo = "ranks" in item.fixturenames and "nccl" not in item.name
        unusable = why_unusable() if marker.args or by_gloo or not on_cuda else ""
        if unusable:
            pytest.skip(unusable)
    for marker in item.iter_markers("gpu"):
        needed = marker.args[0] if marker.args else 1
        if not on_cuda:
            pytest.skip("needs --device cuda")
        if torch.cuda.device_count() < needed:
            pytest.skip(f"needs {needed} GPUs")


@pytest.fixture(scope="session")
def device(pytestconfig: pytest.Config) -> torch.device:
    """Where the tensors of a test are made."""
    return torch.device(pytestconfig.getoption("--device"))


@pytest.fixture(params=IMPLS_UNDER_TEST, scope="session")
def impl(request: pytest.FixtureRequest, device: torch.device) -> str:
    if request.param == "triton" and device.type == "cuda" and not ops._has_kernels(device):
        pytest.skip("the kernels are not for this GPU")
    return request.param


def fill_fresh_memory_with_nan() -> None:
    """Uninitialised tensors hold NaN, as in deterministic mode: an unwritten element is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True


@pytest.fixture(autouse=True, scope="session")
def nan_in_fresh_memory() -> Iterator[None]:
    fill_fresh_memory_with_nan()
    yield
    torch.use_deterministic_algorithms(False)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Tests marked nccl use gloo like all others, and NCCL too where there are two GPUs."""
    on_cuda = metafunc.config.getoption("--device").startswith("cuda")
    marked = metafunc.definition.get_closest_marker("nccl") and "ranks" in metafunc.fixturenames
    if marked and on_cuda and torch.cuda.device_count() >= 2:
        metafunc.parametrize("ranks", ["gloo", "nccl"], indirect=True, scope="session")


@pytest.fixture(scope="session")
def ranks(request: pytest.FixtureRequest) -> Iterator[Ranks]:
    """Processes for tests over ranks: `ranks.run(world_size, task, *arguments)`."""
    on_gpus = getattr(request, "param", "gloo") == "nccl"
    ranks = Ranks("nccl", "cuda") if on_gpus else Ranks()
    yield ranks
    ranks.close()


@pytest.fixture
def small_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    """Strips of 7 rows, so that a small batch takes several and a shorter last one."""
    set_strip_rows(monkeypatch, 7)


def set_strip_rows(monkeypatch: pytest.MonkeyPatch, rows: int | None) -> None:
    """Make strips low: `rows` in the eager engine, one tile in the kernels. None leaves them be."""
    if rows is None:
        return
    monkeypatch.setattr(eager, "MIN_STRIP_ROWS", rows)
    monkeypatch.setitem(eager.STRIP_ELEMENTS, "cpu", 1)
    monkeypatch.setattr(eager, "STRIP_ELEMENTS_OTHER_DEVICES", 1)
    bounds = {"contrastive_lse PARTIAL_ELEMENTS": 1, "products CHUNK_COLUMNS": rows}
    bounds |= dict.fromkeys(("contrastive_grads BLOCK_ROWS", "contrastive_grads BLOCK_ELEMENTS"), 1)
    for bound, value in bounds.items() if HAS_TRITON else ():
        name, constant = bound.split()
        module = importlib.import_module(f"cyclip_loss.kernels.{name}")
        monkeypatch.setattr(module, constant, value)
