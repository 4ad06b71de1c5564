"""What bounds a sweep: its tiles' products alone, compared with all of it and with each other.

What a sweep takes longer than the products of its tiles is its epilogue, as far as that is not
hidden behind the products of other programs: the most that any other epilogue could gain. The small
kernel that joins what the tiles leave counts with it. On Hopper the two sweeps have the same tile,
one turned round, so that their products also show what a tile's shape costs.
"""

from collections.abc import Callable
from functools import partial

import torch
import triton
import triton.language as tl

from benchmarks.measure import columns, interleaved
from benchmarks.predict import EPILOGUE_SHARE, LOST_BY_SHAPE
from benchmarks.run import Run
from cyclip_loss.kernels.configs import Precision, config_for
from cyclip_loss.kernels.tiles import grouped_tile, tile_product
from cyclip_loss.tune import launcher

SECONDS = 2.0
AHEAD = 4 * 10**6  # cycles, 2 ms: as long as Python takes to launch what is timed
SWEEPS = ("contrastive_lse", "contrastive_grads")


@triton.jit
def product_kernel(
    image,  # (n, d)
    text,  # (n, d)
    wanted,  # whether the sums are; if not, the compiler must not know it
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
    """The product of a tile. It is stored only if wanted, but never removed as unused."""
    row, column = grouped_tile(tl.cdiv(n, BM), tl.cdiv(n, BN), GROUP)
    product = tile_product(image, text, row * BM, column * BN, n, n, d, d, d, PRECISION, BM, BN, BK)
    if wanted > 0.0:
        total = tl.sum(tl.sum(product, axis=1), axis=0)
        tl.store(sums + row * tl.cdiv(n, BN) + column, total)


def ablations(run: Run) -> None:
    """Both sweeps, and the products of their tiles alone; then what that answers."""
    n, d, repeats = (256, 64, 1) if run.dry_run else (16384, 768, 4)
    image, text = run.pairs(n, d, torch.bfloat16)
    steps: dict[str, Callable[[], object]] = {}
    rows = {}
    for kernel in SWEEPS:
        config = config_for(kernel, image, Precision.of(image))
        height, width = config.tile["BM"], config.tile["BN"]
        programs = n // height * (n // width)
        sums = torch.zeros(programs, device=run.device)
        options = {"PRECISION": "tf32", **config.kwargs}
        product = partial(product_kernel[programs,], image, text, 0.0, sums, n, d, **options)
        launches: dict[str, Callable[[], object]] = {kernel: launcher(kernel, image, text)[0]}
        launches[f"{kernel}, product"] = product
        for what, launch in launches.items():
            with run.attempt(what=what, N=n, D=d, tile=f"{height} x {width}") as rows[what]:
                launch()  # compiled, outside of its time
                steps[what] = partial(repeated, launch, repeats)
    seconds, least = (0.0, 1) if run.dry_run else (SECONDS, 5)
    for what, runs in interleaved(steps, run.device, seconds, least, ahead=AHEAD).items():
        rows[what] |= columns([each / repeats for each in runs])
        rows[what]["TFLOP/s"] = 2 * n * n * d / rows[what]["ms"] / 1e9
    forward, backward = (f"{kernel}, product" for kernel in SWEEPS)
    with run.part("ablations answer"):
        for question, fast, slow, predicted in (
            ("the epilogue's share of contrastive_lse", forward, SWEEPS[0], EPILOGUE_SHARE),
            ("the epilogue's share of contrastive_grads", backward, SWEEPS[1], EPILOGUE_SHARE),
            ("what the shape of the first tile loses", backward, forward, LOST_BY_SHAPE),
        ):
            if {fast, slow} <= steps.keys():
                share = 1 - rows[fast]["ms"] / rows[slow]["ms"]
                run.row(question=question, measured=f"{100 * share:.1f} %", predicted=predicted)


def repeated(launch: Callable[[], object], repeats: int) -> None:
    """One after another."""
    for _ in range(repeats):
        launch()
