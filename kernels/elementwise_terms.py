"""An elementwise loss, such as SigLIP's, and its gradients in one sweep.

With l_ij = s * I_i . T_j + b, y_ij = 1 for pairs and other positives, else -1, and x = -y l:

    loss = sum_ij f(x_ij)            G_ij = -y_ij f'(x_ij)
    dI = w s G T    dT = w s G^T I    ds = w * sum_ij G_ij (I_i . T_j)    db = w * sum_ij G_ij

A program writes its tile of G (of 2^14 G for float16) and its parts of the three sums. The rest is
as in `contrastive_grads.py`: the library multiplies G with the features.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from cyclip_loss.kernels.configs import config_for
from cyclip_loss.kernels.contrastive_grads import multiplied_blocks, num_tiles
from cyclip_loss.kernels.tiles import (
    same_ids,
    sigmoid,
    softplus,
    sum_of,
    sum_of_products,
    tile_product,
)
from cyclip_loss.logits import Gradients, Logits
from cyclip_loss.numerics import float16_shift, on_device_of


@triton.jit
def elementwise(x, FUNCTION: tl.constexpr):
    """f(x) and f'(x) of a name in `eager.ELEMENTWISE`."""
    tl.static_assert(FUNCTION == "sigmoid")
    return softplus(x), sigmoid(x)


@triton.jit(
    do_not_specialize=["n", "m", "all_tiles", "partner_offset"],
    do_not_specialize_on_alignment=[
        "logit_scale", "logit_bias", "row_ids", "column_ids", "partials",
    ],
)  # fmt: skip
def elementwise_terms_kernel(
    row_features,  # (n, d), rows `row_stride` apart
    column_features,  # (m, d), rows `column_stride` apart
    logit_scale,  # scalar
    row_ids,  # (n,) and (m,): equal ones are left out or, with POSITIVES, have y = 1; or both None
    column_ids,
    gradient,  # out: 2^SHIFT * G in whole tiles, rows `gradient_stride` apart; or None
    n,
    m,
    d,  # a multiple of BK
    row_stride,
    column_stride,
    gradient_stride,
    partner_offset,  # row i is paired with column i + partner_offset
    logit_bias,  # scalar
    partials,  # (3, all_tiles) out: of the tiles, sums of the loss, of G, and of G_ij (I_i . T_j)
    all_tiles,
    FUNCTION: tl.constexpr,
    POSITIVES: tl.constexpr,
    SHIFT: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PARTS: tl.constexpr,
):
    row_tile, column_tile, parts = tile_product(
        row_features, column_features, n, m, d, row_stride, column_stride, PRECISION, BM, BN, BK,
        PARTS,
    )  # fmt: skip
    first_row = row_tile * BM
    scale = tl.load(logit_scale)
    bias = tl.load(logit_bias)
    rows = first_row + tl.arange(0, BM)
    partner = rows + partner_offset
    loss_sum = 0.0
    scale_sum = 0.0
    g_sum = 0.0
    WIDTH: tl.constexpr = BN // PARTS
    for part in tl.static_range(PARTS):
        columns = column_tile * BN + part * WIDTH + tl.arange(0, WIDTH)
        x = parts[part] * scale + bias
        is_positive = partner[:, None] == columns[None, :]
        counts = (rows < n)[:, None] & (columns < m)[None, :]
        if row_ids is not None:
            same = same_ids(row_ids, column_ids, rows, columns, n, m)
            if POSITIVES:
                is_positive |= same
            counts &= is_positive | ~same
        # -inf has no loss and no gradient.
        x = tl.where(counts, tl.where(is_positive, -x, x), -float("inf"))
        value, derivative = elementwise(x, FUNCTION)
        loss_sum += sum_of(value)
        g = tl.where(is_positive, -derivative, derivative)
        scale_sum += sum_of_products(g, parts[part])
        g_sum += sum_of(g)
        if gradient is not None:
            tile_start = gradient + first_row.to(tl.int64) * gradient_stride
            within = tl.arange(0, BM)[:, None] * gradient_stride + columns[None, :]
            tl.store(tile_start + within, (g * (1 << SHIFT)).to(gradient.dtype.element_ty))
    tile = partials + tl.program_id(0)
    # An infinite feature may give a logit without loss. It makes the other sum NaN.
    tl.store(tile, loss_sum + 0.0 * scale_sum)
    tl.store(tile + all_tiles, g_sum)
    tl.store(tile + 2 * all_tiles, scale_sum)


def elementwise_terms(
    logits: Logits, logit_bias: Tensor, function: str, weight: float, needs: list[bool]
) -> tuple[Tensor, Gradients]:
    """As `eager.elementwise_terms`. Without a needed gradient, G is not stored."""
    features = logits.row_features
    config = config_for("elementwise_terms", features, logits.row_ids is not None)
    tiles = num_tiles(logits, config)
    partials = logit_bias.new_empty(3, tiles)
    with on_device_of(features):
        grads = multiplied_blocks(
            elementwise_terms_kernel,
            logits,
            config,
            lambda start, left, tiles_before: (logit_bias, partials[:, tiles_before:], tiles),
            {"FUNCTION": function, "POSITIVES": logits.positives},
            needs,
            logits.logit_scale * (weight * 2.0 ** -float16_shift(features)),
            torch.float32,
        )
        sums = partials.sum(dim=1)  # in an order that is always the same
    if not any(needs):
        sums[1] = 0.0  # as the eager engine, which does not compute G then
    scale_grad = sums[2] * weight if needs[2] else sums.new_empty(0)
    return sums[:2], Gradients(*grads, scale_grad)
