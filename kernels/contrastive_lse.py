"""Log-sum-exps of the negatives among the logits l_ij = s * I_i . T_j, in one sweep over tiles.

    a_i = log sum_{j != i} exp(l_ij)      b_j = log sum_{i != j} exp(l_ij)      l_ii for the pairs

With ids, the sums leave out l_ij also where row i and column j have the same id.

2 n m D flops. A tile's program writes, for each row and each column of its tile, the maximum and
the sum of exponentials relative to it. A second kernel combines them. So every sum has a fixed
order, no atomics are needed, and the same inputs give the same bits. (One
log-sum-exp per tile would halve the writes. But its precise log2, in every thread that holds a copy
of the sum, took a third of all instructions after the product.)
"""

import torch
import triton
import triton.language as tl

from cyclip_loss.kernels.configs import JOIN_LSE, config_for
from cyclip_loss.kernels.tiles import (
    LN_2,
    LOG2_E,
    ceil_div,
    operand,
    same_ids,
    tile_product,
)
from cyclip_loss.logits import BlockLse, Logits
from cyclip_loss.numerics import on_device_of

# Tiles write at most this many maxima and as many sums per strip of rows, for rows and for columns
# (float32, so 128 MB each). At N = 65,536 that takes two strips with 128-row tiles and PARTS = 1.
PARTIAL_ELEMENTS = 2**24


@triton.jit
def _finite_reference(maximum):
    """The maximum, or 0 if it is -inf (there are no negatives); the sum is then 0, not NaN."""
    return tl.where(maximum == -float("inf"), 0.0, maximum)


@triton.jit(
    do_not_specialize=["n", "m", "partner_offset"],
    do_not_specialize_on_alignment=["logit_scale", "pair_logits", "row_ids", "column_ids"],
)
def contrastive_lse_kernel(
    row_features,  # (n, d), rows `row_stride` apart
    column_features,  # (m, d), rows `column_stride` apart
    logit_scale,  # scalar
    row_partials,  # (2, column tiles * PARTS, n) out: maxima and sums, in units of log 2
    column_partials,  # (2, row tiles, m) out
    pair_logits,  # (n,) out, where row i has a partner
    row_ids,  # (n,) and (m,): where they are equal, l_ij is not a negative; or both None
    column_ids,
    n,
    m,
    d,  # a multiple of BK
    row_stride,
    column_stride,
    partner_offset,  # row i is paired with column i + partner_offset
    SYMMETRIC: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PARTS: tl.constexpr,  # in how many parts a tile's maxima and sums are computed
):
    row_tile, column_tile, parts = tile_product(
        row_features, column_features, n, m, d, row_stride, column_stride, PRECISION, BM, BN, BK,
        PARTS,
    )  # fmt: skip
    first_row = row_tile * BM
    scale = tl.load(logit_scale) * LOG2_E
    column_partial = column_partials + row_tile.to(tl.int64) * m
    column_sums = tl.cdiv(n, BM).to(tl.int64) * m
    row_partial = row_partials + column_tile.to(tl.int64) * PARTS * n
    row_sums = tl.cdiv(m, BN).to(tl.int64) * PARTS * n
    rows = first_row + tl.arange(0, BM)
    partner = rows + partner_offset
    first_pair = first_row + partner_offset
    WIDTH: tl.constexpr = BN // PARTS
    for part in tl.static_range(PARTS):
        start = column_tile * BN + part * WIDTH
        columns = start + tl.arange(0, WIDTH)
        # In units of log 2, as the hardware has exp2.
        logits = parts[part] * scale
        has_pairs = (first_pair < start + WIDTH) & (first_pair + BM > start)
        if has_pairs:
            is_pair = partner[:, None] == columns[None, :]
            pair = tl.sum(tl.where(is_pair, logits, 0.0), axis=1) * LN_2
            pair += pair - pair  # NaN instead of infinite, which would look perfectly matched
            in_tile = (partner >= start) & (partner < start + WIDTH)
            tl.store(pair_logits + rows, pair, mask=in_tile & (partner < m) & (rows < n))
        # The mask of ids comes before that of the edges. In the other order, gfx942 runs out of
        # registers for masks.
        if row_ids is not None:
            same = same_ids(row_ids, column_ids, rows, columns, n, m)
            logits = tl.where(same, -float("inf"), logits)
        # A second branch, because in the first one this spills registers.
        if has_pairs | (first_row + BM > n) | (start + WIDTH > m):
            # Columns outside are -1, which takes one mask less.
            inside = tl.where(columns < m, columns, -1)
            negative = (inside >= 0)[None, :] & (inside[None, :] != partner[:, None])
            logits = tl.where(negative & (rows < n)[:, None], logits, -float("inf"))
        # Two exponentials per element. One, relative to the tile's maximum, would underflow
        # in rows and columns far below it, and a branch for these spills registers.
        row_max = tl.max(logits, axis=1)
        row_sum = tl.sum(tl.exp2(logits - _finite_reference(row_max)[:, None]), axis=1)
        tl.store(row_partial + part * n + rows, row_max, mask=rows < n)
        tl.store(row_partial + part * n + row_sums + rows, row_sum, mask=rows < n)
        if SYMMETRIC:
            column_max = tl.max(logits, axis=0)
            column_sum = tl.sum(tl.exp2(logits - _finite_reference(column_max)[None, :]), axis=0)
            tl.store(column_partial + columns, column_max, mask=columns < m)
            tl.store(column_partial + column_sums + columns, column_sum, mask=columns < m)


