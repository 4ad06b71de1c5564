"""The cost of the eager engine is what the formulas say: flops of matrix products, counted."""

import pytest
import torch
from inputs import pairs
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cyclip_loss import eager

N, D = 40, 12


class CountFlops(TorchDispatchMode):
    """PyTorch's own counter leaves out the in-place products."""

    total = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        name = function.overloadpacket.__name__
        if name in ("mm", "addmm", "addmm_"):
            left, right = arguments[-2:]
            self.total += 2 * left.shape[0] * left.shape[1] * right.shape[1]
        else:
            assert name not in ("bmm", "matmul", "einsum", "baddbmm"), name
        return function(*arguments, **(keywords or {}))


def flops(function, *arguments) -> int:
    with CountFlops() as counter:
        function(*arguments)
    return counter.total


@pytest.fixture
def features(device: torch.device) -> tuple[Tensor, Tensor]:
    return pairs(N, D, device=device)


def test_contrastive_term(features, small_strips: None) -> None:
    """8 N^2 D in all, and a frozen tower saves 2 N^2 D; the scale's gradient comes for N D."""
    scale = features[0].new_tensor(10.0)
    assert flops(eager.contrastive_lse, *features, scale, 0, True) == 2 * N * N * D
    lse = eager.contrastive_lse(*features, scale, 0, True)
    for needs, products in [((True, True), 6), ((True, False), 4), ((False, True), 4)]:
        for needs_scale in (True, False):
            cost = flops(
                eager.contrastive_grads,
                *(*features, scale, *lse, scale, 1.0, 0, True, [*needs, needs_scale], False),
            )
            assert cost == products * N * N * D


@pytest.mark.parametrize(
    ("direct", "with_cross", "expected"),
    [
        (True, True, 6 * N * N * D),
        (True, False, 6 * N * N * D),
        (False, True, 14 * N * D * D),
        (False, False, 8 * N * D * D),
    ],
)
def test_penalties(features, direct: bool, with_cross: bool, expected: int, small_strips) -> None:
    form = (direct, with_cross)
    cost = flops(eager.cyclic_statistics, *features, *form)
    statistics = eager.cyclic_statistics(*features, *form)
    coefficients = features[0].new_tensor([1.0, 0.5])
    cost += flops(eager.cyclic_grads, *features, statistics, coefficients, *form, [True, True])
    assert cost == expected
