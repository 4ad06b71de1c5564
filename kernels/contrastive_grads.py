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

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from cyclip_loss.kernels.configs import SUM, Config, Precision, config_for
from cyclip_loss.kernels.launch import aligned_features, ceil_div, launch
from cyclip_loss.kernels.tiles import LN_2, LOG2_E, grouped_tile, same_ids, split, tile_product
from cyclip_loss.logits import Gradients, Logits, SavedStatistics
from cyclip_loss.numerics import add_product, matmul, on_device_of

# A block of G has at most this many rows and elements, so 16,384 columns: 512 MB in 16 bits, at
# every N. Both products of a block sum over thousands of elements. At D = 768 they have 384 output
# tiles of 128 x 256, which should fill 97% of 132 SMs (73% with half as many rows). Each product
# reads and writes its float32 sums once per block: 3 GB in all at N = 65,536.
BLOCK_ROWS = 16384
BLOCK_ELEMENTS = 2**28


@triton.jit(
    do_not_specialize=["n", "m", "partner_offset", "num_pairs"],
    do_not_specialize_on_alignment=[
        "logit_scale", "grad", "row_lse", "column_lse", "pair_gradient", "scale_partials",
        "row_ids", "column_ids",
    ],
)  # fmt: skip
def contrastive_grads_kernel(
    row_features,  # (n, d), rows `row_stride` apart
    column_features,  # (m, d), rows `column_stride` apart
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
    row_stride,
    column_stride,
    gradient_stride,
    partner_offset,  # row i < num_pairs is paired with column i + partner_offset
    num_pairs,
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
        row_features, column_features, first_row, column_tile * BN, n, m, d, row_stride,
        column_stride, PRECISION, BM, BN, BK,
    )  # fmt: skip
    logit_scale = tl.load(logit_scale)
    scale = logit_scale * LOG2_E
    factor = tl.load(grad) * weight * logit_scale
    rows = first_row + tl.arange(0, BM)
    first_pair = first_row + partner_offset
    # The offset of the tile has 64 bits, offsets within it 32.
    tile_start = gradient + first_row.to(tl.int64) * gradient_stride
    tile_sum = 0.0
    WIDTH: tl.constexpr = BN // PARTS
    parts = split(product, BM, BN, PARTS)
    for part in tl.static_range(PARTS):
        start = column_tile * BN + part * WIDTH
        columns = start + tl.arange(0, WIDTH)
        # Past the end the last values are read again. The mask below drops their results.
        r = (tl.load(row_lse + tl.minimum(rows, n - 1)) - SHIFT * LN_2) * LOG2_E
        g = tl.exp2(parts[part] * scale - r[:, None])
        if SYMMETRIC:
            c = (tl.load(column_lse + tl.minimum(columns, m - 1)) - SHIFT * LN_2) * LOG2_E
            # Two exponentials per element. One shared exponential would need a branch, and the
            # branch spills registers.
            g += tl.exp2(parts[part] * scale - c[None, :])
        if row_ids is not None:
            g = tl.where(same_ids(row_ids, column_ids, rows, columns, n, m), 0.0, g)
        has_pairs = (first_pair < start + WIDTH) & (first_pair + BM > start)
        # Whole tiles are stored, with 0 outside the matrix, as a mask on columns would prevent wide
        # stores. The pairs share the branch: a branch of their own would spill registers.
        if has_pairs | (first_row + BM > n) | (start + WIDTH > m):
            partner = tl.where(rows < num_pairs, rows + partner_offset, -2)
            is_pair = partner[:, None] == columns[None, :]
            pair_value = tl.load(pair_gradient + rows, mask=rows < n, other=0.0) * (1 << SHIFT)
            g = tl.where(is_pair, pair_value[:, None], g)
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
        index = start + tl.arange(0, BLOCK)
        total += tl.load(scale_partials + index, mask=index < length, other=0.0)
    tl.store(scale_grad, tl.sum(total, axis=0) * weight * tl.load(grad))


