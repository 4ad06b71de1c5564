"""What the kernels share: their arguments, tf32, the order of tiles, the product of a tile."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cyclip_loss.kernels.configs import INTERPRETED, ROUND
from cyclip_loss.numerics import on_device_of

# The interpreter's products of bfloat16 are wrong (seen in Triton 3.7 and 3.9). Products of 16-bit
# numbers are exact in float32, so it computes what the tensor cores do.
WIDENS = tl.constexpr(INTERPRETED)
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
GROUP = tl.constexpr(8)  # rows of tiles, in `grouped_tile`

# Triton can load 16 bytes at a time if it knows that a pointer is a multiple of this many bytes and
# that the stride between rows is a multiple of this many elements.
ALIGNMENT = 16


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up. (`triton.cdiv` takes 10 times as long on the host.)"""
    return -(-a // b)


def aligned_features(features: Tensor, multiple: int) -> Tensor:
    """The features with D zero-padded to a multiple, which changes no product, and rows aligned.

    A kernel without masks on D is simpler, and needs fewer registers. Features are copied unless D
    is a multiple already and rows are contiguous and aligned. Triton compiles a separate binary for
    an argument that is not a multiple of 16. For the base of the features or the stride between
    rows, this binary would spill registers and load one element at a time. It would also be
    compiled in the middle of training, at the first such batch.
    """
    n, d = features.shape
    if d % multiple:
        return torch.nn.functional.pad(features, (0, -d % multiple))
    row, within = features.stride()
    is_aligned = row % ALIGNMENT == 0 and features.data_ptr() % ALIGNMENT == 0
    if within == 1 and row >= d and is_aligned:
        return features
    # Not `contiguous()`: a single row is contiguous whatever its stride.
    return features.new_empty(n, d).copy_(features)


@triton.jit
def grouped_tile(row_tiles, column_tiles):
    """The (row, column) of this program's tile.

    Programs start in the order of their number. In groups of GROUP rows of tiles, programs that run
    at the same time cover an almost square block. So they read the same rows and columns while
    these are in the L2 cache.
    """
    program = tl.program_id(0)
    tiles_per_group = GROUP * column_tiles
    first_row = (program // tiles_per_group) * GROUP
    height = tl.minimum(row_tiles - first_row, GROUP)
    within = program % tiles_per_group
    return first_row + within % height, within // height


@triton.jit
def round_to_tf32(x):
    """float32 to the nearest value with a 10-bit mantissa, ties to even.

    The tensor cores drop the low 13 bits of a float32 operand, which makes every product smaller.
    Rounding first makes the error unbiased, and the interpreter, which drops no bits, computes what
    a GPU computes. Inf becomes NaN. A number above 2^115, whose square is Inf, becomes infinite.
    """
    # Rounding 8191 x drops the bits of x below its 10th. 8192 x is exact, so the difference is x
    # without those bits. The fma is explicit: if 8191 x were fused instead, the result would be x.
    return tl.fma(x, 8192.0, x * -8191.0)


@triton.jit
def rounded_kernel(numbers, rounded, count, BLOCK: tl.constexpr):
    """Round float32 numbers to tf32; `rounded` may be `numbers`. count: a multiple of 16."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(numbers + index, mask=index < count)
    tl.store(rounded + index, round_to_tf32(x), mask=index < count)


def operand(features: Tensor, tile: dict[str, Any]) -> Tensor:
    """The features as `tile_product` reads them: aligned and, in tf32, rounded.

    The rounded ones are a float32 copy, the only one also where alignment needs a copy.
    """
    aligned = aligned_features(features, tile["BK"])
    if features.dtype != torch.float32 or tile["PRECISION"] != "tf32":
        return aligned
    aligned = aligned.contiguous()
    rounded = torch.empty_like(aligned) if aligned is features else aligned
    count = aligned.numel()
    with on_device_of(aligned):
        rounded_kernel[(ceil_div(count, ROUND.tile["BLOCK"]),)](
            aligned, rounded, count, **ROUND.kwargs
        )
    return rounded


@triton.jit
def u_and_v(image, text, sign, means, columns, d, valid, PRECISION: tl.constexpr):
    """U = I + T and V = I - T in float32, less their means, rounded for the products.

    sign: of T, and so 1 or, to swap U and V, -1. means: (2, d), of the images and of the texts; or
    None. valid: which rows there are. Past the end, U and V are 0, and not less than 0 by a mean.
    """
    text *= sign
    u = image + text
    v = image - text
    if means is not None:
        image_mean = tl.load(means + columns)[None, :]
        text_mean = tl.load(means + d + columns)[None, :] * sign
        u = tl.where(valid, u - (image_mean + text_mean), 0.0)
        v = tl.where(valid, v - (image_mean - text_mean), 0.0)
    if PRECISION == "tf32":
        u = round_to_tf32(u)
        v = round_to_tf32(v)
    return u, v


@triton.jit
def _halves(tile, BM: tl.constexpr, BN: tl.constexpr):
    return tl.split(tl.permute(tl.reshape(tile, (BM, 2, BN // 2)), (0, 2, 1)))


@triton.jit
def split(tile, BM: tl.constexpr, BN: tl.constexpr, PARTS: tl.constexpr):
    """The tile (BM, BN) in 1, 2 or 4 parts, from left to right, which need fewer registers."""
    if PARTS == 1:
        return (tile,)
    else:
        left, right = _halves(tile, BM, BN)
        if PARTS == 2:
            return left, right
        else:
            a, b = _halves(left, BM, BN // 2)
            c, d = _halves(right, BM, BN // 2)
            return a, b, c, d


@triton.jit
def tile_product(
    a,  # (n, d), rows `a_stride` apart, contiguous within a row
    b,  # (m, d), rows `b_stride` apart
    n,
    m,
    d,  # a multiple of BK
    a_stride,
    b_stride,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PARTS: tl.constexpr,
):
    """The (row, column) of this program's tile, and the parts of the tile (BM, BN) of a b^T.

    The parts are float32, from left to right. Past the end of a or b its last row is read again;
    the caller masks these values. For tf32 the operands are rounded before the launch (`operand`):
    rounded here, in registers, they would go back to shared memory, and each wgmma would wait for
    that.
    """
    row_tile, column_tile = grouped_tile(tl.cdiv(n, BM), tl.cdiv(m, BN))
    row = tl.minimum(row_tile * BM + tl.arange(0, BM), n - 1)
    column = tl.minimum(column_tile * BN + tl.arange(0, BN), m - 1)
    inner = tl.arange(0, BK)
    a_pointers = (a + row.to(tl.int64) * a_stride)[:, None] + inner[None, :]
    b_pointers = (b + column.to(tl.int64) * b_stride)[None, :] + inner[:, None]
    product = tl.zeros((BM, BN), dtype=tl.float32)
    for _ in range(0, d, BK):
        a_block = tl.load(a_pointers)
        b_block = tl.load(b_pointers)
        if WIDENS:
            a_block = a_block.to(tl.float32)
            b_block = b_block.to(tl.float32)
        product = tl.dot(a_block, b_block, product, input_precision=PRECISION)
        a_pointers += BK
        b_pointers += BK
    return row_tile, column_tile, split(product, BM, BN, PARTS)


@triton.jit
def sum_of(tile):
    """The sum of a tile, rows first. Of products: `sum_of_products`."""
    return tl.sum(tl.sum(tile, axis=1), axis=0)


@triton.jit
def sum_of_products(a, b):
    """The sum of a * b, rows first.

    `fma(a, b, 0)` rounds each product before it is added. Otherwise the compiler fuses a thread's
    own product but not one from another thread, and the threads get different sums.
    """
    return sum_of(tl.fma(a, b, 0.0))


@triton.jit
def same_ids(row_ids, column_ids, rows, columns, n, m):
    """Which rows and columns have equal ids; arbitrary past the end."""
    row_id = tl.load(row_ids + tl.minimum(rows, n - 1))
    column_id = tl.load(column_ids + tl.minimum(columns, m - 1))
    return row_id[:, None] == column_id[None, :]


@triton.jit
def softplus(x):
    """log(1 + exp(x)), accurate also if the exponential is much smaller than 1."""
    # Not `maximum`, which would lose a NaN.
    positive = tl.where(x > 0.0, x, 0.0)
    exp = tl.exp(-tl.abs(x))
    above_1 = 1.0 + exp
    # The quotient corrects the rounding of 1 + exp (the textbook log1p).
    return positive + tl.where(above_1 == 1.0, exp, tl.log(above_1) * (exp / (above_1 - 1.0)))


@triton.jit
def sigmoid(x):
    exp = tl.exp(-tl.abs(x))
    return tl.where(x > 0.0, 1.0, exp) / (1.0 + exp)
