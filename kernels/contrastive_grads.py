"""Gradients of the contrastive term: a kernel computes blocks of G, the library multiplies them.

With l_ij = s * I_i . T_j, the vectors r, c of `SavedStatistics`, and w, its `upstream_scale`:

    G_ij = pair_gradient_i / w if column j is row i's partner, 0 if it has the same id,
           else exp(l_ij - r_i) + exp(l_ij - c_j)
    dI = w s G T          dT = w s G^T I          ds = w * sum_ij G_ij (I_i . T_j)

The kernel computes a block of logits again (2 n m D flops in all) and writes w s G in the features'
dtype (2^14 G for float16). The library multiplies it with the features (4 n m D), with sums in
float32 (of bfloat16 as `torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction` says).
If one block holds all of G, the products are the gradients.
"""

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cyclip_loss.kernels.configs import INTERPRETED, Config, config_for
from cyclip_loss.kernels.tiles import (
    LN_2,
    LOG2_E,
    ceil_div,
    operand,
    same_ids,
    sum_of_products,
    tile_product,
)
from cyclip_loss.logits import Gradients, Logits, SavedStatistics
from cyclip_loss.numerics import add_product, float16_shift, matmul, on_device_of

# A block of G has at most this many rows and elements, so 16,384 columns at full height: 512 MB in
# 16 bits, at every N. Both products of a block sum over thousands of elements. At D = 768 they have
# 384 output tiles of 128 x 256, which should fill 97% of 132 SMs (73% with half as many rows). From
# the second block on, a product is added to its float32 sums: 5 GB read and written at N = 65,536.
BLOCK_ROWS = 16384
BLOCK_ELEMENTS = 2**28


@triton.jit(
    do_not_specialize=["n", "m", "partner_offset"],
    do_not_specialize_on_alignment=[
        "logit_scale", "upstream_scale", "row_log_divisor", "column_log_divisor", "pair_gradient",
        "scale_partials", "row_ids", "column_ids",
    ],
)  # fmt: skip
def contrastive_grads_kernel(
    row_features,  # (n, d), rows `row_stride` apart
    column_features,  # (m, d), rows `column_stride` apart
    logit_scale,  # scalar
    row_ids,  # (n,) and (m,): G is 0 where they are equal, except for pairs; or both None
    column_ids,
    gradient,  # out: w s G in whole tiles, rows `gradient_stride` apart
    n,
    m,
    d,  # a multiple of BK
    row_stride,
    column_stride,
    gradient_stride,
    partner_offset,  # row i is paired with column i + partner_offset
    upstream_scale,  # w, a scalar
    row_log_divisor,  # r, (n,)
    column_log_divisor,  # c, (m,)
    pair_gradient,  # (n,): w G where row i has a partner
    scale_partials,  # (tiles,) out: w times the sum over the tile of G_ij (I_i . T_j)
    SYMMETRIC: tl.constexpr,
    SHIFT: tl.constexpr,  # if not 0, `gradient` is 2^SHIFT * G, without the factors
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PARTS: tl.constexpr,  # in how many parts a tile of G is computed from its logits
):
    row_tile, column_tile, parts = tile_product(
        row_features, column_features, n, m, d, row_stride, column_stride, PRECISION, BM, BN, BK,
        PARTS,
    )  # fmt: skip
    first_row = row_tile * BM
    logit_scale = tl.load(logit_scale)
    scale = logit_scale * LOG2_E
    factor = tl.load(upstream_scale) * logit_scale
    rows = first_row + tl.arange(0, BM)
    first_pair = first_row + partner_offset
    # The offset of the tile has 64 bits, offsets within it 32.
    tile_start = gradient + first_row.to(tl.int64) * gradient_stride
    tile_sum = 0.0
    WIDTH: tl.constexpr = BN // PARTS
    for part in tl.static_range(PARTS):
        start = column_tile * BN + part * WIDTH
        columns = start + tl.arange(0, WIDTH)
        # Past the end the last values are read again. The mask below drops their results.
        r = (tl.load(row_log_divisor + tl.minimum(rows, n - 1)) - SHIFT * LN_2) * LOG2_E
        g = tl.exp2(parts[part] * scale - r[:, None])
        if SYMMETRIC:
            c = (tl.load(column_log_divisor + tl.minimum(columns, m - 1)) - SHIFT * LN_2) * LOG2_E
            # Two exponentials per element. One shared exponential would need a branch, and the
            # branch spills registers.
            g += tl.exp2(parts[part] * scale - c[None, :])
        if row_ids is not None:
            g = tl.where(same_ids(row_ids, column_ids, rows, columns, n, m), 0.0, g)
        has_pairs = (first_pair < start + WIDTH) & (first_pair + BM > start)
        # Whole tiles are stored, with 0 outside the matrix, as a mask on columns would prevent wide
        # stores. The pairs share the branch: a branch of their own would spill registers.
        if has_pairs | (first_row + BM > n) | (start + WIDTH > m):
            partner = rows + partner_offset
            is_pair = partner[:, None] == columns[None, :]
            pair_value = tl.load(pair_gradient + rows, mask=rows < n, other=0.0)
            pair_g = pair_value * ((1 << SHIFT) / tl.load(upstream_scale))
            g = tl.where(is_pair, pair_g[:, None], g)
            g = tl.where((rows < n)[:, None] & (columns < m)[None, :], g, 0.0)
        # Also if the scale needs no gradient: without the sum, sm_100 spills registers with ids.
        tile_sum += sum_of_products(g, parts[part])
        within = tl.arange(0, BM)[:, None] * gradient_stride + columns[None, :]
        if SHIFT == 0:
            g *= factor
        tl.store(tile_start + within, g.to(gradient.dtype.element_ty))
    tl.store(scale_partials + tl.program_id(0), tile_sum * (tl.load(upstream_scale) / (1 << SHIFT)))


