"""The kernels where rows and columns have ids: equal ones are no negatives, but for pairs."""

import importlib
from functools import partial

import pytest
import torch
from accuracy import FACTOR
from conftest import needs_interpreter, needs_triton
from inputs import loss_dtype, pairs
from torch import Tensor

from cyclip_loss import CyCLIPLoss, eager, kernels, reference

pytestmark = needs_triton
lse_module, grads_module = (
    importlib.import_module(f"cyclip_loss.kernels.contrastive_{name}") for name in ("lse", "grads")
)
SCALE = 20.0
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def some_ids(count: int, seed: int, device: torch.device) -> Tensor:
    """One of 9 each, some of which differ in half of their bits only; 8 bytes off a base."""
    generator = torch.Generator().manual_seed(seed)
    low, high = torch.randint(0, 3, (2, count + 1), generator=generator, device="cpu")
    return (low - 1 + (high - 1) * 2**32)[1:].to(device)


def assert_within(actual: Tensor, exact: Tensor, bound: Tensor | float) -> None:
    """Infinities are equal."""
    actual = actual.double()
    assert actual.shape == exact.shape
    assert ((actual == exact) | ((actual - exact).abs() <= bound)).all()


@DTYPES
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("first_column", [33, 100, -50])
def test_rows_and_columns_of_other_ids(
    first_column: int, symmetric: bool, dtype: torch.dtype, device, monkeypatch
) -> None:
    """n != m, strips of rows, blocks of G, some rows without a partner: against float64."""
    monkeypatch.setattr(lse_module, "PARTIAL_ELEMENTS", 1)
    monkeypatch.setattr(grads_module, "BLOCK_ROWS", 32)
    monkeypatch.setattr(grads_module, "BLOCK_ELEMENTS", 1)
    n, m, d = 70, 130, 40
    image, text = (x.to(dtype) for x in pairs(m, d, 1.0, device=device))
    image = image[:n]
    ids = some_ids(n, 0, device), some_ids(m, 1, device)
    scale = torch.tensor(SCALE, device=device)

    actual = kernels.contrastive_lse(image, text, scale, first_column, symmetric, ids)
    wide = image.double(), text.double(), scale.double()
    exact = eager.contrastive_lse(*wide, first_column, symmetric, ids)
    cosines = wide[0].abs() @ wide[1].abs().T
    rounding = FACTOR * torch.finfo(torch.float32).eps * (5 + SCALE * cosines.max())
    for mine, right in zip(actual, exact, strict=True):
        assert_within(mine, right, rounding)

    row_lse = torch.logaddexp(exact[0], exact[2])
    column_lse = exact[1] + 0.5
    pair_gradient = torch.linspace(-2.0, -0.5, n, dtype=torch.float64, device=device)
    settings = (0.5 / n, first_column, symmetric, [True] * 3, False, ids)
    sums = row_lse, column_lse, pair_gradient, scale.double() / 15
    actual = kernels.contrastive_grads(image, text, scale, *(x.float() for x in sums), *settings)
    exact = eager.contrastive_grads(*wide, *sums, *settings)
    # |G|, with which errors are summed up.
    logits = SCALE * wide[0] @ wide[1].T
    g = (logits - row_lse[:, None]).exp()
    if symmetric:
        g += (logits - column_lse).exp()
    g = g.masked_fill(ids[0][:, None] == ids[1], 0.0)
    row, column = torch.arange(n, device=device), torch.arange(m, device=device)
    g = torch.where(row[:, None] + first_column == column, pair_gradient.abs()[:, None], g)
    stored = torch.finfo(dtype).eps
    weight = sums[-1] * settings[0]
    errors = weight * SCALE * (rounding + FACTOR * stored) * g
    tiny = torch.finfo(dtype).smallest_normal * stored
    assert_within(actual[0], exact[0], errors @ wide[1].abs() + tiny)
    assert_within(actual[1], exact[1], errors.T @ wide[0].abs() + tiny)
    assert_within(actual[2], exact[2], weight * rounding * (g * cosines).sum())


@DTYPES
def test_the_loss(dtype: torch.dtype, device) -> None:
    """Against the dense formula in float64, penalties included."""
    n = 100
    image, text = (x.to(dtype) for x in pairs(n, 24, 0.5, device=device))
    ids = some_ids(n, 0, device)
    ids[::3] = torch.arange(0, n, 3, device=device)  # some that no other row has
    results = []
    mine = partial(CyCLIPLoss(impl="triton"), output_dict=True)
    for loss, of in ((mine, dtype), (reference.cyclip_loss, torch.float64)):
        leaves = [image.to(of, copy=True), text.to(of, copy=True)]
        leaves.append(torch.tensor(SCALE, dtype=loss_dtype(of), device=device))
        terms = loss(*(x.requires_grad_() for x in leaves), ids=ids)
        value = sum(terms.values())
        results.append([value.detach(), *torch.autograd.grad(value, leaves)])
    rounding = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps * (5 + SCALE))
    for result, right in zip(*results, strict=True):
        assert_within(result, right, FACTOR * rounding * right.abs().max())


@needs_interpreter
@DTYPES
def test_different_ids_change_nothing(dtype: torch.dtype, device) -> None:
    """The same bits; but ds, whose parts are added up in another order."""
    image, text = (x.to(dtype) for x in pairs(100, 40, 0.5, device=device))
    ids = torch.arange(100, device=device).flip(0)
    scale = torch.tensor(SCALE, device=device)
    without, with_ids = (
        kernels.contrastive_lse(image, text, scale, 0, True, of) for of in (None, (ids, ids))
    )
    assert all(map(torch.equal, without, with_ids))
    arguments = (image, text, scale, *without, scale, 0.01, 0, True, [True] * 3, False)
    without, with_ids = (kernels.contrastive_grads(*arguments, of) for of in (None, (ids, ids)))
    assert all(map(torch.equal, without[:2], with_ids[:2]))
    torch.testing.assert_close(with_ids[2], without[2], rtol=1e-5, atol=0)


@DTYPES
def test_no_negatives_at_all(dtype: torch.dtype, device) -> None:
    image, text = (x.to(dtype) for x in pairs(100, 24, 0.5, device=device))
    leaves = [image, text, torch.tensor(SCALE, device=device)]
    ids = torch.full((100,), 2**40, device=device)
    loss = CyCLIPLoss(0, 0, impl="triton")(*(x.requires_grad_() for x in leaves), ids=ids)
    assert loss.item() == 0
    for grad in torch.autograd.grad(loss, leaves):
        assert not grad.any()
