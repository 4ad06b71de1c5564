"""The package as installed: what importing it costs, and what it says about itself."""

import importlib.metadata
import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest

import cyclip_loss

NOT_IMPORTED = ["triton", "open_clip", "torchvision", "webdataset", "rich", "matplotlib", "PIL"]


def loaded_modules(program: str) -> list[str]:
    program += "\nimport json, sys; print(json.dumps(list(sys.modules)))"
    output = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120
    )
    return json.loads(output.stdout)


def test_import_stays_light() -> None:
    """A fresh process gets none of the optional dependencies, and no Triton."""
    loaded = loaded_modules("import cyclip_loss")
    assert "cyclip_loss" in loaded
    assert not set(NOT_IMPORTED) & set(loaded)
    assert not {"kernels", "cyclip_loss.kernels"} & set(loaded)


def test_a_loss_on_cpu_stays_light() -> None:
    """It imports no more than PyTorch does for any custom operator (all of torch._dynamo)."""
    loaded = loaded_modules(
        "import torch, cyclip_loss\n"
        "features = torch.ones(3, 2, requires_grad=True)\n"
        "cyclip_loss.CyCLIPLoss()(features, features * 2, 10.0).backward()"
    )
    by_torch = loaded_modules("import torch._dynamo")
    assert not set(NOT_IMPORTED) & (set(loaded) - set(by_torch))
    assert not {"kernels", "cyclip_loss.kernels"} & set(loaded)


WITHOUT_DISTRIBUTED = """
import sys, torch
del torch._C._c10d_init
for name in list(sys.modules):
    if name.startswith("torch.distributed") or name == "torch._C._distributed_c10d":
        del sys.modules[name]
sys.modules["torch._C._distributed_c10d"] = None
del torch.distributed
import torch.distributed, cyclip_loss
assert not torch.distributed.is_available()
assert cyclip_loss.CyCLIPLoss()(torch.eye(3), torch.eye(3), 10.0) > 0
"""


def test_pytorch_that_was_built_without_distributed() -> None:
    loaded_modules(WITHOUT_DISTRIBUTED)


def test_version() -> None:
    try:
        installed = importlib.metadata.version("cyclip-loss")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("not installed")
    assert cyclip_loss.__version__ == installed


def test_typed() -> None:
    assert Path(cyclip_loss.__file__).with_name("py.typed").exists()


def test_all_names_what_is_there() -> None:
    for name in cyclip_loss.__all__:
        assert hasattr(cyclip_loss, name)


def test_forward_has_the_arguments_of_clip_loss_first() -> None:
    open_clip = pytest.importorskip("open_clip")
    ours = list(inspect.signature(cyclip_loss.CyCLIPLoss.forward).parameters.values())
    theirs = list(inspect.signature(open_clip.ClipLoss.forward).parameters.values())
    for our_parameter, their_parameter in zip(ours, theirs, strict=False):
        assert our_parameter.name == their_parameter.name
        assert our_parameter.default == their_parameter.default
    assert len(ours) >= len(theirs)
    keywords = set(inspect.signature(cyclip_loss.CyCLIPLoss).parameters)
    assert set(inspect.signature(open_clip.ClipLoss).parameters) <= keywords
