"""Which engine computes a call: `impl=`, CYCLIP_LOSS_IMPL, and what an installation supports."""

import sys
import warnings

import pytest
import torch
from inputs import Case
from torch import Tensor

from cyclip_loss import CyCLIPLoss, CyCLIPWarning, engines, kernels
from cyclip_loss.engines import eager

pytestmark = pytest.mark.usefixtures("unverified_kernels")


@pytest.mark.parametrize(("first", "second"), [("eager", "triton"), ("triton", "eager")])
def test_backward_uses_the_engine_that_forward_chose(first: str, second: str, monkeypatch) -> None:
    """CYCLIP_LOSS_IMPL changes between forward and backward."""
    inputs = Case(20, 4).leaves("cpu")
    monkeypatch.setenv("CYCLIP_LOSS_IMPL", first)
    loss = CyCLIPLoss()(*inputs)
    monkeypatch.setenv("CYCLIP_LOSS_IMPL", second)
    for function in ("contrastive_grads", "cyclic_grads"):
        monkeypatch.setattr({"eager": eager, "triton": kernels}[second], function, None)
    loss.backward()


def test_a_gpu_without_kernels_uses_eager_and_refuses_impl_triton(monkeypatch) -> None:
    monkeypatch.setattr(engines, "architecture", lambda device: None)
    features = torch.ones(2, 2)
    assert engines.choose("auto", features) == "eager"
    assert engines.engine_of(features) == "PyTorch: the kernels do not support cpu"
    monkeypatch.setattr(Tensor, "is_cuda", True)
    with pytest.raises(ValueError, match="the kernels do not support cpu"):
        engines.choose("triton", features)


def test_kernels_that_cannot_be_imported_give_one_warning_and_use_eager(monkeypatch) -> None:
    """A broken installation of Triton has this effect."""
    monkeypatch.delattr("cyclip_loss.kernels")
    monkeypatch.setitem(sys.modules, "cyclip_loss.kernels", None)
    engines._kernels_import.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            assert engines.choose("auto", torch.ones(2, 2)) == "eager"
    assert engines.engine_of(torch.ones(2, 2)) == "PyTorch: the kernels cannot be imported"
    [warning] = caught
    assert warning.category is CyCLIPWarning
    assert "kernels cannot be imported" in str(warning.message)
    engines._kernels_import.cache_clear()


def test_the_environment_variable_sets_the_engine_of_auto_only(monkeypatch) -> None:
    features = torch.ones(2, 2)
    chosen = {"": "verified kernels", "auto": "verified kernels", "triton": "kernels"}
    for value in ("", "auto", "triton", "eager"):
        monkeypatch.setenv("CYCLIP_LOSS_IMPL", value)
        assert engines.choose("auto", features) == chosen.get(value, "eager")
        assert engines.choose("eager", features) == "eager"
        assert engines.choose("triton", features) == "kernels"
        assert engines.choose("triton", features.double()) == "eager"
        assert engines.engine_of(features, "triton") == "Triton kernels"
        computes = engines.engine_of(features)
        assert computes.startswith("PyTorch: impl or CYCLIP" if value == "eager" else "Triton")
    monkeypatch.setenv("CYCLIP_LOSS_IMPL", "fast")
    with pytest.raises(ValueError, match=r"CYCLIP_LOSS_IMPL must be one of .* got 'fast'"):
        CyCLIPLoss()(features, features, 1.0)


def test_auto_uses_eager_for_a_d_that_is_too_large_for_the_kernels(monkeypatch) -> None:
    monkeypatch.setattr(kernels, "MAX_D", 2)
    assert engines.choose("auto", torch.ones(2, 2)) == "verified kernels"
    assert engines.choose("auto", torch.ones(2, 3)) == "eager"
    assert engines.engine_of(torch.ones(2, 3)) == "PyTorch: D is above 2"
    assert engines.engine_of(torch.ones(2, 2).double()).endswith("do not compute float64")
    problem = "result 0 is off by 0.5"
    monkeypatch.setattr(engines.verified(torch.ones(2, 2)), "problem", problem)
    assert engines.engine_of(torch.ones(2, 2)) == f"PyTorch: {problem}"


def test_the_error_for_missing_kernels_says_what_asked_for_them(monkeypatch) -> None:
    monkeypatch.setattr(kernels, "INTERPRETED", False)
    features = torch.ones(2, 2)
    with pytest.raises(ValueError, match=r"^impl='triton' needs features on a CUDA"):
        engines.choose("triton", features)
    monkeypatch.setenv("CYCLIP_LOSS_IMPL", "triton")
    with pytest.raises(ValueError, match=r"^CYCLIP_LOSS_IMPL=triton needs features on a CUDA"):
        engines.choose("auto", features)
