"""Row and column log-sum-exps of the logits l_ij = s * I_i . T_j, one sweep over their tiles.

    r_i = log sum_j exp(l_ij)      c_j = log sum_i exp(l_ij)      l_ii for the pairs

2 n m D flops. A tile's program leaves one log-sum-exp per row and one per column of its tile;
PyTorch's `logsumexp` and `logaddexp` join them. So every sum has one order, no atomics are needed,
and the same inputs give the same bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from cyclip_loss.kernels.configs import Precision, config_for, launch_on, padded_rows
from cyclip_loss.kernels.tiles import LN_2, LOG2_E, grouped_tile, halves, tile_product

# The log-sum-exps that the tiles leave: per strip of rows, at most this many float32 of either
# kind (64 MB). At N = 65,536 that takes two strips with 128-row tiles.
PARTIAL_ELEMENTS = 2**24


@triton.jit
def _finite_reference(maximum):
    """The maximum, or 0 where nothing is within the matrix: log 0 = -inf then adds nothing."""
    return tl.where(maximum == -float("inf"), 0.0, maximum)


@triton.jit
def _tile_lse(
    product,  # (BM, BN)
    scale,
    row_partial,
    column_partial,
    pair_logits,
    first_row,
    first_column_of_tile,
    first_column,
    n,
    m,
    WITH_COLUMNS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    rows = first_row + tl.arange(0, BM)
    columns = first_column_of_tile + tl.arange(0, BN)
    # In units of log 2: exp2 is what the hardware has.
    logits = product * scale
    first_pair = first_row + first_column
    if (first_pair < first_column_of_tile + BN) & (first_pair + BM > first_column_of_tile):
        partner = rows + first_column
        is_pair = partner[:, None] == columns[None, :]
        pair = tl.sum(tl.where(is_pair, logits, 0.0), axis=1) * LN_2
        in_tile = (partner >= first_column_of_tile) & (partner < first_column_of_tile + BN)
        tl.store(pair_logits + rows, pair, mask=in_tile & (partner < m) & (rows < n))

    valid = (rows < n)[:, None] & (columns < m)[None, :]
    logits = tl.where(valid, logits, -float("inf"))
    # Two exponentials an element. One for both, relative to the tile's maximum, underflows for rows
    # and columns far below it, and the branch that saves them costs registers that spill.
    row_max = _finite_reference(tl.max(logits, axis=1))
    row_sum = tl.sum(tl.exp2(logits - row_max[:, None]), axis=1)
    tl.store(row_partial + rows, (row_max + tl.log2(row_sum)) * LN_2, mask=rows < n)
    if WITH_COLUMNS:
        column_max = _finite_reference(tl.max(logits, axis=0))
        column_sum = tl.sum(tl.exp2(logits - column_max[None, :]), axis=0)
        column_lse = (column_max + tl.log2(column_sum)) * LN_2
        tl.store(column_partial + columns, column_lse, mask=columns < m)


@triton.jit(do_not_specialize=["n", "m", "first_column"])
def contrastive_lse_kernel(
    image,  # (n, d), rows `image_stride` apart
    text,  # (m, d), rows `text_stride` apart
    logit_scale,  # scalar
    row_partials,  # (column tiles * PARTS, n) out
    column_partials,  # (row tiles, m) out
    pair_logits,  # (n,) out, where row i has a partner
    n,
    m,
    d,  # a multiple of BK
    image_stride,
    text_stride,
    first_column,  # row i is paired with column first_column + i
    WITH_COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PARTS: tl.constexpr,  # 1 or 2: a tile's log-sum-exps are taken at once or by halves
    GROUP: tl.constexpr,
):
    row_tile, column_tile = grouped_tile(tl.cdiv(n, BM), tl.cdiv(m, BN), GROUP)
    # Past the end the last row is read again, and masked after the product.
    row = tl.minimum(row_tile * BM + tl.arange(0, BM), n - 1)
    column = tl.minimum(column_tile * BN + tl.arange(0, BN), m - 1)
    product = tile_product(
        image + row.to(tl.int64) * image_stride,
        text + column.to(tl.int64) * text_stride,
        d,
        PRECISION,
        WIDEN,
        BM,
        BN,
        BK,
    )
    scale = tl.load(logit_scale).to(tl.float32) * LOG2_E
    column_partial = column_partials + row_tile.to(tl.int64) * m
    row_partial = row_partials + column_tile.to(tl.int64) * PARTS * n
    first_row = row_tile * BM
    start = column_tile * BN
    if PARTS == 1:
        _tile_lse(
            product, scale, row_partial, column_partial, pair_logits,
            first_row, start, first_column, n, m, WITH_COLUMNS, BM, BN,
        )  # fmt: skip
    else:
        left, right = halves(product, BM, BN)
        _tile_lse(
            left, scale, row_partial, column_partial, pair_logits,
            first_row, start, first_column, n, m, WITH_COLUMNS, BM, BN // 2,
        )  # fmt: skip
        _tile_lse(
            right, scale, row_partial + n, column_partial, pair_logits,
            first_row, start + BN // 2, first_column, n, m, WITH_COLUMNS, BM, BN // 2,
        )  # fmt: skip


def contrastive_lse(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    first_column: int,
    with_columns: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `cyclip_loss.eager.contrastive_lse`."""
    precision = Precision.of(image_features)
    config = config_for("contrastive_lse", image_features, precision)
    tile = config.tile
    image, text = padded_rows(image_features, tile["BK"]), padded_rows(text_features, tile["BK"])
    (n, d), m = image.shape, len(text)
    row_lse = image.new_empty(n, dtype=torch.float32)
    pair_logits = image.new_zeros(n, dtype=torch.float32)
    column_lse = image.new_full((m if with_columns else 0,), -torch.inf, dtype=torch.float32)
    column_tiles = triton.cdiv(m, tile["BN"])
    per_row_tile = max(column_tiles * tile["PARTS"] * tile["BM"], m)
    strip = max(1, PARTIAL_ELEMENTS // per_row_tile) * tile["BM"]
    for start in range(0, n, strip):
        rows = min(strip, n - start)
        row_tiles = triton.cdiv(rows, tile["BM"])
        row_partials = row_lse.new_empty(column_tiles * tile["PARTS"], rows)
        column_partials = row_lse.new_empty(row_tiles if with_columns else 0, m)
        with launch_on(image):
            contrastive_lse_kernel[(row_tiles * column_tiles,)](
                image[start:],
                text,
                logit_scale,
                row_partials,
                column_partials,
                pair_logits[start:],
                rows,
                m,
                d,
                image.stride(0),
                text.stride(0),
                first_column + start,
                WITH_COLUMNS=with_columns,
                PRECISION=precision.dot,
                WIDEN=precision.widen,
                **config.kwargs,
            )
        row_lse[start : start + rows] = torch.logsumexp(row_partials, dim=0)
        if with_columns:
            strip_lse = torch.logsumexp(column_partials, dim=0)
            column_lse = torch.logaddexp(column_lse, strip_lse) if start else strip_lse
    return row_lse, column_lse, pair_logits
