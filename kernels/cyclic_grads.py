"""Gradients of the features from those of the Gram matrices of U = I + T and V = I - T:

    dU = U (dA + dA^T) + V dC            dI = dU + dV
    dV = V (dB + dB^T) + U dC^T          dT = dU - dV

4 N D^2 flops, 8 with C. U and V
are formed in registers in float32 and never stored. Neither sum cancels: where U is large, B is
small, and where V is small, A is large.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from cyclip_loss.kernels.configs import config_for
from cyclip_loss.kernels.tiles import (
    aligned_features,
    ceil_div,
    grouped_tile,
    round_to_tf32,
    u_and_v,
)
from cyclip_loss.numerics import on_device_of


@triton.jit
def _load_matrix(pointers, PRECISION: tl.constexpr):
    block = tl.load(pointers)
    return round_to_tf32(block) if PRECISION == "tf32" else block


@triton.jit(do_not_specialize=["n"])
def cyclic_grads_kernel(
    image,  # (n, d), rows `image_stride` apart
    text,  # (n, d), rows `text_stride` apart
    matrices,  # (2 or 3, d, d): dA + dA^T, dB + dB^T, dC
    image_grad,  # (n, d) out, contiguous
    text_grad,  # (n, d) out, contiguous
    n,
    d,  # a multiple of BD and BK
    image_stride,
    text_stride,
    WITH_CROSS: tl.constexpr,
    NEEDS_IMAGE: tl.constexpr,
    NEEDS_TEXT: tl.constexpr,
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
        u, v = u_and_v(i, t, PRECISION)
        # (BK, BD) blocks. The first two, which are symmetric, and dC^T are read along contiguous
        # rows.
        mirrored = matrices + columns[None, :] * d + inner[:, None]
        a = _load_matrix(mirrored, PRECISION)
        b = _load_matrix(mirrored + d * d, PRECISION)
        u_grad = tl.dot(u, a, u_grad, input_precision=PRECISION)
        v_grad = tl.dot(v, b, v_grad, input_precision=PRECISION)
        if WITH_CROSS:
            c_t = _load_matrix(mirrored + 2 * d * d, PRECISION)
            direct = matrices + inner[:, None] * d + columns[None, :]
            c = _load_matrix(direct + 2 * d * d, PRECISION)
            u_grad = tl.dot(v, c, u_grad, input_precision=PRECISION)
            v_grad = tl.dot(u, c_t, v_grad, input_precision=PRECISION)

    offset = rows.to(tl.int64)[:, None] * d + columns[None, :]
    valid = (rows < n)[:, None]
    if NEEDS_IMAGE:
        grad = (u_grad + v_grad).to(image_grad.dtype.element_ty)
        tl.store(image_grad + offset, grad, mask=valid)
    if NEEDS_TEXT:
        grad = (u_grad - v_grad).to(text_grad.dtype.element_ty)
        tl.store(text_grad + offset, grad, mask=valid)


def cyclic_grads(
    image_features: Tensor, text_features: Tensor, gram_grads: Tensor, needs: list[bool]
) -> tuple[Tensor, Tensor]:
    """As `eager.cyclic_grads`."""
    needs_image, needs_text = needs
    config = config_for("cyclic_grads", image_features)
    tile = config.tile
    multiple = max(tile["BD"], tile["BK"])
    image, text = (aligned_features(x, multiple) for x in (image_features, text_features))
    n, d = image.shape
    unpadded = image_features.shape[1]
    symmetric = gram_grads[:2] + gram_grads[:2].mT
    matrices = symmetric if len(gram_grads) == 2 else torch.cat((symmetric, gram_grads[2:]))
    if d != unpadded:
        matrices = torch.nn.functional.pad(matrices, (0, d - unpadded, 0, d - unpadded))
    image_grad = image.new_empty(image.shape if needs_image else (0,))
    text_grad = text.new_empty(text.shape if needs_text else (0,))
    grid = (ceil_div(n, tile["BM"]) * (d // tile["BD"]),)
    with on_device_of(image):
        cyclic_grads_kernel[grid](
            image, text, matrices, image_grad, text_grad, n, d, image.stride(0), text.stride(0),
            WITH_CROSS=len(matrices) == 3, NEEDS_IMAGE=needs_image, NEEDS_TEXT=needs_text,
            **config.kwargs,
        )  # fmt: skip
    if d == unpadded:
        return image_grad, text_grad
    return image_grad[..., :unpadded].contiguous(), text_grad[..., :unpadded].contiguous()
