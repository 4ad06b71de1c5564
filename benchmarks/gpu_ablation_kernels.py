"""A sweep's tile with more and more of what follows its product; and a kernel that only reads.

The sweeps of the package do, for each tile, the product and then what is called its epilogue here.
These epilogues do a part of it, without pairs and edges. (Rows and columns both, without the
branches that pairs and edges need, spill registers: for both there are the sweeps themselves.)
"""

import triton
import triton.language as tl

from cyclip_loss.kernels.tiles import grouped_tile, halves, tile_product


@triton.jit
def _epilogue(
    logits, rows, columns, row_vector, column_vector, row_out, row_sums, column_out, column_sums,
    gradient, m, EPILOGUE: tl.constexpr,
):  # fmt: skip
    if EPILOGUE == "rows":
        row_max = tl.max(logits, axis=1)
        row_sum = tl.sum(tl.exp2(logits - row_max[:, None]), axis=1)
        tl.store(row_out + rows, row_max)
        tl.store(row_out + row_sums + rows, row_sum)
    if EPILOGUE == "columns":
        column_max = tl.max(logits, axis=0)
        column_sum = tl.sum(tl.exp2(logits - column_max[None, :]), axis=0)
        tl.store(column_out + columns, column_max)
        tl.store(column_out + column_sums + columns, column_sum)
    if EPILOGUE == "one exponential":
        # Relative to the tile's maximum, for rows and columns alike. No fallback for what
        # underflows: a bound on what could be gained.
        maximum = tl.max(tl.max(logits, axis=1), axis=0)
        e = tl.exp2(logits - maximum)
        tl.store(row_out + rows, tl.sum(e, axis=1))
        tl.store(column_out + columns, tl.sum(e, axis=0))
    at = gradient + rows.to(tl.int64)[:, None] * m + columns[None, :]
    if EPILOGUE == "store":
        tl.store(at, logits.to(gradient.dtype.element_ty))
    if EPILOGUE == "one exponential, store":
        a = tl.load(row_vector + rows)
        b = tl.load(column_vector + columns)
        tl.store(at, (tl.exp2(logits) * (a[:, None] + b[None, :])).to(gradient.dtype.element_ty))
    if EPILOGUE == "two exponentials, store":
        a = tl.load(row_vector + rows)
        b = tl.load(column_vector + columns)
        g = tl.exp2(logits - a[:, None]) + tl.exp2(logits - b[None, :])
        tl.store(at, g.to(gradient.dtype.element_ty))


@triton.jit
def ablation_kernel(
    image,  # (n, d)
    text,  # (m, d)
    scale,
    row_vector,  # (n,): log-sum-exps or the like
    column_vector,  # (m,)
    row_out,  # (2, column tiles * PARTS, n): maxima and sums
    column_out,  # (2, row tiles, m)
    gradient,  # (n, m)
    n,  # a multiple of BM
    m,  # a multiple of BN
    d,  # a multiple of BK
    EPILOGUE: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PARTS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """The product of a tile, and of what follows it in a sweep as much as EPILOGUE says."""
    row_tile, column_tile = grouped_tile(tl.cdiv(n, BM), tl.cdiv(m, BN), GROUP)
    first_row = row_tile * BM
    start = column_tile * BN
    product = tile_product(
        image, text, first_row, start, n, m, d, d, d, PRECISION, WIDEN, BM, BN, BK
    )
    rows = first_row + tl.arange(0, BM)
    columns = start + tl.arange(0, BN)
    row_at = row_out + column_tile.to(tl.int64) * PARTS * n
    column_at = column_out + row_tile.to(tl.int64) * m
    row_sums = tl.cdiv(m, BN).to(tl.int64) * PARTS * n  # from a maximum to its sum
    column_sums = tl.cdiv(n, BM).to(tl.int64) * m
    if EPILOGUE == "none":
        if scale < 0.0:  # never, which the compiler can't know: the product must be made
            tl.store(row_out, tl.sum(tl.sum(product, axis=1), axis=0))
    elif PARTS == 1:
        _epilogue(
            product * scale, rows, columns, row_vector, column_vector, row_at, row_sums, column_at,
            column_sums, gradient, m, EPILOGUE,
        )  # fmt: skip
    else:
        left, right = halves(product, BM, BN)
        half = start + tl.arange(0, BN // 2)
        _epilogue(
            left * scale, rows, half, row_vector, column_vector, row_at, row_sums, column_at,
            column_sums, gradient, m, EPILOGUE,
        )  # fmt: skip
        _epilogue(
            right * scale, rows, half + BN // 2, row_vector, column_vector, row_at + n, row_sums,
            column_at, column_sums, gradient, m, EPILOGUE,
        )  # fmt: skip


@triton.jit
def read_kernel(
    source,  # (blocks * BLOCK,)
    out,  # (programs,)
    blocks,
    reads,
    BLOCK: tl.constexpr,
):
    """Each program reads `reads` blocks one after another, past L1 (.cg)."""
    program = tl.program_id(0)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for i in range(reads):
        block = (program * 7 + i) % blocks
        at = block * BLOCK + tl.arange(0, BLOCK)
        total += tl.load(source + at, cache_modifier=".cg")
    tl.store(out + program, tl.sum(total, axis=0))
