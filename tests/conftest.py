"""Fixtures for all tests: the device, the engines, the ranks, NaN in fresh memory.

All tests run on the device given by `--device`, by default CUDA if there is a GPU, else the CPU. On
CUDA the kernels are compiled; on the CPU Triton's interpreter runs them. The oracle always runs on
the CPU, and so do the `ranks` over gloo.
"""

import gc
import os
import signal
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache
from multiprocessing import get_context

if "PYTEST_XDIST_WORKER" in os.environ:  # workers with a thread per core slow each other down
    os.environ.setdefault("OMP_NUM_THREADS", "1")
# Inductor starts no processes that compile: that takes longer than the few kernels of the tests.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import pytest
import torch
from hypothesis import Phase, settings
from interpreter import speed_up
from pool import Ranks
from support import (
    HAS_TRITON,
    fill_fresh_memory_with_nan,
    forget_warnings,
    needs_triton,
    set_small_blocks,
)

from cyclip_loss import numerics

# Their assertions, too, show the values that they compare.
pytest.register_assert_rewrite("accuracy", "rank_cases", "recipe_cases")

# macOS has no Triton. tests/requirements.txt has all else that the suite needs.
NEED_TRITON = ["kernels", "test_cuda.py", "benchmarks/test_gate.py", "benchmarks/test_gpu.py"]
collect_ignore = [] if HAS_TRITON else NEED_TRITON

# By default Hypothesis draws the same examples in every run, so a test fails only if the code
# changed. `inputs.py` says why they do not depend on which tests are collected. The workflow
# "Nightly" draws others, with --hypothesis-profile=nightly. `faults.py` only asks whether a test
# fails, so its profile does not shrink examples, which takes minutes.
settings.register_profile("fast", derandomize=True, deadline=None, max_examples=30)
settings.register_profile("nightly", deadline=None, max_examples=300, print_blob=True)
fails_soon = (Phase.explicit, Phase.generate)
settings.register_profile("faults", settings.get_profile("fast"), phases=fails_soon)
settings.load_profile("fast")


def pytest_addoption(parser):
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.addoption("--device", default=default, help=f"the tests' device (default: {default})")


def pytest_configure(config):
    if "CI" in os.environ and sys.platform == "linux":
        assert HAS_TRITON, "CI would not test the kernels"
    # Triton reads TRITON_INTERPRET when it is imported. Test files or the kernels import it later.
    assert "triton" not in sys.modules
    interpreted = not config.getoption("--device").startswith("cuda")
    os.environ["TRITON_INTERPRET"] = str(int(interpreted))
    os.environ.setdefault("CYCLIP_LOSS_TILES", "missing.json")  # not this user's tiles
    # Without it PyTorch 2.8 warns of every matrix product in deterministic mode.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # A shell script's background jobs ignore SIGINT, but some tests have to receive it.
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_runtest_setup(item):
    """Seed PyTorch's generator, forget warnings, and skip tests that cannot run here.

    A test marked gpu(n) needs n GPUs (by default 1) and --device cuda.
    """
    torch.manual_seed(0)  # independent of the tests that ran before
    forget_warnings()
    speed_up()
    on_cuda = item.config.getoption("--device").startswith("cuda")
    for marker in item.iter_markers("gpu"):
        needed = marker.args[0] if marker.args else 1
        if not on_cuda:
            pytest.skip("needs --device cuda")
        if torch.cuda.device_count() < needed:
            pytest.skip(f"needs {needed} GPUs")


@pytest.fixture(scope="session")
def device(pytestconfig):
    """The device of a test's tensors."""
    return torch.device(pytestconfig.getoption("--device"))


@pytest.fixture(params=[pytest.param("triton", marks=needs_triton), "eager"], scope="session")
def impl(request, device):
    """The engine. A test with this fixture runs once per engine."""
    if request.param == "triton" and device.type == "cuda" and not numerics.architecture(device):
        pytest.skip("the kernels do not support this GPU")
    return request.param


@pytest.fixture(autouse=True, scope="session")
def prepared_memory():
    """NaN in fresh memory. The garbage collector skips what was imported, as in forks."""
    gc.freeze()
    fill_fresh_memory_with_nan()
    yield
    torch.use_deterministic_algorithms(False)


def pytest_make_parametrize_id(val):
    """The name of a dtype."""
    return str(val) if isinstance(val, torch.dtype) else None


def pytest_generate_tests(metafunc):
    """Run tests marked nccl over gloo, and over NCCL too if there are two GPUs."""
    on_cuda = metafunc.config.getoption("--device").startswith("cuda")
    marked = metafunc.definition.get_closest_marker("nccl") and "ranks" in metafunc.fixturenames
    if marked and on_cuda and torch.cuda.device_count() >= 2:
        metafunc.parametrize("ranks", ["gloo", "nccl"], indirect=True, scope="session")


@pytest.fixture(scope="session")
def ranks(request):
    """Processes for tests across ranks: `ranks.run(world_size, task, *arguments)`."""
    on_gpus = getattr(request, "param", "gloo") == "nccl"
    ranks = Ranks("nccl", "cuda") if on_gpus else Ranks()
    yield ranks
    ranks.close()


@pytest.fixture(scope="session")
def uninterpreted():
    """A process in which Triton compiles kernels: `uninterpreted.submit(function).result()`."""
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRITON_INTERPRET", "0")
            process.submit(int).result(timeout=900)  # it starts now
        yield process


@pytest.fixture
def unverified_kernels(monkeypatch):
    """`auto` uses the kernels on the CPU as on a GPU. No layout is verified yet."""
    from triton.runtime import interpreter

    from cyclip_loss import engines
    from cyclip_loss.engines import triton as kernels  # which needs Triton

    if not kernels.INTERPRETED:
        pytest.skip("pretends that the CPU is a GPU")
    monkeypatch.setattr(engines, "architecture", lambda device: "sm_90")
    set_small_blocks(monkeypatch)
    monkeypatch.setattr(engines, "_verified", lru_cache(engines._verified.__wrapped__))

    def convert(x, source, target, mode, original=interpreter._convert_float):
        if target == interpreter.tl.bfloat16:
            return torch.from_numpy(x).bfloat16().view(torch.uint16).numpy()
        return original(x, source, target, mode)

    # A GPU rounds to the nearest bfloat16. The interpreter truncates.
    monkeypatch.setattr(interpreter, "_convert_float", convert)
