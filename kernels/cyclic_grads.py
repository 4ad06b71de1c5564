"""Gradients of the cyclic penalties from the Gram matrices A, B, C of U = I + T and V = I - T:

    dU = (a+b) U B + (a-b) V C^T         dI = dU + dV
    dV = (a+b) V A + (a-b) U C           dT = dU - dV

4 N D^2 flops, 8 if a != b. U and V are formed in registers in float32 and never stored. Neither sum
cancels: U is large where B is small, V small where A is large.
"""

import triton
import triton.language as tl
from torch import Tensor

from cyclip_loss import eager
from cyclip_loss.kernels.configs import Precision, config_for, launch_on, padded_rows
from cyclip_loss.kernels.tiles import grouped_tile, round_to_tf32


@triton.jit
def _load_matrix(matrix, columns, inner, d, TF32: tl.constexpr):
    """The (BK, BD) block of a matrix from its transpose's rows: `inner` is contiguous."""
    block = tl.load(matrix + columns[None, :] * d + inner[:, None])
    return round_to_tf32(block) if TF32 else block


@triton.jit(do_not_specialize=["n"])
def cyclic_grads_kernel(
    image,  # (n, d), rows `image_stride` apart
    text,  # (n, d), rows `text_stride` apart
    matrices,  # (2 or 4, d, d): the transposes of (a+b) A, (a+b) B, (a-b) C, (a-b) C^T
    image_grad,  # (n, d) out, contiguous
    text_grad,  # (n, d) out, contiguous
    n,
    d,  # a multiple of BD and BK
    image_stride,
    text_stride,
    WITH_CROSS: tl.constexpr,
    NEEDS_IMAGE: tl.constexpr,
    NEEDS_TEXT: tl.constexpr,
    TF32: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BD: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
):
    row_tile, column_tile = grouped_tile(tl.cdiv(n, BM), d // BD, GROUP)
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
        if TF32:
            u = round_to_tf32(u)
            v = round_to_tf32(v)
        a = _load_matrix(matrices, columns, inner, d, TF32)
        b = _load_matrix(matrices + d * d, columns, inner, d, TF32)
        u_grad = tl.dot(u, b, u_grad, input_precision=PRECISION)
        v_grad = tl.dot(v, a, v_grad, input_precision=PRECISION)
        if WITH_CROSS:
            c = _load_matrix(matrices + 2 * d * d, columns, inner, d, TF32)
            c_t = _load_matrix(matrices + 3 * d * d, columns, inner, d, TF32)
            u_grad = tl.dot(v, c_t, u_grad, input_precision=PRECISION)
            v_grad = tl.dot(u, c, v_grad, input_precision=PRECISION)

    at = rows.to(tl.int64)[:, None] * d + columns[None, :]
    valid = (rows < n)[:, None]
    if NEEDS_IMAGE:
        grad = (u_grad + v_grad).to(image_grad.dtype.element_ty)
        tl.store(image_grad + at, grad, mask=valid)
    if NEEDS_TEXT:
        grad = (u_grad - v_grad).to(text_grad.dtype.element_ty)
        tl.store(text_grad + at, grad, mask=valid)


def cyclic_grads(
    image_features: Tensor,
    text_features: Tensor,
    statistics: Tensor,
    coefficients: Tensor,
    direct: bool,
    with_cross: bool,
    needs: list[bool],
) -> tuple[Tensor, Tensor]:
    """As `cyclip_loss.eager.cyclic_grads`."""
    if direct:
        return eager.cyclic_grads(
            image_features, text_features, statistics, coefficients, direct, with_cross, needs
        )
    needs_image, needs_text = needs
    precision = Precision.of(image_features, widened=True)
    config = config_for("cyclic_grads", image_features, precision)
    tile = config.tile
    multiple = max(tile["BD"], tile["BK"])
    image, text = padded_rows(image_features, multiple), padded_rows(text_features, multiple)
    n, d = image.shape
    unpadded = image_features.shape[1]
    matrices = statistics.new_zeros(4 if with_cross else 2, d, d)
    # A and B are symmetric: their own transposes.
    matrices[:2, :unpadded, :unpadded] = statistics[:2] * coefficients[0]
    if with_cross:
        matrices[3, :unpadded, :unpadded] = statistics[2] * coefficients[1]
        matrices[2] = matrices[3].T
    image_grad = image.new_empty(image.shape if needs_image else (0,))
    text_grad = text.new_empty(text.shape if needs_text else (0,))
    grid = (triton.cdiv(n, tile["BM"]) * (d // tile["BD"]),)
    with launch_on(image):
        cyclic_grads_kernel[grid](
            image,
            text,
            matrices,
            image_grad,
            text_grad,
            n,
            d,
            image.stride(0),
            text.stride(0),
            WITH_CROSS=with_cross,
            NEEDS_IMAGE=needs_image,
            NEEDS_TEXT=needs_text,
            TF32=precision.dot == "tf32",
            PRECISION=precision.dot,
            **config.kwargs,
        )
    if needs_image:
        image_grad = image_grad[:, :unpadded]
    if needs_text:
        text_grad = text_grad[:, :unpadded]
    return image_grad.contiguous(), text_grad.contiguous()
