"""What bounds a sweep: its tile's product alone, the whole of it, and the library's products.

What a sweep takes longer than the product of its tiles is its epilogue, as far as that is not
hidden behind the products of other programs: the most that any other epilogue could gain.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from benchmarks.gpu.sweep import launcher
from benchmarks.run import Run
from benchmarks.timing import columns, interleaved
from cyclip_loss import eager
from cyclip_loss.kernels.configs import ARCHITECTURES, INTERPRETED, Config, _architecture, _product
from cyclip_loss.kernels.products import product_over_columns
from cyclip_loss.kernels.tiles import grouped_tile, tile_product

SECONDS = 0.3
RESERVE = 4.0  # seconds that a measurement may take more: its first launch compiles it
# Two programs an SM, of which one can multiply while the other is at its epilogue.
TWO_PROGRAMS = _product(128, 128, 64, 4, 3, parts=2)


@triton.jit
def product_kernel(
    image,  # (n, d)
    text,  # (n, d)
    wanted,  # whether the sums are
    sums,  # (programs,)
    n,  # a multiple of BM and of BN
    d,  # a multiple of BK
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PARTS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Each tile's product, and no more: that it is not stored the compiler can't know."""
    row, column = grouped_tile(tl.cdiv(n, BM), tl.cdiv(n, BN), GROUP)
    product = tile_product(
        image, text, row * BM, column * BN, n, n, d, d, d, PRECISION, WIDEN, BM, BN, BK
    )
    if wanted > 0.0:
        total = tl.sum(tl.sum(product, axis=1), axis=0)
        tl.store(sums + row * tl.cdiv(n, BN) + column, total)


def product_launcher(
    run: Run, config: Config, n: int, d: int, wanted: float = 0.0
) -> tuple[Callable[[], object], Tensor]:
    """What launches the tiles' products of (n, d) features; and their sums, 0 if not wanted."""
    image, text = run.pairs(n, d, torch.bfloat16)
    programs = n // config.tile["BM"] * (n // config.tile["BN"])
    sums = torch.zeros(programs, device=run.device)

    def launch() -> None:
        product_kernel[programs,](
            image, text, wanted, sums, n, d, PRECISION="tf32", WIDEN=INTERPRETED, **config.kwargs
        )

    return launch, sums


def ablations(run: Run) -> None:
    """Both sweeps as shipped beside the products of their tiles, then the products with G."""
    table = ARCHITECTURES["sm_90" if run.dry_run else _architecture(run.device)]
    n, d = (256, 64) if run.dry_run else (16384, 768)
    for kernel in ("contrastive_lse", "contrastive_grads"):
        for config in (table[kernel][16, "tf32"], TWO_PROGRAMS):
            size = "x".join(str(config.tile[name]) for name in ("BM", "BN", "BK"))
            launch, _ = product_launcher(run, config, n, d)
            tile = f"{size}, {config.num_warps} warps, {config.num_stages} stages"
            timed(run, f"{kernel}: products of {tile}", n, n, d, launch)
        shipped = launcher(run, kernel, n, d)
        timed(run, f"{kernel} as shipped", n, n, d, shipped)
    products(run)


def products(run: Run) -> None:
    """The library's, of a block of G with the features: float32 sums, float32 or bfloat16 results.

    And a rank's 512 rows against many columns, at once and split over columns.
    """
    block, few, many, d = (64, 16, 128, 32) if run.dry_run else (16384, 512, 32768, 768)
    short = torch.bfloat16
    features, _ = run.pairs(many, d, short)
    gradient = torch.randn(block, block, device=run.device).to(short)
    strip = torch.randn(few, many, device=run.device).to(short)
    sums, rows = torch.zeros(block, d, device=run.device), features[:block]
    for what, n, m, product in (
        ("G T added to float32", block, block, partial(eager.add_product, sums, gradient, rows)),
        ("G T to float32", block, block, partial(eager.product, gradient, rows, torch.float32)),
        ("G T to bfloat16", block, block, partial(eager.product, gradient, rows, short)),
        ("G T to bfloat16", few, many, partial(eager.product, strip, features, short)),
        ("the same split", few, many, partial(product_over_columns, strip, features, short)),
    ):
        timed(run, what, n, m, d, product)


def timed(run: Run, what: str, n: int, m: int, d: int, call: Callable[[], Any]) -> None:
    """Add a row of a product of (n, m, d) and what follows it, if there is time."""
    if run.remaining() < RESERVE:
        run.note(f"{what}, D = {d} left out: no time")
        return
    call()
    seconds, most = (0.0, 1) if run.dry_run else (SECONDS, 50)
    spent = columns(interleaved({"": call}, run.device, seconds, least=5, most=most)[""])
    run.row(what=what, n=n, m=m, D=d, **spent, **{"TFLOP/s": 2 * n * m * d / spent["ms"] / 1e9})
