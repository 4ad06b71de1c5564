"""Gradients of the features from those of the Gram matrices of U = I + T and V = I - T:

    dU = U (dA + dA^T) + V dC            dI = dU + dV
    dV = V (dB + dB^T) + U dC^T          dT = dU - dV

4 N D^2 flops, 8 with C. U and V are formed in registers in float32 and never stored. For the
penalties neither sum cancels: where U is large, dA is small, and where V is small, dB is large.
"""

import triton
import triton.language as tl
from torch import Tensor

from cyclip_loss.kernels.configs import ROUND, config_for
from cyclip_loss.kernels.tiles import (
    aligned_features,
    ceil_div,
    grouped_tile,
    round_to_tf32,
)
from cyclip_loss.numerics import on_device_of


@triton.jit
def factors_kernel(
    a_grad,  # (d, d), as the next two
    b_grad,
    c_grad,
    means,  # (2, padded_d), of the images and of the texts, float32; or None
    factors,  # (2 or 4, padded_d, padded_d) out: dA + dA^T, dB + dB^T, dC^T, dC
    u_v_means,  # (2, padded_d) out: the means of U and of V, unless `means` is None
    d,
    padded_d,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The transposes of what U and V are multiplied by, zero-padded and rounded; means of U and V.

    The means are added here, because `cyclic_grads_kernel` has no registers for them.
    """
    matrix = tl.program_id(1)
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = index // padded_d
    column = index - row * padded_d
    inside = (row < d) & (column < d)
    direct = row * d + column
    mirrored = column * d + row
    if matrix == 0:
        factor = tl.load(a_grad + direct, inside, 0.0) + tl.load(a_grad + mirrored, inside, 0.0)
    elif matrix == 1:
        factor = tl.load(b_grad + direct, inside, 0.0) + tl.load(b_grad + mirrored, inside, 0.0)
    else:
        factor = tl.load(c_grad + tl.where(matrix == 2, mirrored, direct), inside, 0.0)
    if PRECISION == "tf32":
        factor = round_to_tf32(factor)
    size = padded_d * padded_d
    tl.store(factors + matrix.to(tl.int64) * size + index, factor, mask=index < size)
    if means is not None:  # noqa: SIM102 (decided when it is compiled, unlike the next one)
        if matrix == 0:
            is_mean = index < padded_d
            image_mean = tl.load(means + index, is_mean, 0.0)
            text_mean = tl.load(means + padded_d + index, is_mean, 0.0)
            tl.store(u_v_means + index, image_mean + text_mean, mask=is_mean)
            tl.store(u_v_means + padded_d + index, image_mean - text_mean, mask=is_mean)


@triton.jit(do_not_specialize=["n"])
def cyclic_grads_kernel(
    image,  # (n, d), rows `image_stride` apart
    text,  # (n, d), rows `text_stride` apart
    u_v_means,  # (2, d), from `factors_kernel`; or None
    factors,  # (2 or 4, d, d), from `factors_kernel`
    image_grad,  # (n, d) out, contiguous
    text_grad,  # (n, d) out, contiguous
    n,
    d,  # a multiple of BD and BK
    image_stride,
    text_stride,
    WITH_CROSS: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BD: tl.constexpr,
    BK: tl.constexpr,
):
    row_tile, column_tile = grouped_tile(tl.cdiv(n, BM), d // BD)
    rows = row_tile * BM + tl.arange(0, BM)
    columns = column_tile * BD + tl.arange(0, BD)
    row = tl.minimum(rows, n - 1).to(tl.int64)
    u_grad = tl.zeros((BM, BD), dtype=tl.float32)
    v_grad = tl.zeros((BM, BD), dtype=tl.float32)
    for start in range(0, d, BK):
        inner = start + tl.arange(0, BK)
        image_pointers = image + row[:, None] * image_stride + inner[None, :]
        text_pointers = text + row[:, None] * text_stride + inner[None, :]
        i = tl.load(image_pointers).to(tl.float32)
        t = tl.load(text_pointers).to(tl.float32)
        u = i + t
        v = i - t
        if u_v_means is not None:
            u -= tl.load(u_v_means + inner)[None, :]
            v -= tl.load(u_v_means + d + inner)[None, :]
        if PRECISION == "tf32":
            u = round_to_tf32(u)
            v = round_to_tf32(v)
        # (BK, BD) blocks, read along contiguous rows. They come rounded: rounded here, in
        # registers, they would go back to shared memory. Loading all of them first saves registers.
        blocks = factors + columns[None, :] * d + inner[:, None]
        a = tl.load(blocks)
        b = tl.load(blocks + d * d)
        if WITH_CROSS:
            c = tl.load(blocks + 2 * d * d)
            c_t = tl.load(blocks + 3 * d * d)
        u_grad = tl.dot(u, a, u_grad, input_precision=PRECISION)
        v_grad = tl.dot(v, b, v_grad, input_precision=PRECISION)
        if WITH_CROSS:
            u_grad = tl.dot(v, c, u_grad, input_precision=PRECISION)
            v_grad = tl.dot(u, c_t, v_grad, input_precision=PRECISION)

    offset = rows.to(tl.int64)[:, None] * d + columns[None, :]
    valid = (rows < n)[:, None]
    tl.store(image_grad + offset, (u_grad + v_grad).to(image_grad.dtype.element_ty), mask=valid)
    tl.store(text_grad + offset, (u_grad - v_grad).to(text_grad.dtype.element_ty), mask=valid)


def cyclic_grads(
    image_features: Tensor, text_features: Tensor, means: Tensor | None, gram_grads: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """As `eager.cyclic_grads`."""
    config = config_for("cyclic_grads", image_features)
    tile = config.tile
    multiple = max(tile["BD"], tile["BK"])
    image, text = (aligned_features(x, multiple) for x in (image_features, text_features))
    u_v_means = None
    if means is not None:
        means = aligned_features(means, multiple)
        u_v_means = means.new_empty(means.shape)
    n, d = image.shape
    unpadded = image_features.shape[1]
    a_grad, b_grad, *c_grad = gram_grads
    factors = a_grad.new_empty(4 if c_grad else 2, d, d)
    image_grad, text_grad = image.new_empty(n, d), text.new_empty(n, d)
    with on_device_of(image):
        factors_kernel[(ceil_div(d * d, ROUND.tile["BLOCK"]), len(factors))](
            a_grad, b_grad, *c_grad or [a_grad], means, factors, u_v_means, unpadded, d,
            PRECISION=tile["PRECISION"], **ROUND.kwargs,
        )  # fmt: skip
        cyclic_grads_kernel[(ceil_div(n, tile["BM"]) * (d // tile["BD"]),)](
            image, text, u_v_means, factors, image_grad, text_grad, n, d, image.stride(0),
            text.stride(0), WITH_CROSS=len(factors) == 4, **config.kwargs,
        )  # fmt: skip
    if d == unpadded:
        return image_grad, text_grad
    return image_grad[:, :unpadded].contiguous(), text_grad[:, :unpadded].contiguous()
