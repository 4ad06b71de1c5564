"""What is made of a block of G: the library's products, with sums in float32, and one sum.

dI = G T          dT = G^T I          ds = w * sum of what the tiles of G left
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from cyclip_loss.eager import matmul
from cyclip_loss.kernels.configs import ceil_div


@triton.jit(do_not_specialize=["length"], do_not_specialize_on_alignment=["grad", "scale_grad"])
def scale_grad_kernel(
    scale_partials,  # (length,)
    grad,  # scalar
    scale_grad,  # scalar out: weight * grad * the sum of all
    length,
    weight,
    BLOCK: tl.constexpr,
):
    """One program, so that the sum has one order."""
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, length, BLOCK):
        at = start + tl.arange(0, BLOCK)
        total += tl.load(scale_partials + at, mask=at < length, other=0.0)
    tl.store(scale_grad, tl.sum(total, axis=0) * weight * tl.load(grad))


# Fewer output tiles than this leave most of a GPU idle; a chunk of at least this many columns is
# worth a program of its own.
FEW_TILES = 64
CHUNK_COLUMNS = 4096


def product_over_columns(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a b, (n, m) and (m, D), as `matmul`, where the sum over m may be much longer than n is.

    A rank's few rows against the columns of all make a dozen output tiles, a tenth of what a GPU
    computes at once. Then chunks of columns are products of their own, added up in one order.
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
