"""The kernels after a sweep, against their formulas in float64."""

import pytest
import torch
from conftest import needs_triton
from inputs import lay_out, normal
from torch import Tensor

from cyclip_loss import eager, kernels
from cyclip_loss.kernels import products

pytestmark = needs_triton


def negatives_and_pairs(
    n: int, first_column: int, m: int, spread: float, device: torch.device
) -> list[Tensor]:
    """row_negatives, column_negatives, pair_logits and column_pair_logits, float32."""
    generator = torch.Generator().manual_seed(0)
    rows, columns, of_columns = (
        spread * torch.randn(size, generator=generator, device="cpu") for size in (n, m, m)
    )
    return [
        x.to(device)
        for x in (rows, columns, of_columns[first_column : first_column + n], of_columns)
    ]


@pytest.mark.parametrize("spread", [1.0, 30.0, 1e4])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("n", "first_column", "m"), [(1, 0, 1), (5, 3, 11), (2049, 1500, 5000)])
def test_pair_terms(
    n: int, first_column: int, m: int, symmetric: bool, spread: float, device
) -> None:
    """Against float64, whose inputs are the same float32 numbers."""
    inputs = negatives_and_pairs(n, first_column, m, spread, device)
    if not symmetric:
        inputs[1] = inputs[1][:0]
    actual = kernels.pair_terms(*inputs, first_column, 0.5 / n)
    exact = eager.pair_terms(*(x.double() for x in inputs), first_column, 0.5 / n)
    # Two roundings of a difference of numbers as large as `spread`, and of the exponential of it;
    # log-sum-exps may be near 0.
    rounding = 4 * spread * torch.finfo(torch.float32).eps
    for mine, right, atol in zip(actual, exact, (1e-30, rounding, rounding, 1e-30), strict=True):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine.double(), right, rtol=2e-5, atol=atol)


@pytest.mark.parametrize(("chunk_columns", "chunks"), [(96, 0), (40, 2), (8, 8), (1, 32)])
def test_a_few_rows_against_many_columns(
    chunk_columns: int, chunks: int, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    """The sum over columns in chunks is the sum, whatever chunks there are."""
    monkeypatch.setattr(products, "CHUNK_COLUMNS", chunk_columns)
    a, b = normal(6, 96, device=device).float(), normal(96, 10, seed=1, device=device).float()
    a = lay_out(a, "rows 8 elements wider")  # as a block of G is
    summed, batched = [], Tensor.sum
    count = lambda x, *args, **named: summed.append(len(x)) or batched(x, *args, **named)  # noqa: E731
    monkeypatch.setattr(Tensor, "sum", count)
    actual = products.product_over_columns(a, b, torch.float32)
    assert summed == [chunks] * (chunks > 0)
    torch.testing.assert_close(actual.double(), a.double() @ b.double(), rtol=1e-5, atol=1e-5)
