"""The cyclic penalties from the Gram matrices A, B, C of U = I + T and V = I - T.

    p = <A, B>_F        q = <C, C^T>_F        N P_in = (p + q) / 2        N P_cross = (p - q) / 2

Each program of the first kernel writes p and q of its tile. The second kernel, a single program,
adds them up. So each sum has a fixed order.
"""

import triton
import triton.language as tl
from torch import Tensor

from cyclip_loss.kernels.configs import SUM, TRACES
from cyclip_loss.kernels.tiles import ceil_div, number_or_pointer, scalar, sum_of_products
from cyclip_loss.numerics import on_device_of


@triton.jit
def traces_kernel(
    grams,  # (2 or 3, D, D)
    partials,  # (2, programs) out: p and q of the tiles
    d,  # D
    WITH_CROSS: tl.constexpr,
    BD: tl.constexpr,
):
    tiles = tl.cdiv(d, BD)
    rows = tl.program_id(0) // tiles * BD + tl.arange(0, BD)
    columns = tl.program_id(0) % tiles * BD + tl.arange(0, BD)
    inside = (rows < d)[:, None] & (columns < d)[None, :]
    pointers = grams + rows[:, None] * d + columns[None, :]
    a = tl.load(pointers, mask=inside, other=0.0)
    b = tl.load(pointers + d * d, mask=inside, other=0.0)
    p = sum_of_products(a, b)
    tl.store(partials + tl.program_id(0), p)
    if WITH_CROSS:
        mirrored = grams + rows[:, None] + columns[None, :] * d
        c = tl.load(pointers + 2 * d * d, mask=inside, other=0.0)
        c_t = tl.load(mirrored + 2 * d * d, mask=inside, other=0.0)
        q = sum_of_products(c, c_t)
        tl.store(partials + tl.num_programs(0) + tl.program_id(0), q)


@triton.jit(
    do_not_specialize=["length"],
    do_not_specialize_on_alignment=["weight_inmodal", "weight_crossmodal"],
)
def cyclic_terms_kernel(
    partials,  # (2, length)
    weight_inmodal,  # scalars: numbers or pointers to them
    weight_crossmodal,
    inmodal_term,  # scalar out: without AS_TERMS, the sum of both terms
    crossmodal_term,  # scalar out
    length,
    WITH_CROSS: tl.constexpr,
    AS_TERMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    p_sum = tl.zeros((BLOCK,), dtype=tl.float32)
    q_sum = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, length, BLOCK):
        index = start + tl.arange(0, BLOCK)
        p_sum += tl.load(partials + index, mask=index < length, other=0.0)
        if WITH_CROSS:
            q_sum += tl.load(partials + length + index, mask=index < length, other=0.0)
    p = tl.sum(p_sum, axis=0)
    q = tl.sum(q_sum, axis=0)
    # Sums of squares, which rounding must not make negative. NaN stays NaN.
    inmodal = tl.where(p + q < 0.0, 0.0, p + q) * (scalar(weight_inmodal) * 0.5)
    crossmodal = tl.where(p - q < 0.0, 0.0, p - q) * (scalar(weight_crossmodal) * 0.5)
    if AS_TERMS:
        tl.store(inmodal_term, inmodal)
        tl.store(crossmodal_term, crossmodal)
    else:
        tl.store(inmodal_term, inmodal + crossmodal)


def cyclic_terms(grams: Tensor, weights: list[Tensor], as_terms: bool) -> list[Tensor]:
    """As `eager.cyclic_terms`."""
    with_cross, d = len(grams) == 3, grams.shape[1]
    programs = ceil_div(d, TRACES.tile["BD"]) ** 2
    partials = grams.new_empty(2, programs)
    terms = [grams.new_empty(()) for _ in range(1 + as_terms)]
    with on_device_of(grams):
        traces_kernel[(programs,)](grams, partials, d, WITH_CROSS=with_cross, **TRACES.kwargs)
        cyclic_terms_kernel[(1,)](
            partials, *map(number_or_pointer, weights), terms[0], terms[-1], programs,
            WITH_CROSS=with_cross, AS_TERMS=as_terms, **SUM.kwargs,
        )  # fmt: skip
    return terms
