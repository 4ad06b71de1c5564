"""No N x N matrix: what is kept between forward and backward, and the largest allocation.

The detector is `benchmarks.memory.allocations`, which is shown to see the matrices of the dense
formula. It sees the memory of the CPU; what a GPU holds is in `test_cuda.py`.
"""

import pytest
import torch
from conftest import set_strip_rows
from inputs import pairs
from torch import Tensor

from benchmarks.memory import allocations, peak_of
from cyclip_loss import consistency_metrics, cyclic, cyclip_loss, reference

# An interpreted kernel is too slow for the first.
N = {"eager": 4096}
N_OTHERS = 512
D = 32


@pytest.fixture(autouse=True)
def on_the_cpu(device: torch.device) -> None:
    if device.type != "cpu":
        pytest.skip("of the CPU's memory")


def make_inputs(impl: str) -> list[Tensor]:
    features = (f.float() for f in pairs(N.get(impl, N_OTHERS), D, device="cpu"))
    scale = torch.tensor(10.0, device="cpu")
    return [tensor.requires_grad_() for tensor in (*features, scale)]


def loss(inputs: list[Tensor], impl: str, lambda_inmodal: float = 0.5) -> Tensor:
    return cyclip_loss(*inputs, lambda_inmodal=lambda_inmodal, impl=impl)


def test_forward_and_backward_never_hold_n_by_n(impl: str, monkeypatch) -> None:
    set_strip_rows(monkeypatch, 64)
    inputs = make_inputs(impl)
    square = 4 * len(inputs[0]) ** 2
    strip = 4 * 64 * len(inputs[0])
    features = 4 * inputs[0].numel()
    events = allocations(lambda: loss(inputs, impl).backward())
    # The largest tensor is a strip or as large as the features; at any time there are a few, and a
    # dozen vectors of N.
    assert max(events) <= max(strip, features)
    assert max(events) * 32 <= square or impl != "eager"
    assert peak_of(events) <= 4 * strip + 6 * features + 12 * 4 * len(inputs[0])
    assert peak_of(events) * 6 <= square or impl != "eager"


def dense(inputs: list[Tensor]) -> Tensor:
    return sum(reference.cyclip_loss(*inputs).values())


def test_the_detector_sees_the_dense_formula() -> None:
    inputs = [tensor[:512] if tensor.ndim else tensor for tensor in make_inputs("eager")]
    square = 4 * 512**2
    events = allocations(lambda: dense(inputs).backward())
    assert max(events) >= square
    assert peak_of(events) >= 4 * square
    events = allocations(lambda: dense(inputs))
    assert sum(events) >= 3 * square


@pytest.mark.parametrize(("lambda_inmodal", "grams"), [(0.5, 3), (0.25, 2)])
def test_kept_between_forward_and_backward(
    impl: str, lambda_inmodal: float, grams: int, monkeypatch
) -> None:
    """New memory alive after forward: three vectors, the Gram matrices, the scalars.

    With equal lambdas the third Gram matrix is not even computed.
    """
    set_strip_rows(monkeypatch, 64)
    inputs = make_inputs(impl)
    n = len(inputs[0])
    events = allocations(lambda: loss(inputs, impl, lambda_inmodal))
    # The allocator may round each of a dozen tensors up to 64 bytes.
    assert sum(events) <= 4 * (3 * n + grams * D * D) + 1024


def test_saved_by_autograd(impl: str) -> None:
    """Nothing is saved but the inputs themselves and what the test above counts."""
    inputs = make_inputs(impl)
    saved = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss(inputs, impl)
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in saved}
    for tensor in inputs:
        storages.pop(tensor.untyped_storage().data_ptr(), None)
    total = sum(storage.nbytes() for storage in storages.values())
    assert 0 < total <= 4 * (3 * len(inputs[0]) + 3 * D * D) + 1024


@pytest.mark.parametrize("n", [20, 232])
def test_the_direct_form_is_no_larger_than_the_features(impl: str, n: int) -> None:
    """W = U V^T has N^2 elements, but is only taken where that is below 7/3 N D."""
    d = 100
    assert cyclic.direct_is_cheaper(n, d, True)
    image, text = (features.float().requires_grad_() for features in pairs(n, d, device="cpu"))
    events = allocations(
        lambda: cyclic.cyclic_penalties(image, text, 1.0, 0.5, False, impl)[0].backward()
    )
    assert max(events) <= 4 * 7 / 3 * n * d


def test_metrics(monkeypatch) -> None:
    set_strip_rows(monkeypatch, 64)
    image, text, _ = make_inputs("eager")
    events = allocations(lambda: consistency_metrics(image, text))
    square, strip = 8 * len(image) ** 2, 8 * 64 * len(image)
    assert max(events) <= max(strip, 8 * image.numel())
    assert peak_of(events) * 6 <= square
