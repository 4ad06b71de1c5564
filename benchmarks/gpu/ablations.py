"""What bounds a sweep: the whole sweep compared with the products of its tiles alone.

The difference is the epilogue, as far as the products of other programs do not hide it. No other
epilogue can gain more. The small kernel that joins the tiles' results counts as epilogue. On Hopper
the two sweeps have the same tile, one of them transposed, so their products also show what a tile's
shape costs.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from benchmarks.measure import interleaved, time_columns
from benchmarks.predict import EPILOGUE_SHARE, LOST_BY_SHAPE
from benchmarks.run import Row, Run
from cyclip_loss.kernels.configs import Precision, config_for
from cyclip_loss.kernels.tiles import grouped_tile, tile_product
from cyclip_loss.tune import launcher

SECONDS = 2.0
SLEEP_CYCLES = 4 * 10**6  # 2 ms: Python launches what is timed meanwhile
SWEEPS = ("contrastive_lse", "contrastive_grads")


@triton.jit
def product_kernel(
    image,  # (n, d)
    text,  # (n, d)
    wanted,  # above 0: store the sums. A number that the compiler does not know
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
    """The product of a tile. Since it may be stored, the compiler cannot remove it."""
    row, column = grouped_tile(tl.cdiv(n, BM), tl.cdiv(n, BN), GROUP)
    product = tile_product(image, text, row * BM, column * BN, n, n, d, d, d, PRECISION, BM, BN, BK)
    if wanted > 0.0:
        total = tl.sum(tl.sum(product, axis=1), axis=0)
        tl.store(sums + row * tl.cdiv(n, BN) + column, total)


class TileProducts(NamedTuple):
    """What computes a sweep's tiles without an epilogue."""

    tile: str  # its height x width
    sums: Tensor  # (rows of tiles, columns of tiles); written only if they are wanted
    launch: Callable[[], object]


def tile_products(sweep: str, image: Tensor, text: Tensor, wanted: float = 0.0) -> TileProducts:
    """The products of a sweep's tiles alone. wanted: above 0, a launch writes the tiles' sums."""
    n, d = image.shape
    config = config_for(sweep, image, Precision.of(image))
    height, width = config.tile["BM"], config.tile["BN"]
    sums = torch.zeros(n // height, n // width, device=image.device)
    options = {"PRECISION": "tf32", **config.kwargs}
    grid = (sums.numel(),)
    launch = partial(product_kernel[grid], image, text, wanted, sums, n, d, **options)
    return TileProducts(f"{height} x {width}", sums, launch)


def ablations(run: Run) -> None:
    """Time both sweeps and the products of their tiles alone; then answer three questions."""
    n, d, repeats = (256, 64, 1) if run.dry_run else (16384, 768, 4)
    image, text = run.pairs(n, d, torch.bfloat16)
    steps: dict[str, Callable[[], object]] = {}
    rows: dict[str, Row] = {}
    for sweep in SWEEPS:
        products = tile_products(sweep, image, text)
        whole, _ = launcher(sweep, image, text)
        for what, launch in ((sweep, whole), (f"{sweep}, product", products.launch)):
            with run.attempt(what=what, N=n, D=d, tile=products.tile) as rows[what]:
                launch()  # compiles the kernel
                steps[what] = partial(repeat, launch, repeats)
    seconds, min_rounds = (0.0, 1) if run.dry_run else (SECONDS, 5)
    times = interleaved(steps, run.device, seconds, min_rounds, sleep_cycles=SLEEP_CYCLES)
    for what, milliseconds in times.items():
        rows[what] |= time_columns([each / repeats for each in milliseconds])
        rows[what]["TFLOP/s"] = 2 * n * n * d / rows[what]["ms"] / 1e9
    with run.start_section("ablations answer"):
        compare_with_predictions(run, {what: rows[what]["ms"] for what in steps})


def compare_with_predictions(run: Run, milliseconds: dict[str, float]) -> None:
    """Add a row for each question whose two times were measured."""
    forward, backward = SWEEPS
    for question, fast, slow, predicted in (
        (f"the epilogue's share of {forward}", f"{forward}, product", forward, EPILOGUE_SHARE),
        (f"the epilogue's share of {backward}", f"{backward}, product", backward, EPILOGUE_SHARE),
        (
            "what the shape of the first tile loses",
            f"{backward}, product",
            f"{forward}, product",
            LOST_BY_SHAPE,
        ),
    ):
        if {fast, slow} <= milliseconds.keys():
            share = 1 - milliseconds[fast] / milliseconds[slow]
            run.add_row(question=question, measured=f"{100 * share:.1f} %", predicted=predicted)


def repeat(launch: Callable[[], object], times: int) -> None:
    """Launch several times, one after another."""
    for _ in range(times):
        launch()
