"""`python -m benchmarks predict`: the least time a step should take, on one GPU and across ranks.

This is a model, not a measurement: bfloat16 features, forward and backward, equal lambdas, all
gradients. On one GPU it is a roofline from published rates. A kernel takes as long as the slowest
of three: its products, its exponentials, its traffic to device memory.

    contrastive term: 8 N^2 D flops. The two sweeps run in Triton, and the library multiplies G with
    the features. Penalties: 6 N D^2 flops, in Triton, as tf32.

Across W ranks the same formulas hold for n rows and N = W n columns. Each transfer takes its bytes
over a bandwidth. The model leaves out what a tile does besides its product, launches, Python,
latencies, and ranks that wait for each other. It also ignores that some transfers hide behind
kernels. Memory is what the loss needs beside the features: the large tensors at the peak of the
backward pass.
"""

import argparse
from dataclasses import dataclass
from itertools import product

from benchmarks.run import Row, table

# `python -m benchmarks gpu` shows these predictions for Hopper beside its measurements. The share
# of a sweep's epilogue follows from the instructions in its binary. The loss by a tile's shape: in
# the time in which shared memory delivers 128 bytes, a wgmma of 128 columns asks for 144 bytes, and
# one of 256 columns for 128.
EPILOGUE_SHARE, LOST_BY_SHAPE = "25 to 35 %", "11 %"

# Bytes of a bfloat16; of float32 sums, log-sum-exps and partial gradients.
BFLOAT16, FLOAT32 = 2, 4
GPUS_PER_NODE = CARDS_PER_NODE = 8
# OpenCLIP's loss with local_loss and gather_with_grad, for each element of an (n, N) matrix:
# products, bytes that other operators read and write, bytes at the peak. Counted in the operators
# of PyTorch 2.13.
DENSE_PRODUCTS, DENSE_BYTES_MOVED, DENSE_BYTES_HELD = 6, 72, 16
MAX_G_BYTES = 2**29


@dataclass(frozen=True)
class Chip:
    """Rates in units per second and GPU, sizes in bytes."""

    matrix_rate: float  # of the library's best bfloat16 product; tf32: half of it
    triton: float  # the share of that rate that a main loop in Triton reaches
    exponentials: float
    memory_bandwidth: float
    memory: float
    nvlink: float  # "bus bandwidth" of a collective within a node
    card: float  # bandwidth of one InfiniBand card


# matrix_rate: "Maximum Achievable Matmul FLOPS", github.com/stas00/ml-engineering,
# compute/accelerator.
# triton: 03-matrix-multiplication against cuBLAS: A100 223 of 229 TFLOP/s (triton-lang/triton
# #743). H100 666 of 794 for a persistent TMA kernel (meta-pytorch/tritonbench #894), which this
# package does not have: 0.8. B200 0.87 without two-SM products (triton-lang/triton #9697), and this
# package has no warp specialisation either: 0.7.
# exponentials: 16 per SM and clock (CUDA C++ Programming Guide, arithmetic instructions).
# memory_bandwidth: A100 and H100 as measured by github.com/te42kyfo/gpu-benches; B200:
# device-to-device copies (newmind.ai, journal 18).
# nvlink, card: github.com/NVIDIA/nccl-tests/issues/149, 212, 119, 290. B200's NVLink: twice the
# H100's, because its line rate is twice as high.
CHIPS = {
    "A100": Chip(271.2e12, 0.95, 16 * 108 * 1.41e9, 1.73e12, 80e9, 230e9, 24e9),
    "H100": Chip(794.5e12, 0.8, 16 * 132 * 1.83e9, 3.0e12, 80e9, 370e9, 46e9),
    "B200": Chip(1745e12, 0.7, 16 * 148 * 1.856e9, 6.0e12, 180e9, 740e9, 46e9),
}


def kernels(chip: Chip, n: int, m: int, d: int) -> dict[str, float]:
    """Seconds of each kernel for n image rows and m text rows; penalties for n rows of both."""

    def slowest(rate: float, flops: float, exponentials: float, bytes_moved: float) -> float:
        return max(
            flops / rate,
            exponentials / chip.exponentials,
            bytes_moved / chip.memory_bandwidth,
        )

    triton = chip.triton * chip.matrix_rate
    features, g = (n + m) * d * BFLOAT16, n * m * BFLOAT16
    return {
        "contrastive_lse": slowest(triton, 2 * n * m * d, 2 * n * m, features),
        "contrastive_grads": slowest(triton, 2 * n * m * d, 2 * n * m, features + g),
        "products with G": slowest(chip.matrix_rate, 4 * n * m * d, 0, 2 * g + 3 * features),
        "gram_matrices": slowest(triton / 2, 2 * n * d * d, 0, 2 * n * d * BFLOAT16),
        "cyclic_grads": slowest(triton / 2, 4 * n * d * d, 0, 4 * n * d * BFLOAT16),
    }


def across_ranks(chip: Chip, ranks: int, n: int, d: int) -> dict[str, tuple[float, float]]:
    """Seconds and bytes of each way to compute the loss on `ranks` GPUs with n rows each."""
    return {
        "gather": gather(chip, ranks, n, d),
        "ring": ring(chip, ranks, n, d),
        "OpenCLIP": open_clip(chip, ranks, n, d),
    }


