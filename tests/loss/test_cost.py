"""No N x N matrix of a large batch, and as many flops as the formulas say.

The detector of matrices is `benchmarks.memory.allocations`, which is shown to see those of the
dense formula. It sees the memory of the CPU; what a GPU holds is in `test_cuda.py`.
"""

import pytest
import torch
from accuracy import results
from conftest import set_strip_rows
from inputs import Case
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.memory import allocations, peak_of
from cyclip_loss import CyCLIPLoss, consistency_metrics, cyclip_loss, reference

# An interpreted kernel is too slow for the first.
N, N_INTERPRETED, D = 4096, 256, 32


@pytest.fixture
def inputs(impl: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    if device.type != "cpu":
        pytest.skip("of the CPU's memory")
    set_strip_rows(monkeypatch, 64)
    case = Case(N if impl == "eager" else N_INTERPRETED, D)
    return [tensor.requires_grad_() for tensor in case.inputs("cpu")]


def test_forward_and_backward_never_hold_n_by_n(impl: str, inputs: list[Tensor]) -> None:
    n = len(inputs[0])
    square, strip, features = 4 * n * n, 4 * 64 * n, 4 * n * D
    events = allocations(lambda: cyclip_loss(*inputs, lambda_inmodal=0.5, impl=impl).backward())
    # The largest tensor is a strip or as large as the features; at any time there are a few, and a
    # dozen vectors of N.
    assert max(events) <= max(strip, features)
    assert peak_of(events) <= 4 * strip + 6 * features + 12 * 4 * n
    assert peak_of(events) * 6 <= square or impl != "eager"
    if impl == "eager":
        events = allocations(lambda: consistency_metrics(*inputs[:2]))
        assert max(events) <= 2 * max(strip, features)
        assert peak_of(events) * 3 <= square


def test_the_detector_sees_the_dense_formula(device: torch.device) -> None:
    if device.type == "cpu":
        leaves = [tensor.requires_grad_() for tensor in Case(512, D).inputs("cpu")]
        events = allocations(lambda: sum(reference.cyclip_loss(*leaves).values()).backward())
        assert peak_of(events) >= 4 * max(events) >= 16 * 512**2


@pytest.mark.parametrize(("lambda_inmodal", "grams"), [(0.5, 3), (0.25, 2)])
def test_kept_between_forward_and_backward(impl: str, inputs, lambda_inmodal, grams: int) -> None:
    """New memory after forward: three vectors, the Gram matrices that are needed, the scalars."""
    events = allocations(lambda: cyclip_loss(*inputs, lambda_inmodal=lambda_inmodal, impl=impl))
    # The allocator may round each of a dozen tensors up to 64 bytes.
    assert sum(events) <= 4 * (3 * len(inputs[0]) + grams * D * D) + 1024


class CountFlops(TorchDispatchMode):
    """Of matrix products; PyTorch's own counter leaves out those in place."""

    total = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        name = function.overloadpacket.__name__
        if name in ("mm", "addmm", "addmm_"):
            left, right = arguments[-2:]
            self.total += 2 * left.shape[0] * left.shape[1] * right.shape[1]
        else:
            assert name not in ("bmm", "matmul", "einsum", "baddbmm"), name
        return function(*arguments, **(keywords or {}))


@pytest.mark.parametrize(
    ("n", "d", "lambdas", "expected"),
    [
        # Large: 8 N^2 D for the contrastive term, 8 N D^2 for the penalties, 14 if they differ.
        (40, 12, (0, 0), (8, 0)),
        (40, 12, (0.25, 0.25), (8, 8)),
        (40, 12, (0.25, 0.5), (8, 14)),
        # Small: 6 N^2 D a term.
        (24, 12, (0, 0), (6, 0)),
        (24, 12, (0.25, 0.25), (12, 0)),
        (24, 12, (0.25, 0.5), (12, 0)),
    ],
)
def test_flops(n: int, d: int, lambdas, expected, small_strips, device: torch.device) -> None:
    with CountFlops() as counter:
        results(CyCLIPLoss(*lambdas, impl="eager"), *Case(n, d).inputs(device))
    assert counter.total == expected[0] * n * n * d + expected[1] * n * d * d
