"""Log-sum-exps of the negatives among the logits l_ij = s * I_i . T_j, one sweep over their tiles.

    a_i = log sum_{j != i} exp(l_ij)      b_j = log sum_{i != j} exp(l_ij)      l_ii for the pairs

2 n m D flops. A tile's program leaves, for each row and each column of its tile, the maximum and
the sum of exponentials relative to it; a second kernel joins them. So every sum has one order, no
atomics are needed, and the same inputs give the same bits. (Logarithms of the sums would be half as
much to leave, but a precise log2 by every thread that holds a copy of a sum was a third of all
instructions after the product.)
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from cyclip_loss.kernels.configs import Precision, config_for, launch_on, padded_rows
from cyclip_loss.kernels.tiles import LN_2, LOG2_E, grouped_tile, halves, tile_product

# What the tiles leave: per strip of rows, at most this many maxima and as many sums, of rows and of
# columns (float32, so 128 MB each). At N = 65,536 that takes two strips with 128-row tiles.
PARTIAL_ELEMENTS = 2**24

# The joining kernel reads this many tiles' maxima and sums of this many rows or columns at a time.
JOIN_TILES = 32
JOIN_BLOCK = 128


@triton.jit
def _finite_reference(maximum):
    """The maximum, or 0 where it is -inf (nothing is within the matrix): the sum is then 0."""
    return tl.where(maximum == -float("inf"), 0.0, maximum)


@triton.jit
def _tile_lse(
    product,  # (BM, BN)
    scale,
    row_partial,
    row_sums,  # from a maximum to its sum
    column_partial,
    column_sums,
    pair_logits,
    first_row,
    first_column_of_tile,
    first_column,
    n,
    m,
    SYMMETRIC: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    rows = first_row + tl.arange(0, BM)
    columns = first_column_of_tile + tl.arange(0, BN)
    # In units of log 2: exp2 is what the hardware has.
    logits = product * scale
    partner = rows + first_column
    first_pair = first_row + first_column
    has_pairs = (first_pair < first_column_of_tile + BN) & (first_pair + BM > first_column_of_tile)
    if has_pairs:
        is_pair = partner[:, None] == columns[None, :]
        pair = tl.sum(tl.where(is_pair, logits, 0.0), axis=1) * LN_2
        in_tile = (partner >= first_column_of_tile) & (partner < first_column_of_tile + BN)
        tl.store(pair_logits + rows, pair, mask=in_tile & (partner < m) & (rows < n))
    # A branch of its own, with the edges: within the one above, this would spill registers.
    if has_pairs | (first_row + BM > n) | (first_column_of_tile + BN > m):
        # With -1 for columns outside gfx942 needs no more masks than it has registers for.
        inside = tl.where(columns < m, columns, -1)
        negative = (inside >= 0)[None, :] & (inside[None, :] != partner[:, None])
        logits = tl.where(negative & (rows < n)[:, None], logits, -float("inf"))
    # Two exponentials an element. One for both, relative to the tile's maximum, underflows for rows
    # and columns far below it, and the branch that saves them costs registers that spill.
    row_max = tl.max(logits, axis=1)
    row_sum = tl.sum(tl.exp2(logits - _finite_reference(row_max)[:, None]), axis=1)
    tl.store(row_partial + rows, row_max, mask=rows < n)
    tl.store(row_partial + row_sums + rows, row_sum, mask=rows < n)
    if SYMMETRIC:
        column_max = tl.max(logits, axis=0)
        column_sum = tl.sum(tl.exp2(logits - _finite_reference(column_max)[None, :]), axis=0)
        tl.store(column_partial + columns, column_max, mask=columns < m)
        tl.store(column_partial + column_sums + columns, column_sum, mask=columns < m)


@triton.jit(do_not_specialize=["n", "m", "first_column"])
def contrastive_lse_kernel(
    image,  # (n, d), rows `image_stride` apart
    text,  # (m, d), rows `text_stride` apart
    logit_scale,  # scalar
    row_partials,  # (2, column tiles * PARTS, n) out: maxima and sums, in units of log 2
    column_partials,  # (2, row tiles, m) out
    pair_logits,  # (n,) out, where row i has a partner
    n,
    m,
    d,  # a multiple of BK
    image_stride,
    text_stride,
    first_column,  # row i is paired with column first_column + i
    SYMMETRIC: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PARTS: tl.constexpr,  # 1 or 2: a tile's log-sum-exps are taken at once or by halves
    GROUP: tl.constexpr,
):
    row_tile, column_tile = grouped_tile(tl.cdiv(n, BM), tl.cdiv(m, BN), GROUP)
    first_row = row_tile * BM
    start = column_tile * BN
    product = tile_product(
        image, text, first_row, start, n, m, d, image_stride, text_stride,
        PRECISION, WIDEN, BM, BN, BK,
    )  # fmt: skip
    scale = tl.load(logit_scale).to(tl.float32) * LOG2_E
    column_partial = column_partials + row_tile.to(tl.int64) * m
    column_sums = tl.cdiv(n, BM).to(tl.int64) * m
    row_partial = row_partials + column_tile.to(tl.int64) * PARTS * n
    row_sums = tl.cdiv(m, BN).to(tl.int64) * PARTS * n
    if PARTS == 1:
        _tile_lse(
            product, scale, row_partial, row_sums, column_partial, column_sums, pair_logits,
            first_row, start, first_column, n, m, SYMMETRIC, BM, BN,
        )  # fmt: skip
    else:
        left, right = halves(product, BM, BN)
        _tile_lse(
            left, scale, row_partial, row_sums, column_partial, column_sums, pair_logits,
            first_row, start, first_column, n, m, SYMMETRIC, BM, BN // 2,
        )  # fmt: skip
        _tile_lse(
            right, scale, row_partial + n, row_sums, column_partial, column_sums, pair_logits,
            first_row, start + BN // 2, first_column, n, m, SYMMETRIC, BM, BN // 2,
        )  # fmt: skip


@triton.jit(do_not_specialize=["tiles", "length"])
def join_lse_kernel(
    partials,  # (2, tiles, length): maxima and sums, in units of log 2
    lse,  # (length,) in and out: joined to what is there; -inf is nothing
    tiles,
    length,
    TILES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    maximum = tl.load(lse + at, mask=at < length, other=-float("inf")) * LOG2_E
    # The log-sum-exp so far is a maximum with a sum of 1.
    total = tl.where(maximum == -float("inf"), 0.0, 1.0)
    for start in range(0, tiles, TILES):
        tile = start + tl.arange(0, TILES)
        inside = (tile < tiles)[:, None] & (at < length)[None, :]
        offset = tile.to(tl.int64)[:, None] * length + at[None, :]
        maxima = tl.load(partials + offset, mask=inside, other=-float("inf"))
        sums_at = partials + tiles.to(tl.int64) * length + offset
        sums = tl.load(sums_at, mask=inside, other=0.0)
        new_maximum = tl.maximum(maximum, tl.max(maxima, axis=0))
        reference = _finite_reference(new_maximum)
        total *= tl.exp2(maximum - reference)
        total += tl.sum(sums * tl.exp2(maxima - reference[None, :]), axis=0)
        maximum = new_maximum
    tl.store(lse + at, (maximum + tl.log2(total)) * LN_2, mask=at < length)


def _join(partials: Tensor, lse: Tensor) -> None:
    _, tiles, length = partials.shape
    join_lse_kernel[(triton.cdiv(length, JOIN_BLOCK),)](
        partials, lse, tiles, length, TILES=JOIN_TILES, BLOCK=JOIN_BLOCK
    )


def contrastive_lse(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    first_column: int,
    symmetric: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `cyclip_loss.eager.contrastive_lse`."""
    precision = Precision.of(image_features)
    config = config_for("contrastive", image_features, precision)
    tile = config.tile
    image, text = padded_rows(image_features, tile["BK"]), padded_rows(text_features, tile["BK"])
    (n, d), m = image.shape, len(text)
    row_negatives = image.new_full((n,), -torch.inf, dtype=torch.float32)
    pair_logits = image.new_zeros(n, dtype=torch.float32)
    column_negatives = image.new_full((m if symmetric else 0,), -torch.inf, dtype=torch.float32)
    column_tiles = triton.cdiv(m, tile["BN"])
    per_row_tile = max(column_tiles * tile["PARTS"] * tile["BM"], m)
    strip = max(1, PARTIAL_ELEMENTS // per_row_tile) * tile["BM"]
    for start in range(0, n, strip):
        rows = min(strip, n - start)
        row_tiles = triton.cdiv(rows, tile["BM"])
        row_partials = row_negatives.new_empty(2, column_tiles * tile["PARTS"], rows)
        column_partials = row_negatives.new_empty(2, row_tiles if symmetric else 0, m)
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
                SYMMETRIC=symmetric,
                PRECISION=precision.dot,
                WIDEN=precision.widen,
                **config.kwargs,
            )
            _join(row_partials, row_negatives[start : start + rows])
            if symmetric:
                _join(column_partials, column_negatives)
    return row_negatives, column_negatives, pair_logits