@triton.jit
def _join(
    partials, lse, tiles, length, num_previous, first, TILES: tl.constexpr, BLOCK: tl.constexpr
):
    """Combine tiles' maxima and sums, (2, tiles, length), into `lse`, BLOCK elements from `first`.

    Elements below `num_previous` hold log-sum-exps already, of earlier strips.
    """
    index = first + tl.arange(0, BLOCK)
    maximum = tl.load(lse + index, mask=index < num_previous, other=-float("inf")) * LOG2_E
    # The log-sum-exp so far is a maximum with a sum of 1.
    total = tl.where(maximum == -float("inf"), 0.0, 1.0)
    for start in range(0, tiles, TILES):
        tile = start + tl.arange(0, TILES)
        inside = (tile < tiles)[:, None] & (index < length)[None, :]
        offset = tile.to(tl.int64)[:, None] * length + index[None, :]
        maxima = tl.load(partials + offset, mask=inside, other=-float("inf"))
        sum_pointers = partials + tiles.to(tl.int64) * length + offset
        sums = tl.load(sum_pointers, mask=inside, other=0.0)
        new_maximum = tl.maximum(maximum, tl.max(maxima, axis=0))
        reference = _finite_reference(new_maximum)
        total *= tl.exp2(maximum - reference)
        total += tl.sum(sums * tl.exp2(maxima - reference[None, :]), axis=0)
        maximum = new_maximum
    tl.store(lse + index, (maximum + tl.log2(total)) * LN_2, mask=index < length)


@triton.jit(
    do_not_specialize=["row_parts", "column_parts", "n", "num_columns", "num_previous"],
    do_not_specialize_on_alignment=["row_lse", "column_lse"],
)
def join_lse_kernel(
    row_partials,  # (2, row_parts, n): maxima and sums, in units of log 2
    column_partials,  # (2, column_parts, num_columns)
    row_lse,  # (n,) out
    column_lse,  # (num_columns,) out, combined with its values after the first strip
    row_parts,
    column_parts,
    n,
    num_columns,  # 0 where columns have no log-sum-exps
    num_previous,  # num_columns, or 0 for the first strip of rows
    TILES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The first programs combine rows, the others columns."""
    row_blocks = tl.cdiv(n, BLOCK)
    block = tl.program_id(0)
    if block < row_blocks:
        first = block * BLOCK
        _join(row_partials, row_lse, row_parts, n, 0, first, TILES, BLOCK)
    else:
        first = (block - row_blocks) * BLOCK
        _join(
            column_partials, column_lse, column_parts, num_columns, num_previous, first, TILES,
            BLOCK,
        )  # fmt: skip


def contrastive_lse(logits: Logits) -> BlockLse:
    """As `eager.contrastive_lse`."""
    config = config_for("contrastive_lse", logits.row_features)
    tile = config.tile
    row_features = operand(logits.row_features, tile)
    column_features = operand(logits.column_features, tile)
    aligned = logits._replace(row_features=row_features, column_features=column_features)
    (n, d), m = row_features.shape, column_features.shape[0]
    num_columns = m if logits.symmetric else 0
    negatives_lse = row_features.new_empty(n + num_columns, dtype=torch.float32)
    # The kernel writes those of rows with a partner. Without others, no launch sets zeros.
    has_partners = logits.pairs[0] == slice(0, n)
    pair_logits = negatives_lse.new_empty(n) if has_partners else negatives_lse.new_zeros(n)
    column_tiles = ceil_div(m, tile["BN"])
    row_parts = column_tiles * tile["PARTS"]
    # The rows of a strip, a multiple of the tile's rows.
    height = max(1, PARTIAL_ELEMENTS // max(row_parts * tile["BM"], m)) * tile["BM"]
    with on_device_of(negatives_lse):
        for start in range(0, n, height):
            part = aligned.block(start, start + height)
            rows = part.row_features.shape[0]
            row_tiles = ceil_div(rows, tile["BM"])
            row_partials = negatives_lse.new_empty(2 * row_parts * rows)
            column_partials = negatives_lse.new_empty(2 * row_tiles * num_columns)
            contrastive_lse_kernel[(row_tiles * column_tiles,)](
                part.row_features, part.column_features, logits.logit_scale, row_partials,
                column_partials, pair_logits[start:], part.row_ids, part.column_ids, rows, m, d,
                part.row_features.stride(0), part.column_features.stride(0), part.partner_offset,
                SYMMETRIC=logits.symmetric, **config.kwargs,
            )  # fmt: skip
            block = JOIN_LSE.tile["BLOCK"]
            join_lse_kernel[(ceil_div(rows, block) + ceil_div(num_columns, block),)](
                row_partials, column_partials, negatives_lse[start:], negatives_lse[n:], row_parts,
                row_tiles, rows, num_columns, num_columns if start > 0 else 0, **JOIN_LSE.kwargs,
            )  # fmt: skip
    return BlockLse(negatives_lse, pair_logits)
