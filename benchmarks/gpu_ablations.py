"""What bounds a sweep: its tile with less after the product, L2's bandwidth, library products.

What an epilogue of `ablation_kernel` takes longer than "none" is not hidden behind the products of
other programs.
"""

from collections.abc import Callable
from functools import partial
from subprocess import SubprocessError
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_ablation_kernels import ablation_kernel, read_kernel
from benchmarks.gpu_clock import clock_and_power, columns
from benchmarks.gpu_sweep import launcher
from benchmarks.run import Run
from benchmarks.timing import Times, interleaved
from cyclip_loss import eager
from cyclip_loss.kernels import binary
from cyclip_loss.kernels.configs import (
    ARCHITECTURES,
    INTERPRETED,
    Config,
    _architecture,
    _product,
    ceil_div,
)
from cyclip_loss.kernels.products import product_over_columns

SECONDS = 0.3
LSE = 12.0  # of rows and columns, about as random features have it; no time depends on it
# The second: two programs an SM, of which one can multiply while the other is at its epilogue.
TWO_PROGRAMS = _product(128, 128, 64, 4, 3, parts=2)
EPILOGUES = {
    "contrastive_lse": ("none", "rows", "columns", "one exponential"),
    "contrastive_grads": ("none", "store", "one exponential, store", "two exponentials, store"),
}


def cases(arch: str) -> list[tuple[Config, str]]:
    """Tiles and epilogues, each pair once."""
    found: list[tuple[Config, str]] = []
    for kernel, epilogues in EPILOGUES.items():
        for config in (ARCHITECTURES[arch][kernel][16, "tf32"], TWO_PROGRAMS):
            found += [(config, e) for e in epilogues if (config, e) not in found]
    return found


def ablations(run: Run) -> None:
    """Epilogues, then L2's bandwidth, then the products of a block of G."""
    arch = "sm_90" if run.dry_run else _architecture(run.device)
    n, d = (256, 64) if run.dry_run else (16384, 768)
    for config, epilogue in cases(arch)[:: 3 if run.dry_run else 1]:
        if run.remaining() < 4:
            run.skip(f"{_tile(config)}, {epilogue}", "it would exceed the budget")
            continue
        launch, *_ = epilogue_launcher(run, config, epilogue, n, d)
        compiled = launch()
        values = {"what": f"tile {_tile(config)}: {epilogue}", "n": n, "m": n, "D": d}
        _timed(run, values, launch, 2 * n * n * d)
        if not INTERPRETED:
            try:
                made = binary.read(compiled)
            except (OSError, SubprocessError) as error:  # Triton without NVIDIA's tools
                run.warn(f"no registers: {error}")
                continue
            run.section.rows[-1] |= {
                "registers": made.registers,
                "spilled": made.spilled_bytes,
                "serialised": made.serialised,
            }
    for kernel in EPILOGUES:
        values = {"what": f"{kernel} as shipped", "n": n, "m": n, "D": d}
        _timed(run, values, launcher(run, kernel, "bfloat16", n, d), 2 * n * n * d)
    _l2(run)
    _products(run)


def _tile(config: Config) -> str:
    size = "x".join(str(config.tile[name]) for name in ("BM", "BN", "BK"))
    halved = ", halves" if config.tile["PARTS"] == 2 else ""
    return f"{size}, {config.num_warps} warps, {config.num_stages} stages{halved}"


