"""`python -m benchmarks predict`: what a step should take at least, on one GPU and over ranks.

A model, not a measurement, for bfloat16 features, forward and backward, equal lambdas, all
gradients. A kernel takes the longest of its products, its exponentials and its device memory, each
at a rate that somebody has published:

    on one GPU   8 N^2 D flops of the contrastive term: the two sweeps in Triton, the products of G
                 with the features in the library; 6 N D^2 of the penalties in Triton, as tf32
    over W ranks the same for n rows against N = W n columns, and the transfers of a step: a latency
                 for each step of a collective and its bytes over a bandwidth

Left out: what a tile does besides its product (maxima and sums over threads, the first operands),
kernel launches and Python, ranks that don't keep pace, and that some transfers hide behind kernels.
So on one GPU, and wherever kernels are what takes the time, it will be longer. Memory is what the
loss adds to the features: large tensors at the peak of the backward pass.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from math import ceil, log2

from benchmarks.record import number, table

WIDTH, FLOAT = 2, 4  # bytes of a bfloat16; of sums, log-sum-exps and partial gradients
GPUS_PER_NODE = CARDS_PER_NODE = 8


@dataclass(frozen=True)
class Chip:
    """Rates in units per second and GPU, sizes in bytes."""

    matrix_rate: float  # of the library's best bfloat16 product; tf32: half of it
    triton: float  # of that rate, what a main loop in Triton reaches
    exponentials: float
    memory_bandwidth: float
    memory: float
    nvlink: float  # "bus bandwidth" of a collective within a node
    card: float  # of one InfiniBand card


# matrix_rate: "Maximum Achievable Matmul FLOPS", github.com/stas00/ml-engineering,
# compute/accelerator.
# triton: 03-matrix-multiplication against cuBLAS: A100 223 of 229 TFLOP/s (triton-lang/triton
# #743); H100 666 of 794 for a persistent TMA kernel (meta-pytorch/tritonbench #894), which ours is
# not: 0.8; B200 0.87 without two-SM products (triton-lang/triton #9697), ours also without warp
# specialisation: 0.7.
# exponentials: 16 per SM and clock (CUDA C++ Programming Guide, arithmetic instructions).
# memory: A100 and H100 as measured by github.com/te42kyfo/gpu-benches and copies of this size;
# B200: device-to-device copies (newmind.ai, journal 18).
# nvlink, card: github.com/NVIDIA/nccl-tests/issues/149, 212, 119, 290; B200's NVLink: twice the
# H100's, as its line rate is.
CHIPS = {
    "A100": Chip(271.2e12, 0.95, 16 * 108 * 1.41e9, 1.73e12, 80e9, 230e9, 24e9),
    "H100": Chip(794.5e12, 0.8, 16 * 132 * 1.83e9, 3.0e12, 80e9, 370e9, 46e9),
    "B200": Chip(1745e12, 0.7, 16 * 148 * 1.856e9, 6.0e12, 180e9, 740e9, 46e9),
}
# Seconds of a call, and of its steps within a node and between nodes, of NCCL's protocol Simple:
# NCCL 2.28, src/graph/tuning.cc.
CALL, INSIDE, BETWEEN = 8.4e-6, 3.4e-6, 14e-6


def kernels(chip: Chip, n: int, m: int, d: int) -> dict[str, float]:
    """Seconds of each kernel for n rows of images and m of texts, the penalties for n rows."""

    def longest(rate: float, flops: float, exponentials: float, moved: float) -> float:
        return max(flops / rate, exponentials / chip.exponentials, moved / chip.memory_bandwidth)

    triton = chip.triton * chip.matrix_rate
    features, matrix = (n + m) * d * WIDTH, n * m * WIDTH
    return {
        "contrastive_lse": longest(triton, 2 * n * m * d, 2 * n * m, features),
        "contrastive_grads": longest(triton, 2 * n * m * d, 2 * n * m, features + matrix),
        "products with G": longest(chip.matrix_rate, 4 * n * m * d, 0, 2 * matrix + 3 * features),
        "cyclic_statistics": longest(triton / 2, 2 * n * d * d, 0, 2 * n * d * WIDTH),
        "cyclic_grads": longest(triton / 2, 4 * n * d * d, 0, 4 * n * d * WIDTH),
    }


@dataclass(frozen=True)
class Transfer:
    """A collective on an array of `size` bytes, or a hop of a block to the next rank."""

    operation: str
    size: float
    times: int = 1

    def sent(self, ranks: int) -> float:
        """Bytes that one rank sends (nccl-tests, doc/PERFORMANCE.md)."""
        share = (ranks - 1) / ranks
        return (
            self.times
            * self.size
            * {"hop": float(ranks > 1), "all-reduce": 2 * share}.get(self.operation, share)
        )

    def seconds(self, chip: Chip, ranks: int) -> float:
        """A ring over all ranks; for an all-reduce a tree between nodes, which NCCL prefers."""
        if ranks == 1:
            return 0.0
        nodes = ceil(ranks / GPUS_PER_NODE)
        cards = 1 if self.operation == "hop" else CARDS_PER_NODE
        bandwidth = chip.nvlink if nodes == 1 else min(chip.nvlink, cards * chip.card)
        latency = {
            "hop": BETWEEN if nodes > 1 else INSIDE,
            "all-reduce": 2 * (min(ranks, GPUS_PER_NODE) - 1) * INSIDE + 2 * log2(nodes) * BETWEEN,
        }.get(self.operation, (ranks - nodes) * INSIDE + (nodes - 1) * BETWEEN)
        return self.times * (CALL + latency) + self.sent(ranks) / bandwidth


@dataclass(frozen=True)
class Case:
    """W ranks of n rows of D bfloat16 features."""

    ranks: int
    rows: int
    d: int

    @property
    def batch(self) -> int:
        """N."""
        return self.ranks * self.rows


@dataclass(frozen=True)
class Way:
    """One way to compute the loss over ranks: its transfers, bytes of a rank, seconds."""

    transfers: Callable[[Case], list[Transfer]]
    memory: Callable[[Case], float]
    seconds: Callable[[Case, Chip], float]


def _shared(case: Case) -> list[Transfer]:
    """What gather and ring have in common: [A, B, C] with the row count, and the loss's value."""
    sums = Transfer("all-reduce", (3 * case.d**2 + 1) * FLOAT)
    return [sums, Transfer("all-reduce", 2 * FLOAT)]


