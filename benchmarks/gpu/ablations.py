"""Shows how much of a sweep over the logits is its epilogue: all work after the matrix products.

A sweep is the kernel `contrastive_lse` or `contrastive_grads`. It is compared with a kernel that
computes only the products of the same tiles. The difference is the time of the epilogue that the
products of other programs do not hide, and bounds what a faster epilogue could gain. It includes
the small kernel that joins the results of the tiles. On Hopper the tiles of one sweep are those of
the other, transposed, so the two product kernels also show what the shape of a tile costs.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from benchmarks.measure import interleaved, time_columns
from benchmarks.predict import COST_OF_SHAPE, EPILOGUE_SHARE
from benchmarks.run import Row, Run
from cyclip_loss.kernels.configs import Precision, config_for
from cyclip_loss.kernels.tiles import grouped_tile, tile_product
from cyclip_loss.tune import launcher

SECONDS = 2.0
SLEEP_CYCLES = 4 * 10**6  # 2 ms, in which Python launches the kernels that are timed
SWEEPS = ("contrastive_lse", "contrastive_grads")


@triton.jit
def product_kernel(
    image,  # (n, d)
    text,  # (n, d)
    wanted,  # the sums are stored if it is above 0; the compiler does not know its value
    sums,  # (programs,)
    n,  # a multiple of BM and of BN
    d,  # a multiple of BK
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PARTS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Compute the product of a tile. The compiler cannot remove it, because it may be stored."""
    row, column = grouped_tile(tl.cdiv(n, BM), tl.cdiv(n, BN), GROUP)
    product = tile_product(image, text, row * BM, column * BN, n, n, d, d, d, PRECISION, BM, BN, BK)
    if wanted > 0.0:
        total = tl.sum(tl.sum(product, axis=1), axis=0)
        tl.store(sums + row * tl.cdiv(n, BN) + column, total)


class TileProducts(NamedTuple):
    """A launch that computes the tiles of a sweep without an epilogue."""

    tile: str  # height x width of a tile
    sums: Tensor  # (rows of tiles, columns of tiles), written only if `wanted` is above 0
    launch: Callable[[], object]


def tile_products(sweep: str, image: Tensor, text: Tensor, wanted: float = 0.0) -> TileProducts:
    """Prepare the products of a sweep's tiles. If wanted > 0, a launch writes the tiles' sums."""
    n, d = image.shape
    config = config_for(sweep, image, Precision.of(image))
    height, width = config.tile["BM"], config.tile["BN"]
    sums = torch.zeros(n // height, n // width, device=image.device)
    options = {"PRECISION": "tf32", **config.kwargs}
    grid = (sums.numel(),)
    launch = partial(product_kernel[grid], image, text, wanted, sums, n, d, **options)
    return TileProducts(f"{height} x {width}", sums, launch)


def ablations(run: Run) -> None:
    """Time both sweeps and the products of their tiles. Compare them with three predictions."""
    n, d, repeats = (256, 64, 1) if run.dry_run else (16384, 768, 4)
    image, text = run.pairs(n, d, torch.bfloat16)
    steps: dict[str, Callable[[], object]] = {}
    rows: dict[str, Row] = {}
    for sweep in SWEEPS:
        products = tile_products(sweep, image, text)
        launch_sweep, _ = launcher(sweep, image, text)
        for what, launch in ((sweep, launch_sweep), (f"{sweep}, product", products.launch)):
            with run.attempt(what=what, N=n, D=d, tile=products.tile) as rows[what]:
                launch()  # compiles the kernel
                steps[what] = partial(repeat, launch, repeats)
    seconds, min_rounds = (0.0, 1) if run.dry_run else (SECONDS, 5)
    times = interleaved(steps, run.device, seconds, min_rounds, sleep_cycles=SLEEP_CYCLES)
    for what, milliseconds in times.items():
        rows[what] |= time_columns([duration / repeats for duration in milliseconds])
        rows[what]["TFLOP/s"] = 2 * n * n * d / rows[what]["ms"] / 1e9
    with run.start_section("ablations answer"):
        compare_with_predictions(run, {what: rows[what]["ms"] for what in steps})


def compare_with_predictions(run: Run, milliseconds: dict[str, float]) -> None:
    """Add a row for each prediction. Predictions whose times were not measured are left out."""
    forward, backward = SWEEPS
    for question, baseline, total, predicted in (
        (f"the epilogue's share of {forward}", f"{forward}, product", forward, EPILOGUE_SHARE),
        (f"the epilogue's share of {backward}", f"{backward}, product", backward, EPILOGUE_SHARE),
        (
            f"the share of {forward}'s product that the shape of its tile costs",
            f"{backward}, product",
            f"{forward}, product",
            COST_OF_SHAPE,
        ),
    ):
        if {baseline, total} <= milliseconds.keys():
            share = 1 - milliseconds[baseline] / milliseconds[total]
            run.add_row(question=question, measured=f"{100 * share:.1f} %", predicted=predicted)


def repeat(launch: Callable[[], object], times: int) -> None:
    """Launch several times, one after another."""
    for _ in range(times):
        launch()
