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
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.record import table

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
        "cyclic_statistics": longest(triton / 2, 2 * n * d * d, 0, 2 * n * d * WIDTH),
        "cyclic_grads": longest(triton / 2, 4 * n * d * d, 0, 4 * n * d * WIDTH),
    }


@dataclass(frozen=True)
class Case:
    """W ranks, 8 or more, of n rows of D bfloat16 features, on one kind of chip."""

    chip: Chip
    ranks: int
    rows: int
    d: int

    def travels(self, size: float, cards: int = CARDS_PER_NODE) -> float:
        """Seconds of `size` bytes that each rank sends; between nodes, with so many cards a node."""
        nvlink = self.chip.nvlink
        within = self.ranks <= GPUS_PER_NODE
        return size / (nvlink if within else min(nvlink, cards * self.chip.card))

    def collective(self, size: float) -> float:
        """Seconds of an all-gather or reduce-scatter of `size` bytes in all; an all-reduce: two."""
        return self.travels(size * (self.ranks - 1) / self.ranks)

    def penalties(self) -> tuple[float, float]:
        """Seconds of their all-reduce of [A, B, C]; bytes held, and those of the gradients."""
        grams = 3 * self.d**2 * FLOAT
        return 2 * self.collective(grams), grams + 2 * self.rows * self.d * (FLOAT + WIDTH)


def gather(case: Case) -> tuple[float, float]:
    """dist_impl="gather": text features come, column sums are shared, text gradients leave.

    Seconds and bytes. One thing after the other; all text features, their gradients, a block of G.
    """
    batch = case.ranks * case.rows
    columns = batch * case.d
    shared, own = case.penalties()
    transfers = columns * (WIDTH + FLOAT) + 2 * 3 * batch * FLOAT  # sums are all-reduced
    seconds = sum(kernels(case.chip, case.rows, batch, case.d).values())
    held = columns * (WIDTH + FLOAT) + batch * FLOAT + min(case.rows * batch * WIDTH, BLOCK)
    return seconds + shared + case.collective(transfers), held + own


def ring(case: Case) -> tuple[float, float]:
    """dist_impl="ring": texts forward with their columns' sums, backward with their gradients.

    Seconds and bytes. A block is multiplied while the next one travels: each step takes the longer
    of both. Two text blocks, gradients that leave and come, a block of G: nothing grows with W.
    """
    block, sums = case.rows * case.d, case.rows * FLOAT
    parts = kernels(case.chip, case.rows, case.rows, case.d)
    penalties = parts.pop("cyclic_statistics") + parts.pop("cyclic_grads")
    forward = parts.pop("contrastive_lse")
    step = max(forward, case.travels(block * WIDTH + 2 * sums, cards=1))
    step += max(sum(parts.values()), case.travels(block * (WIDTH + FLOAT) + sums, cards=1))
    shared, own = case.penalties()
    held = 2 * block * WIDTH + 3 * block * FLOAT + 3 * sums + min(case.rows**2 * WIDTH, BLOCK)
    return penalties + shared + case.ranks * step, held + own


def open_clip(case: Case) -> tuple[float, float]:
    """CLIP's loss only: both features are gathered, the gradients of both scattered, as bfloat16.

    Seconds and bytes. Products at the library's rate; two logit matrices and what autograd keeps.
    """
    elements, features = case.rows**2 * case.ranks, case.ranks * case.rows * case.d * WIDTH
    seconds = PRODUCTS * 2 * elements * case.d / case.chip.matrix_rate
    seconds += MOVED * elements / case.chip.memory_bandwidth + case.collective(4 * features)
    return seconds, HELD * elements + 2 * features


WAYS: dict[str, Callable[[Case], tuple[float, float]]] = {
    "gather": gather,
    "ring": ring,
    "OpenCLIP": open_clip,
}


def main(options: argparse.Namespace) -> int:
    """Print the tables."""
    d = options.d
    print(f"D = {d}, bfloat16: predicted, not measured; at least. OpenCLIP: CLIP's loss only.")
    for name, chip in CHIPS.items():
        print(f"\n{name}, milliseconds on one GPU:\n")
        alone = []
        for n in (4096, 8192, 16384, 32768, 65536, 131072):
            parts = kernels(chip, n, n, d)
            parts |= {"all": sum(parts.values()), "8 N² D flops": 8 * n**2 * d / chip.matrix_rate}
            alone.append({"N": n} | {part: 1e3 * seconds for part, seconds in parts.items()})
        print(table(alone))
        print(f"\n{name}, across ranks:\n")
        lines = []
        for rows in (1024, 4096):
            for ranks in (8, 16, 64, 256, 1024, 4096):
                line: dict[str, object] = {"rows a rank": rows, "ranks": ranks}
                for way, predict in WAYS.items():
                    seconds, held = predict(Case(chip, ranks, rows, d))
                    fits = held <= chip.memory
                    line[f"{way}: ms"] = 1e3 * seconds if fits else "does not fit"
                    line[f"{way}: MB"] = held / 1e6
                lines.append(line)
        print(table(lines))
    return 0