def _own(case: Case) -> float:
    """Bytes of A, B, C, and of the features' gradients, summed in float32 and then rounded."""
    return 3 * case.d**2 * FLOAT + 2 * case.rows * case.d * (FLOAT + WIDTH)


def _kernel_seconds(case: Case, chip: Chip, columns: int) -> float:
    return sum(kernels(chip, case.rows, columns, case.d).values())


def gather_transfers(case: Case) -> list[Transfer]:
    """dist_impl="gather": text features come, column sums are shared, text gradients leave."""
    return [
        Transfer("all-gather", case.batch * case.d * WIDTH),
        *_shared(case),
        Transfer("all-reduce", 2 * case.batch * FLOAT),
        Transfer("all-reduce", case.batch * FLOAT),
        Transfer("reduce-scatter", case.batch * case.d * FLOAT),
    ]


def gather_memory(case: Case) -> float:
    """All text features, their gradients, and the block of G, at most 512 MB."""
    block = min(case.rows * case.batch * WIDTH, 2**29)
    return case.batch * (case.d * (WIDTH + FLOAT) + FLOAT) + _own(case) + block


def gather_seconds(case: Case, chip: Chip) -> float:
    """One thing after the other."""
    transfers = sum(t.seconds(chip, case.ranks) for t in gather_transfers(case))
    return _kernel_seconds(case, chip, case.batch) + transfers


def ring_hops(case: Case) -> list[Transfer]:
    """Of one step: texts forward with their columns' sums, backward with their gradients."""
    block = case.rows * case.d
    forward = block * WIDTH + 2 * case.rows * FLOAT
    return [
        Transfer("hop", forward),
        Transfer("hop", block * (WIDTH + FLOAT) + case.rows * FLOAT),
    ]


def ring_transfers(case: Case) -> list[Transfer]:
    """dist_impl="ring": as many hops as ranks, each way."""
    hops = [Transfer("hop", hop.size, case.ranks) for hop in ring_hops(case)]
    return [*hops, *_shared(case)]


