"""Gradients of the contrastive term: blocks of G by one kernel, then two library products each.

With l_ij = s * I_i . T_j and the log-sum-exps r, c of its rows and columns:

    G_ij = pair_gradient_i if j is i's partner, else exp(l_ij - r_i) + exp(l_ij - c_j)
    dI = w s G T          dT = w s G^T I          ds = w * sum_ij G_ij (I_i . T_j)

The kernel computes a block of logits again (2 n m D flops in all) and writes G in the features'
dtype; the library's matrix products consume it (4 n m D), summing in float32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from cyclip_loss.kernels.configs import Precision, config_for, launch_on, padded_rows
from cyclip_loss.kernels.tiles import LOG2_E, grouped_tile, halves, tile_product

# One block of G: this many rows, and as many columns as make 512 MB (16,384 of 16 bits). Memory is
# thus bounded whatever N. Both products of a block sum over thousands of elements, and have 384
# output tiles of 128 x 256 at D = 768, which fill 132 SMs to 97 % (half as many rows: to 73 %).
# Each reads and writes its float32 sums once per block: 3 GB in all at N = 65,536.
BLOCK_ROWS = 16384
BLOCK_BYTES = 2**29


@triton.jit
def _tile_gradient(
    product,  # (BM, BN)
    scale,
    row_lse,
    column_lse,
    pair_gradient,
    gradient,
    gradient_stride,
    first_row,
    first_column_of_tile,
    first_column,
    n,
    m,
    SYMMETRIC: tl.constexpr,
    NEEDS_SCALE: tl.constexpr,
    SHIFT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Store the tile of G * 2^SHIFT; return the sum of G_ij (I_i . T_j) over it."""
    rows = first_row + tl.arange(0, BM)
    columns = first_column_of_tile + tl.arange(0, BN)
    # Past the end the last values are read again: they are finite, and nothing of it is kept.
    r = tl.load(row_lse + tl.minimum(rows, n - 1)) * LOG2_E
    g = tl.exp2(product * scale - r[:, None])
    if SYMMETRIC:
        c = tl.load(column_lse + tl.minimum(columns, m - 1)) * LOG2_E
        # Two exponentials an element: sharing one is safe only in a branch, whose two results
        # spill registers.
        g += tl.exp2(product * scale - c[None, :])
    first_pair = first_row + first_column
    has_pairs = (first_pair < first_column_of_tile + BN) & (first_pair + BM > first_column_of_tile)
    # Whole tiles are stored, 0 outside the matrix: a mask on columns would forbid wide stores. The
    # pairs share the branch: one of their own would spill registers.
    if has_pairs | (first_row + BM > n) | (first_column_of_tile + BN > m):
        is_pair = (rows + first_column)[:, None] == columns[None, :]
        of_pair = tl.load(pair_gradient + rows, mask=rows < n, other=0.0)
        g = tl.where(is_pair, of_pair[:, None], g)
        g = tl.where((rows < n)[:, None] & (columns < m)[None, :], g, 0.0)
    tile_sum = 0.0
    if NEEDS_SCALE:
        tile_sum = tl.sum(tl.sum(g * product, axis=1), axis=0)
    # One 64-bit offset for the tile, 32 bits within it.
    tile_start = gradient + first_row.to(tl.int64) * gradient_stride
    within = tl.arange(0, BM)[:, None] * gradient_stride + columns[None, :]
    tl.store(tile_start + within, (g * (1 << SHIFT)).to(gradient.dtype.element_ty))
    return tile_sum