def epilogue_launcher(
    run: Run, config: Config, epilogue: str, n: int, d: int
) -> tuple[Callable[[], Any], Tensor, Tensor, Tensor]:
    """What launches the ablation kernel on (n, d) features, returning what Triton compiled.

    And what it writes, as far as the epilogue does: of rows, of columns, of single elements.
    """
    image, text = run.pairs(n, d, torch.bfloat16)
    tile = config.tile
    vector = torch.full((n,), LSE, device=run.device)
    rows = vector.new_empty(2, n // tile["BN"] * tile["PARTS"], n)
    columns = vector.new_empty(2, n // tile["BM"], n)
    elements = image.new_empty((n, n) if "store" in epilogue else (0,))
    grid = (ceil_div(n, tile["BM"]) * ceil_div(n, tile["BN"]),)

    def launch() -> Any:
        return ablation_kernel[grid](
            image, text, 50.0, vector, vector, rows, columns, elements, n, n, d,
            EPILOGUE=epilogue, PRECISION="tf32", WIDEN=INTERPRETED, **config.kwargs,
        )  # fmt: skip

    return launch, rows, columns, elements


def _timed(run: Run, values: dict[str, Any], call: Callable[[], Any], flops: int = 0) -> float:
    """Add a row; returns the median milliseconds."""

    def step(end: Callable[[], None]) -> None:
        call()
        end()

    step(lambda: None)
    seconds, least = (0, 1) if run.dry_run else (SECONDS, 5)
    with clock_and_power(run.device) as samples:
        found = interleaved({"": step}, run.device, seconds, least, most=1 if run.dry_run else 50)
    median = Times.of([spent for (spent,) in found[""]]).median
    run.row(**values, ms=median)
    if flops:
        run.section.rows[-1]["TFLOP/s"] = flops / median / 1e9
    run.section.rows[-1] |= columns(samples)
    return median


def _l2(run: Run) -> None:
    """16 MB, read 256 times over by all SMs together: it stays in L2, and does not fit L1."""
    block = 4096
    size, reads = (8 * block, 2) if run.dry_run else (2**22, 256)
    on_cuda = run.device.type == "cuda"
    processors = (
        torch.cuda.get_device_properties(run.device).multi_processor_count if on_cuda else 1
    )
    programs = 8 * processors
    source = torch.zeros(size, device=run.device)
    out = torch.empty(programs, device=run.device)

    def read() -> None:
        read_kernel[(programs,)](source, out, size // block, reads, BLOCK=block, num_warps=4)

    moved = 4 * block * reads * programs
    median = _timed(run, {"what": f"L2 to SMs, {4 * size / 1e6:.0f} MB again and again"}, read)
    row = run.section.rows[-1]
    row["TB/s"] = moved / median / 1e9
    if "MHz" in row:
        row["bytes a clock and SM"] = moved / (1e3 * median * row["MHz"] * processors)


def _products(run: Run) -> None:
    """The library's, of a block of G with the features: float32 sums, float32 or bfloat16 results.

    And a rank's 512 rows against many columns, at once and split over columns.
    """
    block, few, many = (64, 16, 128) if run.dry_run else (16384, 512, 32768)
    for d in (32,) if run.dry_run else (768, 512, 1024):
        if run.remaining() < 6:
            run.skip(f"products at D = {d}", "it would exceed the budget")
            continue
        features, _ = run.pairs(many, d, torch.bfloat16)
        gradient = torch.randn(block, block, device=run.device).to(torch.bfloat16)
        strip = torch.randn(few, many, device=run.device).to(torch.bfloat16)
        sums, rows = torch.zeros(block, d, device=run.device), features[:block]
        wide, short = torch.float32, torch.bfloat16
        for what, product, *arguments in (
            ("G T added to float32", eager.add_product, sums, gradient, rows),
            ("G^T I added to float32", eager.add_product, sums, gradient.T, rows),
            ("G T to float32", eager.product, gradient, rows, wide),
            ("G T to bfloat16", eager.product, gradient, rows, short),
            ("G^T I to bfloat16", eager.product, gradient.T, rows, short),
            ("G T to bfloat16", eager.product, strip, features, short),
            ("G T, split over columns", product_over_columns, strip, features, short),
        ):
            n, m = (few, many) if arguments[0] is strip else (block, block)
            values = {"what": what, "n": n, "m": m, "D": d}
            _timed(run, values, partial(product, *arguments), 2 * n * m * d)
