"""Which engine computes a call: `impl=`, CYCLIP_LOSS_IMPL, and what an installation supports."""

import sys
import warnings
from functools import lru_cache, partial
from runpy import run_path
from types import SimpleNamespace

import pytest
import torch
from inputs import Case

from cyclip_loss import CyCLIPLoss, engine_of, engines, numerics
from cyclip_loss.engines import eager
from cyclip_loss.engines import triton as kernels

pytestmark = pytest.mark.usefixtures("unverified_kernels")


@pytest.mark.parametrize(("first", "second"), [("eager", "triton"), ("triton", "eager")])
def test_backward_uses_the_engine_that_forward_chose(first, second, monkeypatch):
    """The option changes between forward and backward."""
    loss_fn = CyCLIPLoss(impl=first)
    loss = loss_fn(*Case(20, 4).leaves("cpu"))
    loss_fn.impl = second
    for function in ("contrastive_grads", "cyclic_grads"):
        monkeypatch.setattr({"eager": eager, "triton": kernels}[second], function, None)
    loss.backward()


# A CUDA capability or AMD architecture, Triton's version (None: it is not installed), and the table
# of tiles (None: the kernels do not run).
GPUS = [
    ((7, 5), "3.9.0", None),
    ((8, 0), "3.4.0", "sm_80"),
    ((8, 6), "3.4.0", "sm_86"),
    ((8, 9), "3.4.0", "sm_89"),
    ((9, 0), "3.4.0", "sm_90"),
    # Before 3.9, Triton fails to compile the kernels for Blackwell, or leaves products out.
    ((10, 0), "3.8.0", None),
    ((12, 0), "3.8.0", None),
    ((10, 3), "3.9.0", "sm_100"),
    ((12, 0), "3.10.1+git1ab", "sm_120"),
    ((12, 1), "3.10.1", "sm_86"),
    ((12, 0), None, "sm_120"),
    ("gfx1100", "3.9.0", None),
    ("gfx942:sramecc+:xnack-", "3.6.0", "gfx942"),
    ("gfx942:sramecc+:xnack-", None, "gfx942"),
]


@pytest.mark.parametrize(("gpu", "version", "expected"), GPUS)
def test_each_gpu_gets_the_kernels_that_its_version_of_triton_compiles(
    gpu, version, expected, monkeypatch
):
    monkeypatch.setattr(torch.version, "hip", "6.4" if isinstance(gpu, str) else None)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(gcnArchName=gpu)
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: gpu)
    monkeypatch.setitem(sys.modules, "triton", version and SimpleNamespace(__version__=version))
    assert numerics.architecture.__wrapped__(torch.device("cuda")) == expected


@pytest.mark.parametrize("is_supported", [True, False])
def test_without_triton_or_on_another_gpu_pytorch_computes(is_supported, monkeypatch):
    """A supported GPU without Triton warns once what to install."""
    monkeypatch.setattr(engines, "architecture", lambda device: "sm_90" if is_supported else None)
    monkeypatch.setattr(engines, "_import_problem", lru_cache(engines._import_problem.__wrapped__))
    monkeypatch.delattr("cyclip_loss.engines.triton")
    monkeypatch.setitem(sys.modules, "cyclip_loss.engines.triton", None)  # importing them fails
    features = SimpleNamespace(
        device=torch.device("cuda"), dtype=torch.float32, is_cuda=True, shape=(2, 2)
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert [engines.choose("auto", features)[0] for _ in range(2)] == [eager] * 2
    assert ["`pip install triton`" in str(x.message) for x in caught] == [True] * is_supported
    problem = "cannot be imported" if is_supported else "do not support cuda"
    with pytest.raises(ValueError, match=problem):
        engines.choose("triton", features)


SMALL, LARGE = torch.ones(2, 2), torch.ones(2, 3)
# impl, CYCLIP_LOSS_IMPL, features, the engine, and what `engine_of` says.
CHOICES = [
    ("auto", "auto", SMALL, "verified", "Triton kernels"),
    ("auto", "triton", SMALL, "kernels", "Triton kernels"),
    ("auto", "eager", SMALL, "eager", "PyTorch: CYCLIP_LOSS_IMPL is 'eager'"),
    ("eager", "triton", SMALL, "eager", "PyTorch: impl is 'eager'"),
    ("triton", "auto", SMALL.double(), "eager", "PyTorch: the kernels do not compute float64"),
    ("auto", "auto", LARGE, "eager", "PyTorch: D is above 2"),
]


@pytest.mark.parametrize(("impl", "variable", "features", "engine", "in_words"), CHOICES)
def test_the_option_the_environment_and_the_features_choose_the_engine(
    impl, variable, features, engine, in_words, monkeypatch
):
    monkeypatch.setattr(kernels, "MAX_D", 2)
    monkeypatch.setattr("cyclip_loss.engines.IMPL_OF_AUTO", variable)
    verified = engines.verified(SMALL)
    expected = {"verified": verified, "kernels": kernels, "eager": eager}[engine]
    assert engines.choose(impl, features)[0] is expected
    assert engine_of(features, impl) == in_words


@pytest.mark.parametrize("wrap", [lambda loss: loss, partial(torch.compile, backend="eager")])
@pytest.mark.parametrize(
    ("variable", "message"), [("triton", "do not support cpu"), ("tritn", "one of .* got 'tritn'")]
)
def test_a_variable_that_cannot_be_followed_is_an_error_also_in_compiled_code(
    variable, message, wrap, monkeypatch
):
    monkeypatch.setattr("cyclip_loss.engines.IMPL_OF_AUTO", variable)
    monkeypatch.setattr(kernels, "INTERPRETED", False)
    torch._dynamo.reset()
    # After an error in compiled code, PyTorch leaves gradients switched off.
    with torch.enable_grad(), pytest.raises(ValueError, match=f"CYCLIP_LOSS_IMPL.*{message}"):
        wrap(CyCLIPLoss())(*Case(20, 4).inputs("cpu"))


def test_the_environment_variable_is_read_at_import(monkeypatch):
    """An empty one means "auto", and a bad one is refused."""
    monkeypatch.setenv("CYCLIP_LOSS_IMPL", "")
    assert run_path(engines.__file__)["IMPL_OF_AUTO"] == "auto"
    monkeypatch.setenv("CYCLIP_LOSS_IMPL", "fast")
    with pytest.raises(ValueError, match=r"CYCLIP_LOSS_IMPL must be one of .* got 'fast'"):
        run_path(engines.__file__)["choose"]("auto", SMALL)
