"""Gradients of the contrastive term: a kernel computes blocks of G, the library multiplies them.

With l_ij = s * I_i . T_j, the log-sum-exps r, c of its rows and columns, and w = weight * grad:

    G_ij = pair_gradient_i if column j is row i's partner, 0 if it has the same id,
           else exp(l_ij - r_i) + exp(l_ij - c_j)
    dI = w s G T          dT = w s G^T I          ds = w * sum_ij G_ij (I_i . T_j)

The kernel computes a block of logits again (2 n m D flops in all) and writes w s G in the features'
dtype (2^14 G for float16). The library multiplies it with the features (4 n m D), with sums in
float32 (of bfloat16 as `torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction` says).
If one block holds all of G, the products are the gradients.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from cyclip_loss.kernels.configs import SUM, Precision, config_for
from cyclip_loss.kernels.launch import ceil_div, padded_rows
from cyclip_loss.kernels.tiles import LN_2, LOG2_E, grouped_tile, same_ids, split, tile_product
from cyclip_loss.numerics import Logits, Lse, add_product, matmul, on_device_of

# Rows and elements of one block of G, which thus has 16,384 columns and takes 512 MB in 16 bits, at
# every N. Both products of a block sum over thousands of elements. At D = 768 they have 384 output
# tiles of 128 x 256, which should fill 97% of 132 SMs (73% with half as many rows). Each product
# reads and writes its float32 sums once per block: 3 GB in all at N = 65,536.
BLOCK_ROWS = 16384
BLOCK_ELEMENTS = 2**28


@triton.jit(
    do_not_specialize=["n", "m", "first_column", "pairs"],
    do_not_specialize_on_alignment=[
        "logit_scale", "grad", "row_lse", "column_lse", "pair_gradient", "scale_partials",
        "row_ids", "column_ids",
    ],
)  # fmt: skip
def contrastive_grads_kernel(
    image,  # (n, d), rows `image_stride` apart
    text,  # (m, d), rows `text_stride` apart
    logit_scale,  # scalar
    grad,  # scalar
    row_lse,  # (n,)
    column_lse,  # (m,)
    pair_gradient,  # (n,): G where row i has a partner
    row_ids,  # (n,) and (m,): G is 0 where they are equal, except for pairs; or both None
    column_ids,
    gradient,  # out: weight * grad * s * G in whole tiles, rows `gradient_stride` apart
    scale_partials,  # (tiles,) out: sum over the tile of 2^SHIFT * G_ij (I_i . T_j)
    n,
    m,
    d,  # a multiple of BK
    image_stride,
    text_stride,
    gradient_stride,
    first_column,  # row i < pairs is paired with column first_column + i
    pairs,
    weight,
    SYMMETRIC: tl.constexpr,
    NEEDS_SCALE: tl.constexpr,
    SHIFT: tl.constexpr,  # if not 0, `gradient` is 2^SHIFT * G, without the weights
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PARTS: tl.constexpr,  # in how many parts a tile of G is computed from its logits
    GROUP: tl.constexpr,
):
    row_tile, column_tile = grouped_tile(tl.cdiv(n, BM), tl.cdiv(m, BN), GROUP)
    first_row = row_tile * BM
    product = tile_product(
        image, text, first_row, column_tile * BN, n, m, d, image_stride, text_stride,
        PRECISION, BM, BN, BK,
    )  # fmt: skip
    logit_scale = tl.load(logit_scale)
    scale = logit_scale * LOG2_E
    factor = tl.load(grad) * weight * logit_scale
    rows = first_row + tl.arange(0, BM)
    first_pair = first_row + first_column
    # The offset of the tile has 64 bits, offsets within it 32.
    tile_start = gradient + first_row.to(tl.int64) * gradient_stride
    tile_sum = 0.0
    WIDTH: tl.constexpr = BN // PARTS
    parts = split(product, BM, BN, PARTS)
    for part in tl.static_range(PARTS):
        start = column_tile * BN + part * WIDTH
        columns = start + tl.arange(0, WIDTH)
        # Past the end the last values are read again. They are finite; their results are dropped.
        r = (tl.load(row_lse + tl.minimum(rows, n - 1)) - SHIFT * LN_2) * LOG2_E
        g = tl.exp2(parts[part] * scale - r[:, None])
        if SYMMETRIC:
            c = (tl.load(column_lse + tl.minimum(columns, m - 1)) - SHIFT * LN_2) * LOG2_E
            # Two exponentials per element: sharing one is safe only in a branch, whose two results
            # spill registers.
            g += tl.exp2(parts[part] * scale - c[None, :])
        if row_ids is not None:
            g = tl.where(same_ids(row_ids, column_ids, rows, columns, n, m), 0.0, g)
        has_pairs = (first_pair < start + WIDTH) & (first_pair + BM > start)
        # Whole tiles are stored, with 0 outside the matrix, as a mask on columns would prevent wide
        # stores. The pairs share the branch: a branch of their own would spill registers.
        if has_pairs | (first_row + BM > n) | (start + WIDTH > m):
            partner = tl.where(rows < pairs, rows + first_column, -2)
            is_pair = partner[:, None] == columns[None, :]
            of_pair = tl.load(pair_gradient + rows, mask=rows < n, other=0.0) * (1 << SHIFT)
            g = tl.where(is_pair, of_pair[:, None], g)
            g = tl.where((rows < n)[:, None] & (columns < m)[None, :], g, 0.0)
        if NEEDS_SCALE:
            tile_sum += tl.sum(tl.sum(g * parts[part], axis=1), axis=0)
        within = tl.arange(0, BM)[:, None] * gradient_stride + columns[None, :]
        if SHIFT == 0:
            g *= factor
        tl.store(tile_start + within, g.to(gradient.dtype.element_ty))
    if NEEDS_SCALE:
        tl.store(scale_partials + tl.program_id(0), tile_sum)


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


def contrastive_grads(
    logits: Logits, lse: Lse, grad: Tensor, weight: float, needs: list[bool], wide: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """As `cyclip_loss.eager.contrastive_grads`."""
    needs_image, needs_text, needs_scale = needs
    image_features, text_features, logit_scale, *_ = logits
    precision, with_ids = Precision.of(image_features), logits.row_ids is not None
    config = config_for("contrastive_grads", image_features, precision, with_ids)
    tile = config.tile
    image, text = (padded_rows(features, tile["BK"]) for features in logits[:2])
    padded = logits._replace(rows=image, columns=text)
    (n, d), m = image.shape, text.shape[0]
    # float16 keeps 11 bits only above 6e-5, and most of w s G is far smaller. So 2^14 G is stored:
    # its largest possible element, 2^15, still fits. The weight is applied to the sums.
    shift = 14 if image_features.dtype == torch.float16 else 0
    sum_weight = grad * logit_scale * (weight * 2.0**-shift) if shift else None
    grad_dtype = torch.float32 if wide else image_features.dtype

    bm, bn = tile["BM"], tile["BN"]
    height = ceil_div(min(n, BLOCK_ROWS), bm) * bm
    width = max(1, BLOCK_ELEMENTS // (height * bn)) * bn
    width = min(width, ceil_div(m, bn) * bn)
    gradient_tiles = image_features.new_empty(height, width)
    tiles = ceil_div(n, bm) * ceil_div(m, bn)  # in all blocks, as these are whole tiles
    scale_partials = lse.rows.new_empty(tiles if needs_scale else 0)
    tiles_done = 0

    def block(start: int, left: int) -> Tensor:
        """The block of G from row `start` and column `left` on: (up to height, up to width)."""
        nonlocal tiles_done
        part = padded.block(start, start + height, left, left + width)
        rows, columns = part.rows.shape[0], part.columns.shape[0]
        tiles = ceil_div(rows, bm) * ceil_div(columns, bn)
        contrastive_grads_kernel[(tiles,)](
            part.rows, part.columns, logit_scale, grad, lse.rows[start:], lse.columns[left:],
            lse.pair_gradient[start:], part.row_ids, part.column_ids, gradient_tiles,
            scale_partials[tiles_done:], rows, columns, d, image.stride(0), text.stride(0), width,
            part.first_column, part.pairs, float(weight), SYMMETRIC=logits.symmetric,
            NEEDS_SCALE=needs_scale, SHIFT=shift, PRECISION=precision.dot, **config.kwargs,
        )  # fmt: skip
        tiles_done += tiles
        return gradient_tiles[:rows, :columns]

    def finished(total: Tensor) -> Tensor:
        return (total if sum_weight is None else total.mul_(sum_weight)).to(grad_dtype)

    image_grad, text_grad = image_features.new_empty(0, dtype=grad_dtype), lse.rows.new_empty(0)
    with on_device_of(image_features):
        if n <= height and m <= width:
            gradient = block(0, 0)
            dtype = torch.float32 if shift else grad_dtype
            if needs_image:
                image_grad = finished(matmul(gradient, text_features, dtype))
            if needs_text:
                text_grad = matmul(gradient.T, image_features, dtype)
        else:
            if needs_image:
                image_grad = image_features.new_empty(image_features.shape, dtype=grad_dtype)
            if needs_text:
                text_grad = lse.rows.new_zeros(text_features.shape)
            for start in range(0, n, height):
                rows = image_features[start : start + height]
                image_sum = lse.rows.new_zeros(rows.shape if needs_image else (0,))
                for left in range(0, m, width):
                    gradient = block(start, left)
                    if needs_image:
                        add_product(image_sum, gradient, text_features[left : left + width])
                    if needs_text:
                        add_product(text_grad[left : left + width], gradient.T, rows)
                if needs_image:
                    image_grad[start : start + height] = finished(image_sum)
        scale_grad = lse.rows.new_empty(())
        if needs_scale:
            scale_grad_kernel[(1,)](
                scale_partials, grad, scale_grad, tiles, weight * 2.0**-shift, **SUM.kwargs
            )
    return image_grad, finished(text_grad), scale_grad
