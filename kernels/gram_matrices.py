"""Gram matrices of U = I + T and V = I - T:  A = U^T U,  B = V^T V,  C = V^T U  (D x D).

Both cyclic penalties follow from p = <A, B>_F and q = <C, C^T>_F (`terms/cyclic.py`).

U and V are formed in registers, in float32, from the unrounded features, and only then rounded to
tf32. V is small for well-aligned pairs, and its rounding error is relative to V. For 16-bit
features, the measured relative error of the gradient is 2e-4 to 3e-4, for pairs at
|T - I| = 0.003 up to random pairs. Rounding an exact gradient to bfloat16 costs 1.7e-3.

A tile's program computes two products of columns i and j, i <= j:

    of A and B    (I_i + T_i)^T U_j = A_ij    (I_i - T_i)^T V_j = B_ij
    of C          (I_i - T_i)^T U_j = C_ij    (I_i + T_i)^T V_j = C_ji^T

A and B are symmetric: 2 N D^2 flops for both, and 2 N D^2 for C, whose programs differ by a sign.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from cyclip_loss.kernels.configs import config_for
from cyclip_loss.kernels.tiles import aligned_features, ceil_div, u_and_v
from cyclip_loss.numerics import on_device_of

# A D x D matrix has too few tiles to fill a GPU, unless D is large. So the sum over rows is split
# into at most this many parts, each a multiple of the tile's rows. 16 parts of three matrices of
# 768 x 768 in float32 are 113 MB. Parts take at most 268 MB in all.
MAX_SPLITS = 16
MAX_PARTS_ELEMENTS = 2**26
MIN_SPLIT_ROWS = 1024
# 32-bit offsets reach through three matrices of this size, 8.5 GB. A multiple of all tiles, also of
# the largest, 256, that the tuner may choose: D is padded to a multiple of the tile.
MAX_D = 26624


@triton.jit
def _load_block(features, rows, columns, valid, stride):
    pointers = features + rows.to(tl.int64)[:, None] * stride + columns[None, :]
    return tl.load(pointers, mask=valid, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["n", "split_rows"])
def gram_matrices_kernel(
    image,  # (n, d), rows `image_stride` apart
    text,  # (n, d), rows `text_stride` apart
    means,  # (2, d), of the images and of the texts, float32; or None
    grams,  # (splits, 2 or 3, d, d) out
    n,
    d,  # a multiple of BD
    image_stride,
    text_stride,
    split_rows,
    WITH_CROSS: tl.constexpr,
    PRECISION: tl.constexpr,
    BD: tl.constexpr,
    BK: tl.constexpr,
):
    tiles = d // BD
    i = tl.program_id(0) // tiles
    j = tl.program_id(0) % tiles
    if i <= j:
        split = tl.program_id(1)
        is_cross = tl.program_id(2)
        # Programs of C swap U and V of columns i.
        sign = 1.0 - 2.0 * is_cross
        i_columns = i * BD + tl.arange(0, BD)
        j_columns = j * BD + tl.arange(0, BD)
        u_product = tl.zeros((BD, BD), dtype=tl.float32)
        v_product = tl.zeros((BD, BD), dtype=tl.float32)
        end = tl.minimum(split * split_rows + split_rows, n)
        for start in range(split * split_rows, end, BK):
            rows = start + tl.arange(0, BK)
            valid = (rows < end)[:, None]
            i_image = _load_block(image, rows, i_columns, valid, image_stride)
            i_text = _load_block(text, rows, i_columns, valid, text_stride)
            j_image = _load_block(image, rows, j_columns, valid, image_stride)
            j_text = _load_block(text, rows, j_columns, valid, text_stride)
            # The sign also without C: Triton then lays out the tiles better.
            u_i, v_i = u_and_v(i_image, i_text, sign, means, i_columns, d, valid, PRECISION)
            u_j, v_j = u_and_v(j_image, j_text, 1.0, means, j_columns, d, valid, PRECISION)
            u_product = tl.dot(tl.trans(u_i), u_j, u_product, input_precision=PRECISION)
            v_product = tl.dot(tl.trans(v_i), v_j, v_product, input_precision=PRECISION)

        direct = i_columns[:, None] * d + j_columns[None, :]
        mirrored = i_columns[:, None] + j_columns[None, :] * d
        matrix = d * d
        out = grams + split.to(tl.int64) * (3 if WITH_CROSS else 2) * matrix
        if is_cross == 0:
            tl.store(out + direct, u_product)
            tl.store(out + matrix + direct, v_product)
            if i < j:
                tl.store(out + mirrored, u_product)
                tl.store(out + matrix + mirrored, v_product)
        else:
            tl.store(out + 2 * matrix + direct, u_product)
            if i < j:
                tl.store(out + 2 * matrix + mirrored, v_product)


def gram_matrices(
    image_features: Tensor, text_features: Tensor, means: Tensor | None, with_cross: bool
) -> Tensor:
    """As `eager.gram_matrices`."""
    config = config_for("gram_matrices", image_features)
    bd, bk = config.tile["BD"], config.tile["BK"]
    unpadded = image_features.shape[1]
    image, text = aligned_features(image_features, bd), aligned_features(text_features, bd)
    means = None if means is None else aligned_features(means, bd)
    n, d = image.shape
    most_splits = MAX_PARTS_ELEMENTS // (3 * unpadded**2)
    splits = max(1, min(MAX_SPLITS, n // MIN_SPLIT_ROWS, most_splits))
    split_rows = ceil_div(ceil_div(n, splits), bk) * bk
    splits = ceil_div(n, split_rows)
    matrices = 3 if with_cross else 2
    parts = image.new_empty(splits, matrices, d, d, dtype=torch.float32)
    with on_device_of(image):
        gram_matrices_kernel[((d // bd) ** 2, splits, matrices - 1)](
            image, text, means, parts, n, d, image.stride(0), text.stride(0), split_rows,
            WITH_CROSS=with_cross, **config.kwargs,
        )  # fmt: skip
    grams = parts[0] if splits == 1 else parts.sum(dim=0)  # in an order that is always the same
    return grams if d == unpadded else grams[:, :unpadded, :unpadded].contiguous()
