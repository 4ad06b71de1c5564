"""What the engines share: their arguments, the dtype of sums, wide products, strips of rows."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Elements of one strip. On CPU 2^22 float32 are 16 MB: strips of 512 rows at N = 8,192, tall enough
# for the full speed of the matrix products (256 rows or fewer cost up to a quarter more there).
# Other devices need 2^26 elements to be busy.
STRIP_ELEMENTS = {"cpu": 2**22}
STRIP_ELEMENTS_OTHER_DEVICES = 2**26
# With fewer rows a matrix product is not efficient, however wide the strip.
MIN_STRIP_ROWS = 64


class Logits(NamedTuple):
    """The logits l_ij = logit_scale * rows_i . columns_j of a contrastive term.

    Row i is paired with column `first_column + i`, if that exists. Its negatives are all other
    columns except those with its id.
    """

    rows: Tensor  # (n, D)
    columns: Tensor  # (m, D)
    logit_scale: Tensor  # scalar of the accumulation dtype
    row_ids: Tensor | None = None  # (n,), int64, or None: ids do not matter
    column_ids: Tensor | None = None  # (m,), or None: the rows'
    first_column: int = 0
    symmetric: bool = True  # whether columns have log-sum-exps, too, or only rows

    @property
    def ids(self) -> tuple[Any, Any]:
        """The ids of the rows and of the columns, or two None."""
        return self.row_ids, self.row_ids if self.column_ids is None else self.column_ids

    def same_ids(self, start: int, stop: int) -> Tensor | None:
        """Which of these rows and which columns have the same id: (stop - start, m)."""
        of_rows, of_columns = self.ids
        return None if of_rows is None else of_rows[start:stop, None] == of_columns

    def block(self, start: int, stop: int, left: int = 0, right: int | None = None) -> "Logits":
        """Rows `start` to `stop` and columns `left` to `right`."""
        of_rows, of_columns = self.ids
        return self._replace(
            rows=self.rows[start:stop],
            columns=self.columns[left:right],
            row_ids=None if of_rows is None else of_rows[start:stop],
            column_ids=None if of_columns is None else of_columns[left:right],
            first_column=self.first_column + start - left,
        )


class Lse(NamedTuple):
    """Log-sum-exps of all logits of a row or column, and the gradient of the pairs."""

    rows: Tensor  # (n,)
    columns: Tensor  # (m,), empty unless `Logits.symmetric`
    # (n,): the sum of exp(pair logit - log-sum-exp) - 1 for a row and its paired column.
    pair_gradient: Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums, log-sum-exps and losses for features of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def float32_is_exact() -> bool:
    """Whether PyTorch's settings ask for full float32 products, not tf32."""
    try:
        return torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # set by the newer name, fp32_precision: reading the older one raises
        return torch.backends.cuda.matmul.fp32_precision not in ("tf32", "bf16")


def strip_rows(columns: int, device: torch.device) -> int:
    """The number of rows, of `columns` elements each, in one strip."""
    elements = STRIP_ELEMENTS.get(device.type, STRIP_ELEMENTS_OTHER_DEVICES)
    return max(MIN_STRIP_ROWS, elements // columns)


def has_wide_products(features: Tensor) -> bool:
    """Whether PyTorch multiplies 16-bit matrices of this dtype and device into a float32 one.

    On a CPU they are widened instead, which keeps all digits of G.
    """
    return features.dtype.itemsize == 2 and not features.is_cpu and _can(_multiply, features)


def _can(operation: Callable[[Tensor], Any], features: Tensor) -> bool:
    """Whether an operation on a small matrix of this dtype and device works; it is tried once."""
    # With float16 accumulation PyTorch refuses a float32 result.
    setting = torch.backends.cuda.matmul.allow_fp16_accumulation
    return _is_possible(operation, features.device, features.dtype, setting)


@lru_cache
def _is_possible(
    operation: Callable[[Tensor], Any], device: torch.device, dtype: torch.dtype, setting: bool
) -> bool:
    try:
        operation(torch.ones(16, 16, dtype=dtype, device=device))
    except (RuntimeError, TypeError):  # NotImplementedError is a RuntimeError
        return False
    return True


def _multiply(a: Tensor) -> None:
    product = torch.mm(a, a, out_dtype=torch.float32)
    torch.mm(a, a, out_dtype=torch.float32, out=product)
    torch.bmm(a[None], a[None], out_dtype=torch.float32)


def _multiply_and_add(a: Tensor) -> None:
    total = torch.zeros_like(a, dtype=torch.float32)
    torch.addmm(total, a, a, out_dtype=torch.float32, out=total)


def matmul(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a b, or a batch of products. dtype: the result's; if it is wider than a's, also the sums'."""
    if dtype == a.dtype:
        return torch.matmul(a, b)
    if has_wide_products(a):
        return (torch.mm if a.ndim == 2 else torch.bmm)(a, b, out_dtype=dtype)
    return torch.matmul(a.to(dtype), b.to(dtype))


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b, summed in total's dtype."""
    if a.dtype != total.dtype and has_wide_products(a):
        if _can(_multiply_and_add, a):  # not before PyTorch 2.11
            torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
        else:
            total += matmul(a, b, total.dtype)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))