def collective_bandwidth(chip: Chip, ranks: int) -> float:
    """Bytes per second of a collective. Between nodes, all cards of a node work together."""
    if ranks <= GPUS_PER_NODE:
        return chip.nvlink
    return min(chip.nvlink, CARDS_PER_NODE * chip.card)


def bytes_of_each_strategy(n: int, d: int) -> int:
    """Bytes at the peak with gather and with ring: A, B, C, and the gradients in both dtypes."""
    return 3 * d * d * FLOAT32 + 2 * n * d * (FLOAT32 + BFLOAT16)


def gather(chip: Chip, ranks: int, n: int, d: int) -> tuple[float, float]:
    """Seconds and bytes of `dist_impl="gather"`, whose steps follow each other.

    Ranks gather text features, all-reduce sums of columns, and scatter the texts' gradients. They
    hold these features and gradients, and a block of G.
    """
    batch = ranks * n
    grams = 3 * d * d * FLOAT32  # an all-reduce sends everything twice
    sent = 2 * grams + batch * (d * (BFLOAT16 + FLOAT32) + 6 * FLOAT32)
    seconds = sum(kernels(chip, n, batch, d).values()) + sent / collective_bandwidth(chip, ranks)
    texts = batch * (d * (BFLOAT16 + FLOAT32) + FLOAT32)
    g_block = min(n * batch * BFLOAT16, MAX_G_BYTES)
    return seconds, bytes_of_each_strategy(n, d) + texts + g_block


def ring(chip: Chip, ranks: int, n: int, d: int) -> tuple[float, float]:
    """Seconds and bytes of `dist_impl="ring"`.

    Texts travel with their columns' sums in forward, and with their gradients in backward. A block
    is multiplied while the next one travels, so each step takes the longer time of the two. Ranks
    hold two blocks of texts, gradients that leave and arrive, and a block of G. Nothing grows with
    the number of ranks.
    """
    hop = chip.nvlink if ranks <= GPUS_PER_NODE else chip.card  # one card between two nodes
    grams = 3 * d * d * FLOAT32
    parts = kernels(chip, n, n, d)
    penalties = parts.pop("gram_matrices") + parts.pop("cyclic_grads")
    penalties += 2 * grams / collective_bandwidth(chip, ranks)
    forward = max(parts.pop("contrastive_lse"), n * (d * BFLOAT16 + 2 * FLOAT32) / hop)
    backward = max(sum(parts.values()), n * (d * (BFLOAT16 + FLOAT32) + FLOAT32) / hop)
    blocks = n * (d * (2 * BFLOAT16 + 3 * FLOAT32) + 3 * FLOAT32)
    g_block = min(n * n * BFLOAT16, MAX_G_BYTES)
    seconds = penalties + ranks * (forward + backward)
    return seconds, bytes_of_each_strategy(n, d) + blocks + g_block


def open_clip(chip: Chip, ranks: int, n: int, d: int) -> tuple[float, float]:
    """Seconds and bytes of OpenCLIP's CLIP loss.

    Ranks gather both features and scatter the gradients of both, in bfloat16. Products run at the
    library's rate. They hold two logit matrices and what autograd keeps.
    """
    batch = ranks * n
    products = DENSE_PRODUCTS * 2 * n * batch * d / chip.matrix_rate
    traffic = DENSE_BYTES_MOVED * n * batch / chip.memory_bandwidth
    transfers = 4 * batch * d * BFLOAT16 / collective_bandwidth(chip, ranks)
    return products + traffic + transfers, DENSE_BYTES_HELD * n * batch + 2 * batch * d * BFLOAT16


def one_gpu_rows(chip: Chip, d: int) -> list[Row]:
    """Milliseconds of each kernel by N."""
    rows = []
    for n in (4096, 8192, 16384, 32768, 65536, 131072):
        parts = kernels(chip, n, n, d)
        parts |= {"all": sum(parts.values()), "8 N² D flops": 8 * n**2 * d / chip.matrix_rate}
        rows.append({"N": n} | {part: 1e3 * seconds for part, seconds in parts.items()})
    return rows


def rank_rows(chip: Chip, d: int) -> list[Row]:
    """Milliseconds and megabytes of each way, by rows of a rank and ranks."""
    rows = []
    for n, ranks in product((1024, 4096), (8, 16, 64, 256, 1024, 4096)):
        row: Row = {"rows a rank": n, "ranks": ranks}
        for way, (seconds, held) in across_ranks(chip, ranks, n, d).items():
            row[f"{way}: ms"] = 1e3 * seconds if held <= chip.memory else "does not fit"
            row[f"{way}: MB"] = held / 1e6
        rows.append(row)
    return rows


def main(options: argparse.Namespace) -> int:
    """Print the tables."""
    d = options.d
    print(f"D = {d}, bfloat16: predicted lower bounds, not measured. OpenCLIP: CLIP's loss only.")
    for name, chip in CHIPS.items():
        print(f"\n{name}, milliseconds on one GPU:\n\n{table(one_gpu_rows(chip, d))}")
        print(f"\n{name}, across ranks:\n\n{table(rank_rows(chip, d))}")
    return 0
