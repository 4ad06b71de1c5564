"""`python -m benchmarks predict`: what a step should take at least, on one GPU and across ranks.

A model, not a measurement, for bfloat16 features, forward and backward, equal lambdas, all
gradients. On one GPU it is a roofline, from published rates: a kernel takes the longest of its
products, its exponentials and its device memory.

    8 N^2 D flops of the contrastive term: the two sweeps in Triton, the products of G with the
    features in the library; 6 N D^2 of the penalties in Triton, as tf32

Across W ranks it is that for n rows and N = W n columns, and for each transfer its bytes over a
bandwidth. Left out: what a tile does besides its product, launches and Python, latencies, ranks
that wait for each other, and that some transfers hide behind kernels. Memory is what the loss adds
to the features: large tensors at the peak of the backward pass.
"""

import argparse
from dataclasses import dataclass
from itertools import product

from benchmarks.run import table

# What `python -m benchmarks gpu` compares with its measurements on Hopper. The epilogue of a sweep:
# from the instructions of its binary. The shape: a wgmma of 128 columns asks for 144 bytes of
# shared memory in the time of 128, one of 256 columns for 128.
EPILOGUE_SHARE, LOST_BY_SHAPE = "25 to 35 %", "11 %"

WIDTH, FLOAT = 2, 4  # bytes of a bfloat16; of sums, log-sum-exps and partial gradients
GPUS_PER_NODE = CARDS_PER_NODE = 8
# OpenCLIP's loss with local_loss and gather_with_grad, by element of an (n, N) matrix: products,
# bytes read and written besides them, bytes held at the peak. Counted in PyTorch 2.13's operators.
PRODUCTS, MOVED, HELD = 6, 72, 16
BLOCK = 2**29  # bytes of G at most


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
        "gram_matrices": longest(triton / 2, 2 * n * d * d, 0, 2 * n * d * WIDTH),
        "cyclic_grads": longest(triton / 2, 4 * n * d * d, 0, 4 * n * d * WIDTH),
    }


def across_ranks(chip: Chip, ranks: int, n: int, d: int) -> dict[str, tuple[float, float]]:
    """Seconds and bytes of each way to compute the loss on `ranks` GPUs with n rows each."""
    batch, within = ranks * n, ranks <= GPUS_PER_NODE
    # Bytes per second of a collective, and of a hop in the ring, which has one card between nodes.
    together = chip.nvlink if within else min(chip.nvlink, CARDS_PER_NODE * chip.card)
    hop = chip.nvlink if within else chip.card
    grams = 3 * d * d * FLOAT  # [A, B, C]; an all-reduce sends everything twice
    held = grams + 2 * n * d * (FLOAT + WIDTH)  # and the gradients, as sums and rounded

    # dist_impl="gather", one thing after the other. Text features come, sums of columns are
    # all-reduced, gradients of texts leave. Held: these features and gradients, a block of G.
    sent = 2 * grams + batch * (d * (WIDTH + FLOAT) + 6 * FLOAT)
    gather = sum(kernels(chip, n, batch, d).values()) + sent / together
    gather_held = held + batch * (d * (WIDTH + FLOAT) + FLOAT) + min(n * batch * WIDTH, BLOCK)

    # dist_impl="ring": texts forward with their columns' sums, backward with their gradients. A
    # block is multiplied while the next one travels: each step takes the longer of both. Held: two
    # blocks, gradients that leave and come, a block of G; nothing grows with the ranks.
    parts = kernels(chip, n, n, d)
    penalties = parts.pop("gram_matrices") + parts.pop("cyclic_grads") + 2 * grams / together
    forward = max(parts.pop("contrastive_lse"), n * (d * WIDTH + 2 * FLOAT) / hop)
    backward = max(sum(parts.values()), n * (d * (WIDTH + FLOAT) + FLOAT) / hop)
    ring = penalties + ranks * (forward + backward)
    ring_held = held + n * (d * (2 * WIDTH + 3 * FLOAT) + 3 * FLOAT) + min(n * n * WIDTH, BLOCK)

    # CLIP's loss of OpenCLIP. Both features are gathered, the gradients of both scattered, as
    # bfloat16. Products at the library's rate; two logit matrices and what autograd keeps.
    products = PRODUCTS * 2 * n * batch * d / chip.matrix_rate
    dense = products + MOVED * n * batch / chip.memory_bandwidth + 4 * batch * d * WIDTH / together
    dense_held = HELD * n * batch + 2 * batch * d * WIDTH
    return {
        "gather": (gather, gather_held),
        "ring": (ring, ring_held),
        "OpenCLIP": (dense, dense_held),
    }


def main(options: argparse.Namespace) -> int:
    """Print the tables."""
    d = options.d
    print(f"D = {d}, bfloat16: predicted, not measured; at least. OpenCLIP: CLIP's loss only.")
    for name, chip in CHIPS.items():
        alone, lines = [], []
        for n in (4096, 8192, 16384, 32768, 65536, 131072):
            parts = kernels(chip, n, n, d)
            parts |= {"all": sum(parts.values()), "8 N² D flops": 8 * n**2 * d / chip.matrix_rate}
            alone.append({"N": n} | {part: 1e3 * seconds for part, seconds in parts.items()})
        for n, ranks in product((1024, 4096), (8, 16, 64, 256, 1024, 4096)):
            line: dict[str, object] = {"rows a rank": n, "ranks": ranks}
            for way, (seconds, held) in across_ranks(chip, ranks, n, d).items():
                line[f"{way}: ms"] = 1e3 * seconds if held <= chip.memory else "does not fit"
                line[f"{way}: MB"] = held / 1e6
            lines.append(line)
        print(f"\n{name}, milliseconds on one GPU:\n\n{table(alone)}")
        print(f"\n{name}, across ranks:\n\n{table(lines)}")
    return 0