def num_tiles(logits: Logits, config: Config) -> int:
    """How many tiles cover the logits. Blocks of G consist of whole tiles."""
    n, m = logits.row_features.shape[0], logits.column_features.shape[0]
    return ceil_div(n, config.tile["BM"]) * ceil_div(m, config.tile["BN"])


def multiplied_blocks(
    kernel: Any,
    logits: Logits,
    config: Config,
    own_arguments: Callable[[int, int, int], tuple[Any, ...]],
    constants: dict[str, Any],
    needs: list[bool],
    factor: Tensor | None,
    grad_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The products of G with the features: (n, D) and (m, D), empty where not needed.

    kernel: writes a block of G, unless nothing is needed; `own_arguments(start, left, tiles)`: what
    it takes beside the block, which has rows from `start` and columns from `left` on, and comes
    after this many tiles; constants: its constexprs; factor: of the products.
    """
    needs_rows, needs_columns, *_ = needs
    row_features, column_features, *_ = logits
    bm, bn = config.tile["BM"], config.tile["BN"]
    aligned = logits._replace(
        row_features=operand(row_features, config.tile),
        column_features=operand(column_features, config.tile),
    )
    n, m = row_features.shape[0], column_features.shape[0]
    height = ceil_div(min(n, BLOCK_ROWS), bm) * bm
    width = min(max(1, BLOCK_ELEMENTS // (height * bn)), ceil_div(m, bn)) * bn
    buffer = row_features.new_empty(height, width) if any(needs) else None
    # If one block holds all of G, the products are the gradients. The interpreter always sums in
    # float32: on a CPU, PyTorch 2.8 sums a product of one bfloat16 row in bfloat16.
    is_sum = factor is not None or n > height or m > width or INTERPRETED
    dtype = torch.float32 if is_sum else grad_dtype
    row_grads: dict[int, Tensor] = {}  # by the first row of a strip
    column_grads: dict[int, Tensor] = {}  # by the first column of a block
    tiles = 0

    def add(totals: dict[int, Tensor], first: int, a: Tensor, b: Tensor) -> None:
        if first in totals:
            add_product(totals[first], a, b)
        else:
            totals[first] = matmul(a, b, dtype)

    def finished(total: Tensor) -> Tensor:
        return (total if factor is None else total.mul_(factor)).to(grad_dtype)

    def joined(parts: list[Tensor]) -> Tensor:
        if not parts:  # a new tensor: results of an operator must not be the same one
            return row_features.new_empty(0, dtype=grad_dtype)
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    for start in range(0, n, height):
        for left in range(0, m, width):
            block = aligned.block(start, start + height, left, left + width)
            a, b = block.row_features, block.column_features
            kernel[(num_tiles(block, config),)](
                a, b, block.logit_scale, block.row_ids, block.column_ids, buffer, a.shape[0],
                b.shape[0], a.shape[1], a.stride(0), b.stride(0), width, block.partner_offset,
                *own_arguments(start, left, tiles),
                SHIFT=float16_shift(row_features), **constants, **config.kwargs,
            )  # fmt: skip
            tiles += num_tiles(block, config)
            if buffer is None:
                continue
            gradient = buffer[: a.shape[0], : b.shape[0]]
            if needs_rows:
                add(row_grads, start, gradient, column_features[left : left + width])
            if needs_columns:
                add(column_grads, left, gradient.T, row_features[start : start + height])
        if needs_rows:
            row_grads[start] = finished(row_grads[start])
    return joined([*row_grads.values()]), joined([finished(x) for x in column_grads.values()])


def contrastive_grads(
    logits: Logits,
    saved: SavedStatistics,
    needs: list[bool],
    float32_grads: bool,
) -> Gradients:
    """As `eager.contrastive_grads`."""
    features = logits.row_features
    shift = float16_shift(features)
    # One way, too, larger parts would spill registers on sm_90.
    has_small_parts = logits.row_ids is not None or not logits.symmetric
    config = config_for("contrastive_grads", features, has_small_parts)
    tiles = num_tiles(logits, config)
    scale_partials = saved.row_log_divisor.new_empty(tiles)
    with on_device_of(features):
        row_grad, column_grad = multiplied_blocks(
            contrastive_grads_kernel,
            logits,
            config,
            lambda start, left, tiles_before: (
                saved.upstream_scale,
                saved.row_log_divisor[start:],
                saved.column_log_divisor[left:],
                saved.pair_gradient[start:],
                scale_partials[tiles_before:],
            ),
            {"SYMMETRIC": logits.symmetric},
            needs,
            saved.upstream_scale * logits.logit_scale * 2.0**-shift if shift else None,
            torch.float32 if float32_grads else features.dtype,
        )
        # In an order that is always the same.
        scale_grad = scale_partials.sum() if needs[2] else scale_partials.new_empty(0)
    return Gradients(row_grad, column_grad, scale_grad)
