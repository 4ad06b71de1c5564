"""What bounds a sweep: its tiles' products alone beside the whole of it, and two shapes of a tile.

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
from benchmarks.memory import outcome_of
from benchmarks.run import Run
from benchmarks.timing import columns, interleaved
from cyclip_loss.kernels.configs import ARCHITECTURES, INTERPRETED, Config, _architecture, _product
from cyclip_loss.kernels.tiles import grouped_tile, tile_product

SECONDS = 2.0
SWEEPS = ("contrastive_lse", "contrastive_grads")
# The forward sweep's tile on Hopper, and the same turned round. A wgmma of 128 columns asks for 144
# bytes of shared memory in the time of 128, one of 256 columns for 128: a rate lower by 11 %.
TALL, WIDE = _product(256, 128, 64, 8, 4), _product(128, 256, 64, 8, 4)
PREDICTED_OF_EPILOGUE, PREDICTED_OF_SHAPE = "25 to 35 %", "11 %"


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


def product_launcher(run: Run, config: Config, n: int, d: int) -> Callable[[], object]:
    """What launches the tiles' products of (n, d) features, whose sums are not wanted."""
    image, text = run.pairs(n, d, torch.bfloat16)
    programs = n // config.tile["BM"] * (n // config.tile["BN"])
    sums = torch.zeros(programs, device=run.device)

    def launch() -> None:
        product_kernel[programs,](
            image, text, 0.0, sums, n, d, PRECISION="tf32", WIDEN=INTERPRETED, **config.kwargs
        )

    return launch


def ablations(run: Run) -> None:
    """Both sweeps as shipped, their tiles' products, and both shapes; then what that answers."""
    table = ARCHITECTURES["sm_90" if run.dry_run else _architecture(run.device)]
    n, d, repeats = (128, 64, 1) if run.dry_run else (16384, 768, 4)
    tiles = {kernel: table[kernel][16, "tf32"] for kernel in SWEEPS}
    launches = {kernel: launcher(run, kernel, n, d) for kernel in SWEEPS}
    for config in (*tiles.values(), TALL, WIDE):
        launches[product_of(config)] = product_launcher(run, config, n, d)
    steps: dict[str, Callable[[], object]] = {}
    for what, launch in launches.items():
        try:
            launch()  # compiled, outside of its time
            steps[what] = partial(repeated, launch, repeats)
        except Exception as error:  # Triton's own, of any kind: a tile too large for this chip
            run.note(f"{what}: {outcome_of(error)}")
    seconds, least = (0.0, 1) if run.dry_run else (SECONDS, 5)
    spent = {}
    for what, runs in interleaved(steps, run.device, seconds, least, ahead=AHEAD).items():
        of_one = columns([each / repeats for each in runs])
        spent[what] = of_one["ms"]
        run.row(what=what, N=n, D=d, **of_one, **{"TFLOP/s": 2 * n * n * d / spent[what] / 1e9})
    questions = [
        (f"the epilogue's share of {kernel}", product_of(config), kernel, PREDICTED_OF_EPILOGUE)
        for kernel, config in tiles.items()
    ]
    shapes = "what the product loses at 256 x 128 against 128 x 256"
    with run.part("ablations answer"):
        for what, fast, slow, predicted in (
            *questions,
            (shapes, product_of(WIDE), product_of(TALL), PREDICTED_OF_SHAPE),
        ):
            if fast in spent and slow in spent:
                measured = f"{100 * (1 - spent[fast] / spent[slow]):.1f} %"
                run.row(question=what, measured=measured, predicted=predicted)


def product_of(config: Config) -> str:
    """The row of a tile's product."""
    size = " x ".join(str(config.tile[name]) for name in ("BM", "BN", "BK"))
    return f"product of {size}, {config.num_warps} warps, {config.num_stages} stages"
