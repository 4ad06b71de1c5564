"""What the kernels should cost: flops, bytes, instructions, and from those the predicted times.

For bfloat16 features (N, D) on one GPU, forward and backward, lambda_inmodal = lambda_crossmodal,
all gradients. Sizes of tiles, strips and blocks are the launchers' own (`kernels/`), instructions
are counted in the binaries (`instructions.py`), the chips' rates are published (`chips.py`).

A program of a tile kernel takes

    main loop   the slowest of: the product, at triton_fraction of the library's rate; its operands
                from L2, (BM + BN) * D * 2 bytes a tile; the loop's own instructions
    epilogue    the slowest of: issue slots, exponentials, shuffles, half-rate instructions
    start       FILL_SECONDS until the first operands are there

and their sum if only one program fits on an SM, by its registers: nothing else is there to overlap
with. If two fit, the slowest resource alone. The cyclic kernels form U and V in registers between
the loads and the product, so their main loop is the sum of product and instructions. A kernel
takes as many turns of that as the grid needs, or the time of its device memory traffic, if that is
longer. So do the library's products, at its rate (`LIBRARY_TILES` in `chips.py`). Joining what the
tiles of the first sweep leave is counted at the memory bandwidth.
"""

from dataclasses import dataclass
from math import ceil

from benchmarks.chips import (
    EXPONENTIALS_PER_CLOCK,
    HALF_RATE_PER_CLOCK,
    ISSUE_PER_CLOCK,
    REGISTERS,
    SHUFFLES_PER_CLOCK,
    Chip,
)
from benchmarks.instructions import INSTRUCTIONS, Instructions
from cyclip_loss.kernels.configs import ARCHITECTURES, Config
from cyclip_loss.kernels.contrastive_grads import BLOCK_BYTES, BLOCK_ROWS
from cyclip_loss.kernels.contrastive_lse import PARTIAL_ELEMENTS
from cyclip_loss.kernels.cyclic_statistics import MAX_SPLITS, MIN_SPLIT_ROWS

BYTES = 2  # of a bfloat16
TF32_RATE = 0.5  # of the bfloat16 rate
# Assumed: about twice the latency of the L2 cache (150 ns on B200, chipsandcheese.com) and the
# first barrier. Not measured.
FILL_SECONDS = 0.5e-6
# Assumed: eager PyTorch launches a kernel every few microseconds. Measured on a CPU core of 2.6 GHz
# with `pytest benchmarks -k operator_call`: 2 us for a call of an operator without its engine, 11
# to 15 us through PyTorch's dispatcher (which only traced calls take). What the host needs hides
# behind the device, or bounds a small batch.
LAUNCH_SECONDS, OPERATOR_SECONDS = 5e-6, 2e-6
FIXED_LAUNCHES = 60  # outside strips and blocks: the sums of the loss, the penalties, autograd


@dataclass(frozen=True)
class Cost:
    """One kernel, or group of kernels, in one forward and backward pass."""

    name: str
    flops: float
    l2_bytes: float  # operands of tiles
    memory_bytes: float
    exponentials: float
    launches: int
    seconds: float
    bound: str  # what takes most of its time


@dataclass(frozen=True)
class Prediction:
    """The whole loss on one chip."""

    chip: Chip
    n: int
    d: int
    costs: tuple[Cost, ...]

    @property
    def host_seconds(self) -> float:
        """Launching it all, from eager PyTorch."""
        launches = sum(cost.launches for cost in self.costs) + FIXED_LAUNCHES
        return launches * LAUNCH_SECONDS + 4 * OPERATOR_SECONDS

    @property
    def device_seconds(self) -> float:
        """Running it all."""
        return sum(cost.seconds for cost in self.costs)

    @property
    def seconds(self) -> float:
        """The longer of the two."""
        return max(self.device_seconds, self.host_seconds)

    @property
    def floor(self) -> float:
        """8 N^2 D flops at the library's rate."""
        return 8 * self.n**2 * self.d / self.chip.matrix_rate

    @property
    def penalties(self) -> float:
        """Seconds of the cyclic penalties."""
        return sum(cost.seconds for cost in self.costs if cost.name.startswith("cyclic"))

    @property
    def bound(self) -> str:
        """The largest cost and what bounds it."""
        if self.host_seconds > self.device_seconds:
            return "kernel launches"
        largest = max(self.costs, key=lambda cost: cost.seconds)
        return f"{largest.name}: {largest.bound}"


