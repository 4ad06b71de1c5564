"""The losses in place of OpenCLIP's: same arguments, values and training, few imports."""

import inspect
from functools import partial

import numpy as np
import pytest
import torch
from accuracy import results
from inputs import Case
from processes import ROOT, run_python

from cyclip_loss import ClipLoss, CyCLIPLoss, CySigLIPLoss, SigLipLoss

open_clip = pytest.importorskip("open_clip")

THEIRS = {"ClipLoss": open_clip.ClipLoss, "SigLipLoss": open_clip.loss.SigLipLoss}
# The keywords with which OpenCLIP's `create_loss` calls ClipLoss.
FLAGS = {"local_loss": True, "gather_with_grad": True, "cache_labels": True, "use_horovod": False}


def parameters(loss_class):
    """The names and defaults of a constructor's arguments, in order."""
    given = inspect.signature(loss_class).parameters.values()
    return [(parameter.name, parameter.default) for parameter in given]


@pytest.mark.parametrize("ours", [ClipLoss, SigLipLoss])
def test_the_constructor_takes_open_clips_arguments_by_position(ours):
    expected = parameters(THEIRS[ours.__name__])
    assert parameters(ours)[: len(expected)] == expected


FLAGS_BY_POSITION = (True, True, True, 0, 1, False)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (CyCLIPLoss(0, 0), open_clip.ClipLoss()),
        (CyCLIPLoss(0, 0, **FLAGS), open_clip.ClipLoss(**FLAGS)),
        (ClipLoss(*FLAGS_BY_POSITION), open_clip.ClipLoss(*FLAGS_BY_POSITION)),
        (ClipLoss(impl="eager", uneven=True), open_clip.ClipLoss()),
        (CySigLIPLoss(), THEIRS["SigLipLoss"]()),
        (SigLipLoss(True, 0, 1, "shift"), THEIRS["SigLipLoss"](True, 0, 1, "shift")),
    ],
    ids=str,
)
def test_without_penalties_it_is_open_clips_loss(ours, theirs, device):
    inputs = Case(40, 8, torch.float64).inputs(device)
    for bias in (None, -10.0, 1.0):
        # `open_clip.ClipLoss` of 3.3 adds a tensor only.
        shift = {"logit_bias": bias and torch.tensor(bias, dtype=torch.float64, device=device)}
        found, expected = (results(partial(loss, **shift), *inputs) for loss in (ours, theirs))
        torch.testing.assert_close(found, expected)
    terms = ours(*inputs, **shift, output_dict=True)
    expected = theirs(*inputs, **shift, output_dict=True)
    torch.testing.assert_close(sum(terms.values()), expected["contrastive_loss"])
    if type(ours).__name__ == type(theirs).__name__:
        assert terms.keys() == expected.keys()
    for name, _ in parameters(type(theirs)):
        assert name == "dist_impl" or getattr(ours, name) == getattr(theirs, name), name
    ours.load_state_dict(theirs.state_dict())  # both have none


@pytest.mark.parametrize("loss_class", [CySigLIPLoss, SigLipLoss])
def test_siglips_loss_takes_open_clips_exchanges_and_chunks(loss_class):
    names = {None: "gather", "bidir": "ring", "shift": "ring", "reduce": "gather"}
    for theirs, ours in names.items():
        assert loss_class(dist_impl=theirs).dist_impl == ours
    assert loss_class().dist_impl == "gather"
    assert loss_class(chunk_size=0).chunk_size == 0  # the main branch's default


def test_logit_bias_changes_no_value_and_gets_a_zero_gradient(impl, device):
    image, text, _ = Case(12, 4).inputs(device)
    loss = CyCLIPLoss(impl=impl)
    plain = loss(image, text, 10.0)
    for shape in ((), (1,)):
        bias = torch.full(shape, 1e4, requires_grad=True, device=device)
        shifted = loss(image, text, 10.0, bias)
        assert shifted.ndim == 0
        assert shifted == plain
        shifted.backward()
        assert torch.equal(bias.grad, torch.zeros(shape, device=device))


SCALE_TENSORS = [
    torch.tensor([10.0], dtype=torch.bfloat16, device="cpu"),
    torch.tensor([7.0, 10.0], device="cpu")[1].expand(1, 1),  # with a storage offset
]


@pytest.mark.filterwarnings("error:overflow encountered in cast")
@pytest.mark.parametrize("form", SCALE_TENSORS, ids=str)
def test_every_form_of_the_logit_scale_gives_the_same_loss(impl, form, device):
    """A tensor gets a gradient of its own shape and dtype. NumPy's numbers cause no warning."""
    image, text, plain = Case(20, 6).inputs(device)
    loss, logit_scale = CyCLIPLoss(impl=impl), form.to(device)
    value, _, _, scale_grad = results(loss, image, text, plain)
    found, _, _, grad = results(loss, image, text, logit_scale)
    assert (found.shape, grad.dtype, grad.shape) == ((), logit_scale.dtype, logit_scale.shape)
    rel = torch.finfo(logit_scale.dtype).eps + torch.finfo(plain.dtype).eps
    assert grad.item() == pytest.approx(scale_grad.item(), rel=rel)
    numpy_loss = CyCLIPLoss(np.float16(0.25), np.float32(0.25), impl=impl)
    from_numpy = numpy_loss(image, text, np.float16(10), np.float32(3))
    assert found == loss(image, text, 10) == value == from_numpy


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
# If anything keeps a destroyed group, Gloo's threads may abort a process that ends.
TWO_RANKS = """
import os, sys, tempfile, weakref, torch, torch.distributed as dist, cyclip_loss
assert not {"triton", "open_clip", "torch._dynamo"} & set(sys.modules)
file = tempfile.mktemp()
child = os.fork()
dist.init_process_group("gloo", f"file://{file}", rank=1 if child else 0, world_size=2)
features = torch.eye(3, requires_grad=True)
cyclip_loss.CyCLIPLoss()(features, features, 10.0).backward()
assert "cyclip_loss.engines.triton" not in sys.modules
group = weakref.ref(dist.group.WORLD)
dist.destroy_process_group()
assert group() is None
if child:
    assert os.wait()[1] == 0
"""


@pytest.mark.parametrize("program", [WITHOUT_DISTRIBUTED, TWO_RANKS])
def test_the_loss_on_a_cpu_needs_neither_triton_nor_dynamo_nor_distributed(program):
    run = run_python("-c", program)
    assert run.returncode == 0, run.stderr


# `import kernels` in a clone, where a package of that name is installed. The kernels themselves are
# imported, too, and their modules have no second name.
OTHER_PACKAGE = """
import importlib.util, sys
if "loss first" in sys.argv:
    import cyclip_loss
import kernels
assert kernels.__file__.startswith(sys.path[1]), kernels
import cyclip_loss
if importlib.util.find_spec("triton"):
    import cyclip_loss.engines.triton
assert kernels is sys.modules["kernels"]
assert not [name for name in sys.modules if name.startswith("kernels.")]
"""


@pytest.mark.parametrize("order", ["loss first", "loss second"])
def test_a_clone_does_not_hide_an_installed_package_named_kernels(order, tmp_path):
    """Such as Hugging Face's, which transformers imports."""
    package = tmp_path / "kernels"
    package.mkdir()
    (package / "__init__.py").touch()
    program = f"import sys; sys.path[:0] = {[str(ROOT), str(tmp_path)]}\n{OTHER_PACKAGE}"
    run = run_python("-c", program, order)
    assert run.returncode == 0, run.stderr