@triton.jit(do_not_specialize=["n", "m", "first_column"])
def contrastive_grads_kernel(
    image,  # (n, d), rows `image_stride` apart
    text,  # (m, d), rows `text_stride` apart
    logit_scale,  # scalar
    row_lse,  # (n,)
    column_lse,  # (m,)
    pair_gradient,  # (n,): G where row i has a partner
    gradient,  # G * 2^SHIFT out, whole tiles of it, rows `gradient_stride` apart
    scale_partials,  # (tiles,) out: sum over the tile of G_ij (I_i . T_j)
    n,
    m,
    d,  # a multiple of BK
    image_stride,
    text_stride,
    gradient_stride,
    first_column,  # row i is paired with column first_column + i
    SYMMETRIC: tl.constexpr,
    NEEDS_SCALE: tl.constexpr,
    SHIFT: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PARTS: tl.constexpr,  # 1 or 2: the elements of a tile are done at once or by halves
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
    if PARTS == 1:
        tile_sum = _tile_gradient(
            product, scale, row_lse, column_lse, pair_gradient, gradient, gradient_stride,
            first_row, start, first_column, n, m, SYMMETRIC, NEEDS_SCALE, SHIFT, BM, BN,
        )  # fmt: skip
    else:
        left, right = halves(product, BM, BN)
        tile_sum = _tile_gradient(
            left, scale, row_lse, column_lse, pair_gradient, gradient, gradient_stride,
            first_row, start, first_column, n, m, SYMMETRIC, NEEDS_SCALE, SHIFT, BM, BN // 2,
        )  # fmt: skip
        tile_sum += _tile_gradient(
            right, scale, row_lse, column_lse, pair_gradient, gradient, gradient_stride,
            first_row, start + BN // 2, first_column, n, m, SYMMETRIC, NEEDS_SCALE, SHIFT,
            BM, BN // 2,
        )  # fmt: skip
    if NEEDS_SCALE:
        tl.store(scale_partials + tl.program_id(0), tile_sum)


def contrastive_grads(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    row_lse: Tensor,
    column_lse: Tensor,
    pair_gradient: Tensor,
    grad: Tensor,
    weight: float,
    first_column: int,
    symmetric: bool,
    needs: list[bool],
    wide: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `cyclip_loss.eager.contrastive_grads`."""
    needs_image, needs_text, needs_scale = needs
    precision = Precision.of(image_features)
    config = config_for("contrastive", image_features, precision)
    tile = config.tile
    image, text = padded_rows(image_features, tile["BK"]), padded_rows(text_features, tile["BK"])
    (n, d), m = image.shape, len(text)
    # float16 is exact to 11 bits only above 6e-5, and most of G is smaller: store 2^14 * G, of
    # which the largest, 2^15, still fits.
    shift = 14 if image.dtype == torch.float16 else 0
    weighted_grad = grad * weight
    feature_weight = weighted_grad * logit_scale * 2.0**-shift
    grad_dtype = row_lse.dtype if wide else image.dtype
    image_grad = image.new_empty(image_features.shape if needs_image else (0,), dtype=grad_dtype)
    text_sum = row_lse.new_zeros(text_features.shape if needs_text else (0,))
    scale_sum = row_lse.new_zeros(())

    bm, bn = tile["BM"], tile["BN"]
    height = triton.cdiv(min(n, BLOCK_ROWS), bm) * bm
    width = max(1, BLOCK_BYTES // (height * image.element_size() * bn)) * bn
    width = min(width, triton.cdiv(m, bn) * bn)
    gradient_tiles = image.new_empty(height, width)
    for start in range(0, n, height):
        rows = min(height, n - start)
        row_tiles = triton.cdiv(rows, bm)
        block_image = image_features[start : start + rows]
        image_sum = row_lse.new_zeros(block_image.shape if needs_image else (0,))
        for left in range(0, m, width):
            columns = min(width, m - left)
            tiles = row_tiles * triton.cdiv(columns, bn)
            gradient = gradient_tiles[:rows, :columns]
            block_text = text_features[left : left + columns]
            scale_partials = row_lse.new_empty(tiles if needs_scale else 0)
            with launch_on(image):
                contrastive_grads_kernel[(tiles,)](
                    image[start:],
                    text[left:],
                    logit_scale,
                    row_lse[start:],
                    column_lse[left:],
                    pair_gradient[start:],
                    gradient,
                    scale_partials,
                    rows,
                    columns,
                    d,
                    image.stride(0),
                    text.stride(0),
                    width,
                    first_column + start - left,
                    SYMMETRIC=symmetric,
                    NEEDS_SCALE=needs_scale,
                    SHIFT=shift,
                    PRECISION=precision.dot,
                    WIDEN=precision.widen,
                    **config.kwargs,
                )
            if needs_scale:
                scale_sum += scale_partials.sum()
            if needs_image:
                add_product(image_sum, gradient, block_text)
            if needs_text:
                add_product(text_sum[left : left + columns], gradient.T, block_image)
        if needs_image:
            image_grad[start : start + rows] = image_sum.mul_(feature_weight)
    text_grad = text_sum.mul_(feature_weight).to(grad_dtype)
    return image_grad, text_grad, scale_sum.mul_(weighted_grad)


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b in float32, for a and b of the features' dtype."""
    # ROCm builds of PyTorch have no product of 16-bit matrices into a float32 one.
    if a.is_cuda and torch.version.hip is None and a.dtype != torch.float32:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(a.float(), b.float())
