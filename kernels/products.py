"""Two steps of `logit_grads.py`: the sum that makes ds, and G T of a few long rows.

ds = weight * grad * the sum of the tiles' parts          dI = G T, in chunks of columns
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from cyclip_loss.kernels.launch import ceil_div
from cyclip_loss.numerics import matmul


@triton.jit(do_not_specialize=["length"], do_not_specialize_on_alignment=["grad", "scale_grad"])
def scale_grad_kernel(
    scale_partials,  # (length,)
    grad,  # scalar
    scale_grad,  # scalar out: weight * grad * the sum of all parts
    length,
    weight,
    BLOCK: tl.constexpr,
):
    """A single program, so that the sum has a fixed order."""
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, length, BLOCK):
        at = start + tl.arange(0, BLOCK)
        total += tl.load(scale_partials + at, mask=at < length, other=0.0)
    tl.store(scale_grad, tl.sum(total, axis=0) * weight * tl.load(grad))


# Fewer output tiles than FEW_TILES leave most of a GPU idle. A chunk of at least CHUNK_COLUMNS
# columns is worth a separate product.
FEW_TILES = 64
CHUNK_COLUMNS = 4096


def product_over_columns(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a b, (n, m) and (m, D), as in `matmul`, for m that may be much larger than n.

    The product of a rank's few rows with all columns has about a dozen output tiles, a tenth of
    what a GPU computes at once. So chunks of columns are multiplied separately, and added in order.
    """
    tiles = ceil_div(a.shape[0], 128) * ceil_div(b.shape[1], 256)
    chunks = 1
    while (
        tiles * chunks < FEW_TILES
        and a.shape[1] % (2 * chunks) == 0
        and a.shape[1] // (2 * chunks) >= CHUNK_COLUMNS
    ):
        chunks *= 2
    if chunks == 1:
        return matmul(a, b, dtype)
    a_chunks = a.unflatten(1, (chunks, -1)).transpose(0, 1)
    return matmul(a_chunks, b.unflatten(0, (chunks, -1)), torch.float32).sum(dim=0).to(dtype)
