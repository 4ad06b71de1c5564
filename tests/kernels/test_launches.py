"""How many kernels a step launches, and that no batch makes Triton compile again.

Without a GPU: launches are only recorded.
"""

from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import triton
from accuracy import function_of
from inputs import INPUTS, LAYOUTS, Case
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from cyclip_loss import numerics
from cyclip_loss.engines import triton as kernels
from cyclip_loss.kernels import configs

# Operators besides views that launch no kernel: they allocate, or read or write a CPU scalar.
NO_KERNEL = {
    "empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "_unsafe_view",
    "scalar_tensor", "_local_scalar_dense", "lift_fresh",
}  # fmt: skip


class PyTorchLaunches(TorchDispatchMode):
    """Records the names of PyTorch's operators that launch a kernel.

    Computes no product and no copy of a matrix, which takes long on a CPU. `largest` is the most
    elements of a result.
    """

    def __init__(self):
        super().__init__()
        self.names, self.largest = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = self.result(func, args, kwargs)
        self.largest = max(self.largest, getattr(result, "numel", int)())
        return result

    def result(self, func, args, kwargs):
        name = func.overloadpacket.__name__
        if not func.is_view and name not in NO_KERNEL:
            self.names.append(name)
        if func is torch.ops.aten.mm.default:
            left, right = args
            return left.new_empty(left.shape[0], right.shape[1])
        if func is torch.ops.aten.addmm_.default:
            return args[0]
        if func is torch.ops.aten._to_copy.default and args[0].ndim == 2:
            return torch.empty_like(args[0], dtype=kwargs.get("dtype"))
        return func(*args, **(kwargs or {}))


# A driver that tells Triton that the device is an H100.
H100 = SimpleNamespace(
    get_current_device=lambda: 0,
    get_current_stream=lambda device: 0,
    get_current_target=lambda: GPUTarget("cuda", 90, 32),
)


@contextmanager
def no_device():
    """Lets the Triton engine take CPU tensors. Launches are only recorded, so results are garbage.

    Yields the counter. Its names have what identifies the binary, if it is one of Triton's. It does
    not work in Triton's interpreter.
    """

    def record(*, key, fn, **_):
        counter.names.append(f"{fn.name} {key}")
        return True  # nothing to compile or launch

    driver.set_active(H100)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton.knobs.runtime, "jit_cache_hook", record)
        patch.setattr(kernels, "INTERPRETED", True)
        patch.setattr(configs, "architecture", lambda device: "sm_90")
        patch.setattr(numerics, "STRIP_ELEMENTS", {})  # strips as long as a GPU's
        with PyTorchLaunches() as counter:
            yield counter


def step(counter, case, **changes):
    """The number of launches of a training step, or of a forward if nothing is trained."""
    given, function = case.arguments("cpu") | changes, function_of(case, "triton")
    trained = [x for name, x in given.items() if x.is_floating_point() and name not in case.frozen]
    for x in trained:
        x.requires_grad_()
    function(**given)  # a module's first call checks more
    before = len(counter.names)
    loss = function(**given)
    if trained:
        loss.backward()
    return len(counter.names) - before


def shifted(x):
    """A copy that starts one element after an aligned address."""
    return F.pad(x.detach().flatten(), (1, 0))[1:].view(x.shape)


def compiled_binaries(dtype, d):
    """The binaries of two aligned batches, and those that batches of other shapes add."""
    binaries = []
    with no_device() as counter:
        for sizes in ((64, 4096), (1, 2, 16, 63, 255, 257, 1000, 2049, 4099)):
            for n in sizes:
                case = Case(n, d, dtype, lambdas=(0.5, 0.25))
                step(counter, case)
                step(counter, case, ids=torch.arange(n))
                for layout in LAYOUTS if n in (1, 16, 257) else []:
                    other = replace(case, image_layout=layout, text_layout=layout)
                    scale = shifted(case.inputs("cpu")[2])
                    step(counter, other, logit_scale=scale, ids=shifted(torch.arange(n)))
            binaries.append({name for name in counter.names if " " in name})
    known, found = binaries
    return known, found - known


def test_no_batch_makes_triton_compile_again(uninterpreted):
    """Batches of any size, stride and alignment use the binaries that two aligned batches made."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for d in (64, 70):
            submitted = uninterpreted.submit(compiled_binaries, dtype, d)
            known, added = submitted.result(timeout=900)
            assert len(known) >= 7
            assert added == set()


def launches_of_a_step(case):
    with no_device() as counter:
        return step(counter, case), counter.largest


@pytest.mark.parametrize(
    ("options", "most"),
    [
        ({}, 29),  # one of them sums parts of the Gram matrices, from 2,048 pairs on
        ({"centered": True}, 33),
        ({"lambdas": (0.5, 0.25)}, 39),
        ({"lambdas": (0, 0)}, 19),
        ({"lambdas": (0, 0), "function": "siglip"}, 25),
        # 16 of them belong to the PyTorch code of the loss.
        ({"function": "log-sum-exps"}, 30),
    ],
    ids=str,
)
def test_a_step_launches_few_kernels(options, most, uninterpreted):
    """OpenCLIP's loss without penalties launches 30, the authors' formula 62."""
    for dtype in (torch.float32, torch.bfloat16):
        for n, d in ((64, 128), (1000, 256), (3000, 512), (8192, 128)):
            submitted = uninterpreted.submit(launches_of_a_step, Case(n, d, dtype, **options))
            assert 0 < submitted.result(timeout=900)[0] <= most, (n, d, dtype)


N, D = 65536, 4096


@pytest.mark.parametrize(
    ("options", "largest"),
    [
        ({"n": N, "d": 64, "lambdas": (0, 0)}, N * N / 16),
        ({"n": N, "d": 64, "lambdas": (0, 0), "frozen": INPUTS}, N * N / 128),
        ({"n": 3000, "d": D, "lambdas": (0.5, 0.25)}, 4 * D * D),
    ],
    ids=str,
)
def test_blocks_and_partial_sums_of_large_batches_are_bounded(options, largest, uninterpreted):
    """Blocks of G, parts of log-sum-exps, and parts of Gram matrices."""
    case = Case(dtype=torch.bfloat16, **options)
    _, found = uninterpreted.submit(launches_of_a_step, case).result(timeout=900)
    assert found <= largest