@dataclass(frozen=True)
class Tile:
    """The work of one program: `steps` turns of its main loop, then its epilogue."""

    steps: int
    step_flops: float
    step_bytes: float
    rate: float  # flops per second of the whole chip
    staged: bool  # operands pass through registers on their way to the product


def tile_parts(
    chip: Chip, tile: Tile, counted: Instructions, warps: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds that each resource of one SM needs for a tile's main loop, and for its epilogue."""
    step = {
        "matrix rate": tile.step_flops * chip.sms / (tile.rate * chip.triton_fraction),
        "L2 bandwidth": tile.step_bytes * chip.sms / chip.l2_bandwidth,
        "instructions of the main loop": counted.per_step * warps / ISSUE_PER_CLOCK / chip.clock,
    }
    epilogue = {
        "issue slots of the epilogue": counted.per_tile / ISSUE_PER_CLOCK,
        "exponentials": counted.exponentials / EXPONENTIALS_PER_CLOCK,
        "shuffles": counted.shuffles / SHUFFLES_PER_CLOCK,
        "half-rate instructions": counted.half_rate / HALF_RATE_PER_CLOCK,
    }
    return (
        {name: tile.steps * seconds for name, seconds in step.items()},
        {name: clocks * warps / chip.clock for name, clocks in epilogue.items()},
    )


def programs_per_sm(counted: Instructions, warps: int) -> int:
    """How many fit, by their registers."""
    return max(1, REGISTERS // (counted.registers * 32 * warps))


def tile_seconds(chip: Chip, tile: Tile, counted: Instructions, warps: int) -> tuple[float, str]:
    """Seconds per tile of one SM, and what takes most of it."""
    main, epilogue = tile_parts(chip, tile, counted, warps)
    if programs_per_sm(counted, warps) >= 2:
        issued = main.pop("instructions of the main loop")
        issued += epilogue.pop("issue slots of the epilogue")
        parts = {**main, **epilogue, "issue slots": issued}
        bound = max(parts, key=parts.__getitem__)
        return parts[bound], bound
    parts = {"first operands": FILL_SECONDS}
    if tile.staged:
        parts["instructions of the main loop"] = main.pop("instructions of the main loop")
    for group in (main, epilogue):
        slowest = max(group, key=group.__getitem__)
        parts[slowest] = group[slowest]
    return sum(parts.values()), max(parts, key=parts.__getitem__)


def grid_seconds(
    chip: Chip, tiles: int, tile: Tile, counted: Instructions, warps: int
) -> tuple[float, str]:
    """Seconds of a grid of equal tiles: SMs take them in turns, the last turn may be part empty."""
    seconds, bound = tile_seconds(chip, tile, counted, warps)
    at_once = programs_per_sm(counted, warps)
    return ceil(tiles / (chip.sms * at_once)) * at_once * seconds, bound


def _kernel(
    chip: Chip,
    name: str,
    grids: list[int],
    tile: Tile,
    config: Config,
    flops: float,
    memory_bytes: float,
    exponentials: float,
) -> Cost:
    """A tile kernel launched once per entry of `grids`, each a number of tiles."""
    counted, seconds, bound = INSTRUCTIONS[chip.arch, name], 0.0, ""
    for tiles in grids:
        more, bound = grid_seconds(chip, tiles, tile, counted, config.num_warps)
        seconds += more
    if memory_bytes / chip.memory_bandwidth > seconds:
        seconds, bound = memory_bytes / chip.memory_bandwidth, "memory bandwidth"
    l2_bytes = sum(grids) * tile.steps * tile.step_bytes
    return Cost(name, flops, l2_bytes, memory_bytes, exponentials, len(grids), seconds, bound)


def _lengths(length: int, size: int) -> list[int]:
    """Lengths of strips or blocks: `size` each, but for the last."""
    return [min(size, length - start) for start in range(0, length, size)]


def sweep_tile(chip: Chip, config: Config, d: int) -> Tile:
    """One program of either contrastive kernel."""
    bm, bn, bk = config.tile["BM"], config.tile["BN"], config.tile["BK"]
    # Each tile of BM x BN reads (BM + BN) * D operands, BK columns a step.
    step_bytes = (bm + bn) * bk * BYTES
    return Tile(ceil(d / bk), 2 * bm * bn * bk, step_bytes, chip.matrix_rate, staged=False)


def _sweep_reads(chip: Chip, config: Config, rows: int, columns: int, d: int) -> float:
    """Bytes of features that one launch reads from device memory.

    Images once; texts once per group of row tiles, unless L2 holds all that the launch needs.
    """
    text = columns * d * BYTES
    groups = ceil(rows / (config.tile["BM"] * config.tile["GROUP"]))
    return rows * d * BYTES + text * (1 if text <= chip.l2_bytes else groups)


def contrastive_lse(chip: Chip, n: int, m: int, d: int) -> list[Cost]:
    """The sweep for the log-sum-exps, and the joining of the maxima and sums that its tiles leave.

    n rows of images, m of texts: more than n where they were gathered from other ranks.

    The joining reads these 2 float32 per tile and row or column once and writes next to nothing.
    Its programs keep 32 KB each in flight, so that even the 64 of N = 262,144 are near the memory
    bandwidth; its instructions (695 for each of 4 warps per 4,096 pairs, counted for sm_90) take a
    quarter of that time.
    """
    config = ARCHITECTURES[chip.arch]["contrastive"][16, "tf32"]
    bm, bn, parts = (config.tile[key] for key in ("BM", "BN", "PARTS"))
    columns = ceil(m / bn)
    height = max(1, PARTIAL_ELEMENTS // max(columns * parts * bm, m)) * bm  # as the launcher
    strips = _lengths(n, height)
    pairs = sum(columns * parts * rows + ceil(rows / bm) * m for rows in strips)
    partials = 2 * 4 * pairs
    sweep = _kernel(
        chip,
        "contrastive_lse",
        [ceil(rows / bm) * columns for rows in strips],
        sweep_tile(chip, config, d),
        config,
        2 * n * m * d,
        sum(_sweep_reads(chip, config, rows, m, d) for rows in strips) + partials,
        2 * n * m,
    )
    seconds, launches = partials / chip.memory_bandwidth, 2 * len(strips)
    join = Cost("join_lse", 0, 0, partials, pairs, launches, seconds, "memory bandwidth")
    return [sweep, join]


def library_turns(chip: Chip, rows: int, columns: int) -> float:
    """How much longer a product into (rows, columns) takes than if its tiles filled every turn."""
    turns = (
        ceil(ceil(rows / bm) * ceil(columns / bn) / chip.sms) * bm * bn
        for bm, bn in chip.library_tiles
    )
    return min(turns) * chip.sms / (rows * columns)


def contrastive_grads(chip: Chip, n: int, m: int, d: int, wide: bool = False) -> list[Cost]:
    """The sweep that writes G by blocks, and the two library products that consume each.

    n rows of images, m of texts. `wide`: the gradients stay in float32.
    """
    config = ARCHITECTURES[chip.arch]["contrastive"][16, "tf32"]
    bm, bn = config.tile["BM"], config.tile["BN"]
    height = ceil(min(n, BLOCK_ROWS) / bm) * bm  # height and width as the launcher
    width = min(max(1, BLOCK_BYTES // (height * BYTES * bn)) * bn, ceil(m / bn) * bn)
    strips = _lengths(n, height)
    blocks = [(rows, columns) for rows in strips for columns in _lengths(m, width)]
    fits_l2 = min(height, n) * min(width, m) * BYTES <= chip.l2_bytes
    written = 0 if fits_l2 else n * m * BYTES
    sweep = _kernel(
        chip,
        "contrastive_grads",
        [ceil(rows / bm) * ceil(columns / bn) for rows, columns in blocks],
        sweep_tile(chip, config, d),
        config,
        2 * n * m * d,
        sum(_sweep_reads(chip, config, rows, columns, d) for rows, columns in blocks) + written,
        2 * n * m,
    )
    # Per block, dI's rows += G T and dT's columns += G^T I: each reads G and the other features,
    # and reads and writes its sums in float32.
    seconds, memory, bounds = 0.0, 0.0, set()
    for block in blocks:
        flops = 2 * block[0] * block[1] * d
        for summed, kept in (block[::-1], block):
            moved = (0 if fits_l2 else block[0] * block[1] * BYTES) + summed * d * BYTES
            moved += 2 * 4 * kept * d
            by_rate = flops * library_turns(chip, kept, d) / chip.matrix_rate
            by_memory = moved / chip.memory_bandwidth
            seconds += max(by_rate, by_memory)
            bounds.add("memory bandwidth" if by_memory > by_rate else "matrix rate")
            memory += moved
    ends = (n + m) * d * (4 + 8 + (0 if wide else 4 + 2))  # dI and dT: zeros, scaled, rounded
    products = Cost(
        "library products",
        4 * n * m * d,
        0,
        memory + ends,
        0,
        # Per block two products, and two for the logit scale; per strip the ends of dI.
        4 * len(blocks) + 3 * len(strips),
        seconds + ends / chip.memory_bandwidth,
        " and ".join(sorted(bounds)),
    )
    return [sweep, products]


def cyclic(chip: Chip, n: int, d: int) -> list[Cost]:
    """The Gram matrices of U and V, and the gradients from them, in tf32."""
    rate = TF32_RATE * chip.matrix_rate
    table = ARCHITECTURES[chip.arch]
    config = table["cyclic_statistics"][32, "tf32"]
    bd, bk = config.tile["BD"], config.tile["BK"]
    across = ceil(d / bd)
    splits = max(1, min(MAX_SPLITS, n // MIN_SPLIT_ROWS))
    # A step multiplies BK rows of two BD x BD tiles, of A and of B, from four blocks of features.
    tile = Tile(ceil(n / splits / bk), 4 * bd * bd * bk, 4 * bd * bk * BYTES, rate, staged=True)
    upper = across * (across + 1) // 2
    written = (splits + 1) * 2 * d * d * 4
    moved = 2 * n * d * BYTES + 2 * written
    statistics = _kernel(
        chip, "cyclic_statistics", [upper * splits], tile, config, 2 * n * d * d, moved, 0
    )
    config = table["cyclic_grads"][32, "tf32"]
    bm, bd, bk = config.tile["BM"], config.tile["BD"], config.tile["BK"]
    step_bytes = 2 * bm * bk * BYTES + 2 * bd * bk * 4
    tile = Tile(ceil(d / bk), 4 * bm * bd * bk, step_bytes, rate, staged=True)
    grid = ceil(n / bm) * ceil(d / bd)
    moved = 4 * n * d * BYTES + 4 * 2 * d * d * 4
    gradients = _kernel(chip, "cyclic_grads", [grid], tile, config, 4 * n * d * d, moved, 0)
    return [statistics, gradients]


def predict(chip: Chip, n: int, d: int) -> Prediction:
    """Cost of everything the loss runs, forward and backward."""
    costs = contrastive_lse(chip, n, n, d) + contrastive_grads(chip, n, n, d) + cyclic(chip, n, d)
    return Prediction(chip, n, d, tuple(costs))