def _block_shape(config: Config, n: int, m: int) -> tuple[int, int]:
    """Rows and columns of one block of G, multiples of the tile's."""
    bm, bn = config.tile["BM"], config.tile["BN"]
    height = ceil_div(min(n, BLOCK_ROWS), bm) * bm
    width = max(1, BLOCK_ELEMENTS // (height * bn)) * bn
    return height, min(width, ceil_div(m, bn) * bn)


class _Gradient:
    """w s G block by block in one buffer, and the sums of its tiles for the scale's gradient.

    If `shift` is not 0, the buffer holds 2^shift G instead.
    """

    def __init__(
        self,
        logits: Logits,
        saved: SavedStatistics,
        grad: Tensor,
        weight: float,
        needs_scale: bool,
    ) -> None:
        features = logits.row_features
        self.precision, with_ids = Precision.of(features), logits.row_ids is not None
        self.config = config_for("contrastive_grads", features, self.precision, with_ids)
        tile = self.config.tile
        self.aligned = logits._replace(
            row_features=aligned_features(features, tile["BK"]),
            column_features=aligned_features(logits.column_features, tile["BK"]),
        )
        self.saved, self.grad, self.weight = saved, grad, weight
        self.needs_scale = needs_scale
        # float16 keeps 11 bits only above 6e-5, and most of w s G is far smaller. So 2^14 G is
        # stored, without w and s. Its largest possible element, 2^15, still fits.
        self.shift = 14 if features.dtype == torch.float16 else 0
        n, m = features.shape[0], logits.column_features.shape[0]
        self.height, self.width = _block_shape(self.config, n, m)
        self.buffer = features.new_empty(self.height, self.width)
        # Tiles of all blocks: blocks consist of whole tiles.
        self.num_tiles = ceil_div(n, tile["BM"]) * ceil_div(m, tile["BN"])
        self.tiles_done = 0
        self.scale_partials = saved.row_lse.new_empty(self.num_tiles if needs_scale else 0)

    def weighted(self, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
        """What makes a gradient of the dtype out of a product with G."""
        if not self.shift:
            return lambda total: total.to(dtype)
        factor = self.grad * self.aligned.logit_scale * (self.weight * 2.0**-self.shift)
        return lambda total: total.mul_(factor).to(dtype)

    def block(self, start: int, left: int) -> Tensor:
        """The block of G from row `start` and column `left` on: (up to height, up to width)."""
        part = self.aligned.block(start, start + self.height, left, left + self.width)
        (rows, d), columns = part.row_features.shape, part.column_features.shape[0]
        tile, saved = self.config.tile, self.saved
        tiles = ceil_div(rows, tile["BM"]) * ceil_div(columns, tile["BN"])
        launch(
            contrastive_grads_kernel, (tiles,),
            part.row_features, part.column_features, part.logit_scale, self.grad,
            saved.row_lse[start:], saved.column_lse[left:], saved.pair_gradient[start:],
            part.row_ids, part.column_ids, self.buffer, self.scale_partials[self.tiles_done :],
            rows, columns, d, part.row_features.stride(0), part.column_features.stride(0),
            self.width, part.partner_offset, part.num_pairs, float(self.weight),
            SYMMETRIC=part.symmetric, NEEDS_SCALE=self.needs_scale, SHIFT=self.shift,
            PRECISION=self.precision.dot, **self.config.kwargs,
        )  # fmt: skip
        self.tiles_done += tiles
        return self.buffer[:rows, :columns]

    def scale_grad(self) -> Tensor:
        """ds, after all blocks; empty if it is not needed."""
        result = self.saved.row_lse.new_empty(() if self.needs_scale else (0,))
        if self.needs_scale:
            weight = self.weight * 2.0**-self.shift
            launch(
                scale_grad_kernel, (1,), self.scale_partials, self.grad, result, self.num_tiles,
                weight, **SUM.kwargs,
            )  # fmt: skip
        return result


def contrastive_grads(
    logits: Logits,
    saved: SavedStatistics,
    grad: Tensor,
    weight: float,
    needs: list[bool],
    float32_grads: bool,
) -> Gradients:
    """As `eager.contrastive_grads`."""
    needs_rows, needs_columns, needs_scale = needs
    row_features, column_features = logits.row_features, logits.column_features
    n, m = row_features.shape[0], column_features.shape[0]
    grad_dtype = torch.float32 if float32_grads else row_features.dtype
    nothing = row_features.new_empty(0, dtype=grad_dtype)
    with on_device_of(row_features):
        gradient = _Gradient(logits, saved, grad, weight, needs_scale)
        # If one block holds all of G, the products are the gradients.
        is_sum = gradient.shift or n > gradient.height or m > gradient.width
        dtype = torch.float32 if is_sum else grad_dtype
        weighted = gradient.weighted(grad_dtype)
        row_grads: list[Tensor] = []
        column_sums: dict[int, Tensor] = {}
        for start in range(0, n, gradient.height):
            rows = row_features[start : start + gradient.height]
            row_sum = None
            for left in range(0, m, gradient.width):
                columns = column_features[left : left + gradient.width]
                block = gradient.block(start, left)
                if needs_rows:
                    row_sum = _plus_product(row_sum, block, columns, dtype)
                if needs_columns:
                    column_sums[left] = _plus_product(column_sums.get(left), block.T, rows, dtype)
            if row_sum is not None:
                row_grads.append(weighted(row_sum))
        column_grads = [weighted(column_sums[left]) for left in column_sums]
        scale_grad = gradient.scale_grad()
    return Gradients(_joined(row_grads, nothing), _joined(column_grads, nothing), scale_grad)


def _plus_product(total: Tensor | None, a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """total + a b, in place; a b in the dtype without a total."""
    if total is None:
        return matmul(a, b, dtype)
    add_product(total, a, b)
    return total


def _joined(parts: list[Tensor], nothing: Tensor) -> Tensor:
    return torch.cat(parts) if len(parts) > 1 else parts[0] if parts else nothing
