"""How many kernels a step launches, and that no batch makes Triton compile again."""

from collections.abc import Callable
from concurrent.futures import Executor

import pytest
import torch
from inputs import Case
from launches import launched_kernels, no_device
from torch import Tensor
from torch.nn.functional import softplus

from cyclip_loss import CyCLIPLoss, contrastive_logsumexp, reference


def shifted(x: Tensor, offset: int) -> Tensor:
    """A copy that starts `offset` elements after an aligned address."""
    moved = x.detach().new_empty(x.numel() + offset)[offset:].view(x.shape)
    return moved.copy_(x.detach())


def wide(x: Tensor, columns: int) -> Tensor:
    """A copy whose rows are `columns` elements further apart."""
    return x.detach().new_empty(len(x), x.shape[1] + columns)[:, : x.shape[1]].copy_(x.detach())


def step(*inputs: Tensor, ids: Tensor | None = None) -> None:
    loss = CyCLIPLoss(0.5, 0.25, impl="triton")
    loss(*(x.requires_grad_() for x in inputs), ids=ids).backward()


def compiled_binaries(dtype: torch.dtype, d: int) -> tuple[set[str], set[str]]:
    """The binaries of two aligned batches, and those that batches of other shapes add."""
    with no_device() as (_, binaries):
        for n in (64, 4096):
            step(*Case(n, d, dtype).inputs("cpu"))
            step(*Case(n, d, dtype).inputs("cpu"), ids=torch.arange(n))
        known = set(binaries)
        for n in (1, 2, 16, 63, 255, 257, 1000, 2049, 4099):
            step(*Case(n, d, dtype).inputs("cpu"))
        for n in (1, 16, 257):
            image, text, scale = Case(n, d, dtype).inputs("cpu")
            step(shifted(image, 1), shifted(text, 3), shifted(scale, 1))
            step(wide(image, 1), wide(text, 16), shifted(scale, 2))
            step(image, text, scale, ids=shifted(torch.arange(n), 1))
            step(image.T.contiguous().T, text[:1].expand(n, d), scale)
    return known, set(binaries) - known


def test_no_batch_makes_triton_compile_again(uninterpreted: Executor) -> None:
    """Batches of any size, stride and alignment use the binaries that two aligned batches made."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for d in (64, 70):
            known, added = uninterpreted.submit(compiled_binaries, dtype, d).result(timeout=900)
            assert len(known) >= 9
            assert added == set()


LAMBDAS = ((0.25, 0.25), (0.5, 0.25), (0, 0))


def launches_of_a_step(dtype: torch.dtype) -> list[tuple[str, int, int, int]]:
    """Of our loss by its lambdas, and of the dense formula: N, D and the number of launches."""
    losses: dict[str, Callable[..., Tensor]] = {
        str(lambdas): CyCLIPLoss(*lambdas, impl="triton") for lambdas in LAMBDAS
    }
    losses["dense"] = lambda *inputs: sum(reference.cyclip_loss(*inputs).values())
    return [
        (name, n, d, len(launched_kernels(loss, n, d, dtype)))
        for n, d in ((64, 128), (1000, 256), (3000, 512), (8192, 128))
        for name, loss in losses.items()
        if name != "dense" or n < 2000
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_step_launches_at_most_16_kernels(dtype: torch.dtype, uninterpreted: Executor) -> None:
    """Without penalties a step launches at most 8. The dense formula launches more than 60."""
    found = uninterpreted.submit(launches_of_a_step, dtype).result(timeout=900)
    assert len(found) == 14
    for name, n, d, launches in found:
        if name == "dense":
            assert launches > 60
        else:
            assert 0 < launches <= (8 if name == "(0, 0)" else 16), (n, d, launches, name)


def one_way(*inputs: Tensor) -> Tensor:
    row, _, pair = contrastive_logsumexp(*inputs, one_way=True, impl="triton")
    return softplus(row - pair).mean()


def both_ways(*inputs: Tensor) -> Tensor:
    row, column, pair = contrastive_logsumexp(*inputs, impl="triton")
    return (softplus(row - pair) + softplus(column - pair)).mean() / 2


@pytest.mark.parametrize(("loss", "most"), [(one_way, 17), (both_ways, 26)])
def test_a_loss_from_log_sum_exps_launches_at_most_17_kernels_or_26_if_symmetric(
    loss: Callable[..., Tensor], most: int, uninterpreted: Executor
) -> None:
    """7 and 13 of them belong to the PyTorch code of the two losses."""
    submitted = uninterpreted.submit(launched_kernels, loss, 1000, 256, torch.bfloat16)
    launched = submitted.result(timeout=900)
    assert 0 < len(launched) <= most
