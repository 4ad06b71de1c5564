"""What bounds a sweep: its tiles' products alone, compared with all of it, and two tile shapes.

What a sweep takes longer than the products of its tiles is its epilogue, as far as that is not
hidden behind the products of other programs: the most that any other epilogue could gain. The small
kernel that joins what the tiles leave counts with it.
"""

from collections.abc import Callable
from functools import partial

import torch
import triton
import triton.language as tl

from benchmarks.gpu.sweep import AHEAD, launcher, repeated
from benchmarks.predict import EPILOGUE_SHARE, LOST_BY_SHAPE
from benchmarks.run import Run
from benchmarks.timing import columns, interleaved
from cyclip_loss.engines import architecture
from cyclip_loss.kernels.configs import ARCHITECTURES, INTERPRETED, Config, _product
from cyclip_loss.kernels.tiles import grouped_tile, tile_product

SECONDS = 2.0
SWEEPS = ("contrastive_lse", "contrastive_grads")
# The forward sweep's tile on Hopper, and the same turned round.
TALL, WIDE = _product(256, 128, 64, 8, 4), _product(128, 256, 64, 8, 4)


@triton.jit
def product_kernel(
    image,  # (n, d)
    text,  # (n, d)
    wanted,  # whether the sums are; if not, the compiler must not know it
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
    """The product of a tile. It is stored only if wanted, but never removed as unused."""
    row, column = grouped_tile(tl.cdiv(n, BM), tl.cdiv(n, BN), GROUP)
    product = tile_product(
        image, text, row * BM, column * BN, n, n, d, d, d, PRECISION, WIDEN, BM, BN, BK
    )
    if wanted > 0.0:
        total = tl.sum(tl.sum(product, axis=1), axis=0)
        tl.store(sums + row * tl.cdiv(n, BN) + column, total)


def product_launcher(run: Run, config: Config, n: int, d: int) -> Callable[[], object]:
    """What launches the tiles' products of (n, d) features, whose sums are not wanted."""
    image, text = run.pairs(n, d, torch.bfloat16)
    programs = n // config.tile["BM"] * (n // config.tile["BN"])
    sums = torch.zeros(programs, device=run.device)
    options = {"PRECISION": "tf32", "WIDEN": INTERPRETED, **config.kwargs}
    return lambda: product_kernel[programs,](image, text, 0.0, sums, n, d, **options)


def ablations(run: Run) -> None:
    """Both sweeps as shipped, their tiles' products, and both shapes; then what that answers."""
    table = ARCHITECTURES["sm_90" if run.dry_run else architecture(run.device)]
    n, d, repeats = (128, 64, 1) if run.dry_run else (16384, 768, 4)
    tiles = {kernel: table[kernel][16, "tf32"] for kernel in SWEEPS}
    launches = {kernel: launcher(run, kernel, n, d) for kernel in SWEEPS}
    for config in (*tiles.values(), TALL, WIDE):
        launches[product_of(config)] = product_launcher(run, config, n, d)
    steps: dict[str, Callable[[], object]] = {}
    rows = {}
    for what, launch in launches.items():
        with run.attempt(what=what, N=n, D=d) as rows[what]:  # a tile may be too large for a chip
            launch()  # compiled, outside of its time
            steps[what] = partial(repeated, launch, repeats)
    seconds, least = (0.0, 1) if run.dry_run else (SECONDS, 5)
    for what, runs in interleaved(steps, run.device, seconds, least, ahead=AHEAD).items():
        rows[what] |= columns([each / repeats for each in runs])
        rows[what]["TFLOP/s"] = 2 * n * n * d / rows[what]["ms"] / 1e9
    questions = [
        (f"the epilogue's share of {kernel}", product_of(config), kernel, EPILOGUE_SHARE)
        for kernel, config in tiles.items()
    ]
    shapes = "what the product loses at 256 x 128 compared with 128 x 256"
    questions.append((shapes, product_of(WIDE), product_of(TALL), LOST_BY_SHAPE))
    with run.part("ablations answer"):
        for question, fast, slow, predicted in questions:
            if {fast, slow} <= steps.keys():
                share = 1 - rows[fast]["ms"] / rows[slow]["ms"]
                run.row(question=question, measured=f"{100 * share:.1f} %", predicted=predicted)


def product_of(config: Config) -> str:
    """The row of a tile's product."""
    size = " x ".join(str(config.tile[name]) for name in ("BM", "BN", "BK"))
    return f"product of {size}, {config.num_warps} warps, {config.num_stages} stages"