def ring_memory(case: Case) -> float:
    """Two text blocks, gradients that leave and that come, the block of G: nothing grows with W."""
    block = case.rows * case.d
    travelling = 2 * block * WIDTH + 3 * block * FLOAT + 3 * case.rows * FLOAT
    return _own(case) + travelling + min(case.rows**2 * WIDTH, 2**29)


def ring_seconds(case: Case, chip: Chip) -> float:
    """A block is multiplied while the next one travels: each step takes the longer of both."""
    parts = kernels(chip, case.rows, case.rows, case.d)
    penalties = sum(s for name, s in parts.items() if name.startswith("cyclic"))
    forward = parts["contrastive_lse"]
    backward = sum(parts.values()) - penalties - forward
    once = penalties + sum(t.seconds(chip, case.ranks) for t in _shared(case))
    hops = [hop.seconds(chip, case.ranks) for hop in ring_hops(case)]
    steps = sum(map(max, (forward, backward), hops))
    return once + case.ranks * steps


# OpenCLIP's loss with local_loss and gather_with_grad, by element of an (n, N) matrix: products,
# bytes read and written besides them, bytes held at the peak. A test counts them.
PRODUCTS, MOVED, HELD = 6, 72, 16


def open_clip_transfers(case: Case) -> list[Transfer]:
    """Both features are gathered, the gradients of both scattered in the same type."""
    size = case.batch * case.d * WIDTH
    return [Transfer("all-gather", size, 2), Transfer("reduce-scatter", size, 2)]


def open_clip_memory(case: Case) -> float:
    """Two logit matrices and what autograd keeps of them, both gathered features."""
    return HELD * case.rows * case.batch + 2 * case.batch * case.d * WIDTH


def open_clip_seconds(case: Case, chip: Chip) -> float:
    """CLIP's loss only, products at the library's rate."""
    elements = case.rows * case.batch
    kernel = PRODUCTS * 2 * elements * case.d / chip.matrix_rate
    kernel += MOVED * elements / chip.memory_bandwidth
    return kernel + sum(t.seconds(chip, case.ranks) for t in open_clip_transfers(case))


WAYS = {
    "gather": Way(gather_transfers, gather_memory, gather_seconds),
    "ring": Way(ring_transfers, ring_memory, ring_seconds),
    "OpenCLIP": Way(open_clip_transfers, open_clip_memory, open_clip_seconds),
}


def on_one_gpu(chip: Chip, d: int) -> list[dict[str, str]]:
    """Milliseconds of each kernel by N, of all, and of 8 N^2 D flops at the library's rate."""
    rows = []
    for n in (4096, 8192, 16384, 32768, 65536, 131072):
        parts = kernels(chip, n, n, d)
        parts |= {"all": sum(parts.values()), "8 N² D flops": 8 * n**2 * d / chip.matrix_rate}
        rows.append({"N": number(n)} | {name: number(1e3 * s) for name, s in parts.items()})
    return rows


def over_ranks(chip: Chip, rows: int, d: int) -> list[dict[str, str]]:
    """Time, memory and traffic of a rank by the number of ranks."""
    lines = []
    for ranks in (8, 16, 64, 256, 1024, 4096):
        case, line = Case(ranks, rows, d), {"ranks": f"{ranks:,}"}
        for name, way in WAYS.items():
            sent = sum(transfer.sent(ranks) for transfer in way.transfers(case))
            memory = way.memory(case)
            fits = memory <= chip.memory
            line[f"{name}: ms"] = number(1e3 * way.seconds(case, chip)) if fits else "does not fit"
            line[f"{name}: memory, MB"] = number(memory / 1e6)
            line[f"{name}: sends, MB"] = number(sent / 1e6)
        lines.append(line)
    return lines


def main(options: argparse.Namespace) -> int:
    """Print the tables."""
    chip, d = CHIPS[options.chip], options.d
    print(f"{options.chip}, D = {d}, bfloat16: predicted, not measured.\n")
    print("Milliseconds on one GPU, at least:\n")
    print("\n".join(table(on_one_gpu(chip, d))))
    for rows in (1024, 4096):
        print(f"\n{rows:,} rows a rank (OpenCLIP: CLIP's loss only, both flags on):\n")
        print("\n".join(table(over_ranks(chip, rows, d))))
    return 0
