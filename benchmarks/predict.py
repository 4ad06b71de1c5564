"""`python -m benchmarks predict`: predicts the least time of a step, on one GPU and across ranks.

This is a model, not a measurement. It assumes bfloat16 features, forward and backward, equal
lambdas and gradients for all inputs. On one GPU it is a roofline from published rates: a kernel
takes as long as its products, its exponentials or its memory traffic, whichever takes longest.

    contrastive term    8 N^2 D flops    two sweeps in Triton; cuBLAS multiplies G with the features
    penalties           6 N D^2 flops    in Triton, as tf32

Across W ranks the same formulas hold for n rows and N = W n columns. A transfer takes its bytes
divided by a bandwidth. The model leaves out all work of a tile but its product, launches, Python,
latencies, and ranks that wait for each other. It also leaves out that some transfers overlap with
kernels. Memory is what the loss needs in addition to the features: the large tensors at the peak of
the backward pass.
"""

import argparse
from dataclasses import dataclass
from itertools import product

from benchmarks.run import Row, table

# Predictions for Hopper that `python -m benchmarks gpu` shows with its measurements. The share of a
# sweep's epilogue is estimated from the instructions in its binary. The shape of a tile matters
# because of shared memory: while it delivers 128 bytes, a wgmma of 128 columns needs 144 bytes, and
# a wgmma of 256 columns needs 128.
EPILOGUE_SHARE, COST_OF_SHAPE = "25 to 35 %", "11 %"

# Bytes per element: features are bfloat16; sums, log-sum-exps and partial gradients are float32.
BFLOAT16, FLOAT32 = 2, 4
GPUS_PER_NODE = NETWORK_CARDS_PER_NODE = 8
# OpenCLIP's loss with local_loss and gather_with_grad, counted in the operators of PyTorch 2.13:
# its products of (n, D) and (D, N) matrices or of the same size; for each element of an (n, N)
# matrix, the bytes that all other operators read and write, and the bytes of memory at the peak.
DENSE_PRODUCTS, DENSE_BYTES_MOVED, DENSE_PEAK_BYTES = 6, 72, 16
MAX_G_BYTES = 2**29  # of the block of G that the loss computes at a time


@dataclass(frozen=True)
class Chip:
    """Rates in units per second and GPU, sizes in bytes."""

    matrix_rate: float  # flops of cuBLAS's best bfloat16 product; tf32 has half of it
    triton_share: float  # the share of matrix_rate that a main loop in Triton reaches
    exponential_rate: float
    memory_bandwidth: float
    memory: float
    nvlink_bandwidth: float  # "bus bandwidth" of a collective within a node
    card_bandwidth: float  # of one InfiniBand card


# Sources.
# matrix_rate: "Maximum Achievable Matmul FLOPS", github.com/stas00/ml-engineering,
# compute/accelerator.
# triton_share: Triton's 03-matrix-multiplication compared with cuBLAS. A100: 223 of 229 TFLOP/s
# (triton-lang/triton #743). H100: 666 of 794 with a persistent TMA kernel (meta-pytorch/tritonbench
# #894); this package has no such kernel, so 0.8. B200: 0.87 without two-SM products
# (triton-lang/triton #9697); this package has no warp specialisation either, so 0.7.
# exponential_rate: 16 per SM and clock (CUDA C++ Programming Guide, arithmetic instructions).
# memory_bandwidth: A100 and H100 as measured by github.com/te42kyfo/gpu-benches; B200:
# device-to-device copies (newmind.ai, journal 18).
# nvlink_bandwidth, card_bandwidth: github.com/NVIDIA/nccl-tests/issues/149, 212, 119, 290.
# nvlink_bandwidth of B200: twice the H100's, because its line rate is twice as high.
CHIPS = {
    "A100": Chip(271.2e12, 0.95, 16 * 108 * 1.41e9, 1.73e12, 80e9, 230e9, 24e9),
    "H100": Chip(794.5e12, 0.8, 16 * 132 * 1.83e9, 3.0e12, 80e9, 370e9, 46e9),
    "B200": Chip(1745e12, 0.7, 16 * 148 * 1.856e9, 6.0e12, 180e9, 740e9, 46e9),
}


def kernels(chip: Chip, n: int, m: int, d: int) -> dict[str, float]:
    """Seconds of each kernel for n image rows and m text rows. Penalties use n rows of both."""

    def seconds(rate: float, flops: float, exponentials: float, bytes_moved: float) -> float:
        return max(
            flops / rate,
            exponentials / chip.exponential_rate,
            bytes_moved / chip.memory_bandwidth,
        )

    triton_rate = chip.triton_share * chip.matrix_rate
    feature_bytes, g_bytes = (n + m) * d * BFLOAT16, n * m * BFLOAT16
    return {
        "contrastive_lse": seconds(triton_rate, 2 * n * m * d, 2 * n * m, feature_bytes),
        "contrastive_grads": seconds(
            triton_rate, 2 * n * m * d, 2 * n * m, feature_bytes + g_bytes
        ),
        "products with G": seconds(
            chip.matrix_rate, 4 * n * m * d, 0, 2 * g_bytes + 3 * feature_bytes
        ),
        "gram_matrices": seconds(triton_rate / 2, 2 * n * d * d, 0, 2 * n * d * BFLOAT16),
        "cyclic_grads": seconds(triton_rate / 2, 4 * n * d * d, 0, 4 * n * d * BFLOAT16),
    }


def across_ranks(chip: Chip, ranks: int, n: int, d: int) -> dict[str, tuple[float, float]]:
    """Seconds and bytes of each strategy, and of OpenCLIP's loss, with n rows on each rank."""
    return {
        "gather": gather(chip, ranks, n, d),
        "ring": ring(chip, ranks, n, d),
        "OpenCLIP": open_clip(chip, ranks, n, d),
    }


def collective_bandwidth(chip: Chip, ranks: int) -> float:
    """Bytes per second of a collective. Between nodes it uses all network cards of each node."""
    if ranks <= GPUS_PER_NODE:
        return chip.nvlink_bandwidth
    return min(chip.nvlink_bandwidth, NETWORK_CARDS_PER_NODE * chip.card_bandwidth)


def bytes_in_both_strategies(n: int, d: int) -> int:
    """Peak bytes that gather and ring both need: A, B, C, and the gradients in both dtypes."""
    return 3 * d * d * FLOAT32 + 2 * n * d * (FLOAT32 + BFLOAT16)


def gather(chip: Chip, ranks: int, n: int, d: int) -> tuple[float, float]:
    """Seconds and bytes of `dist_impl="gather"`. No transfer overlaps with a kernel.

    Ranks gather text features, all-reduce the sums of the columns, and reduce-scatter the gradients
    of the texts. Memory has these features and gradients, and a block of G.
    """
    batch_size = ranks * n
    gram_bytes = 3 * d * d * FLOAT32
    # An all-reduce sends everything twice.
    sent_bytes = 2 * gram_bytes + batch_size * (d * (BFLOAT16 + FLOAT32) + 6 * FLOAT32)
    seconds = sum(kernels(chip, n, batch_size, d).values())
    seconds += sent_bytes / collective_bandwidth(chip, ranks)
    text_bytes = batch_size * (d * (BFLOAT16 + FLOAT32) + FLOAT32)
    g_bytes = min(n * batch_size * BFLOAT16, MAX_G_BYTES)
    return seconds, bytes_in_both_strategies(n, d) + text_bytes + g_bytes


def ring(chip: Chip, ranks: int, n: int, d: int) -> tuple[float, float]:
    """Seconds and bytes of `dist_impl="ring"`.

    Ranks pass on text features with the sums of their columns in forward, and with their gradients
    in backward. A rank computes with one block while it receives the next one, so a step takes the
    time of the computation or of the transfer, whichever is longer. Memory has two blocks of text
    features, the gradients that are sent and received, and a block of G. It does not grow with the
    number of ranks.
    """
    within_node = ranks <= GPUS_PER_NODE
    # Two neighbours in the ring that are on different nodes use one network card.
    bandwidth = chip.nvlink_bandwidth if within_node else chip.card_bandwidth
    gram_bytes = 3 * d * d * FLOAT32
    kernel_seconds = kernels(chip, n, n, d)
    penalties = kernel_seconds.pop("gram_matrices") + kernel_seconds.pop("cyclic_grads")
    penalties += 2 * gram_bytes / collective_bandwidth(chip, ranks)
    forward_transfer = n * (d * BFLOAT16 + 2 * FLOAT32) / bandwidth
    forward = max(kernel_seconds.pop("contrastive_lse"), forward_transfer)
    backward_transfer = n * (d * (BFLOAT16 + FLOAT32) + FLOAT32) / bandwidth
    backward = max(sum(kernel_seconds.values()), backward_transfer)
    block_bytes = n * (d * (2 * BFLOAT16 + 3 * FLOAT32) + 3 * FLOAT32)
    g_bytes = min(n * n * BFLOAT16, MAX_G_BYTES)
    seconds = penalties + ranks * (forward + backward)
    return seconds, bytes_in_both_strategies(n, d) + block_bytes + g_bytes


def open_clip(chip: Chip, ranks: int, n: int, d: int) -> tuple[float, float]:
    """Seconds and bytes of OpenCLIP's CLIP loss.

    Ranks gather both features and reduce-scatter the gradients of both, in bfloat16. Products run
    at the rate of cuBLAS. Memory has two matrices of logits and the tensors that autograd saves.
    """
    batch_size = ranks * n
    products = DENSE_PRODUCTS * 2 * n * batch_size * d / chip.matrix_rate
    memory_traffic = DENSE_BYTES_MOVED * n * batch_size / chip.memory_bandwidth
    transfers = 4 * batch_size * d * BFLOAT16 / collective_bandwidth(chip, ranks)
    feature_bytes = 2 * batch_size * d * BFLOAT16
    peak_bytes = DENSE_PEAK_BYTES * n * batch_size + feature_bytes
    return products + memory_traffic + transfers, peak_bytes


def one_gpu_rows(chip: Chip, d: int) -> list[Row]:
    """A row for each N with the milliseconds of each kernel."""
    rows = []
    for n in (4096, 8192, 16384, 32768, 65536, 131072):
        times = kernels(chip, n, n, d)
        times |= {"all": sum(times.values()), "8 N² D flops": 8 * n**2 * d / chip.matrix_rate}
        rows.append({"N": n} | {name: 1e3 * seconds for name, seconds in times.items()})
    return rows


def rank_rows(chip: Chip, d: int) -> list[Row]:
    """Rows of milliseconds and megabytes, for several numbers of rows per rank and of ranks."""
    rows = []
    for n, ranks in product((1024, 4096), (8, 16, 64, 256, 1024, 4096)):
        row: Row = {"rows per rank": n, "ranks": ranks}
        for strategy, (seconds, peak_bytes) in across_ranks(chip, ranks, n, d).items():
            row[f"{strategy}: ms"] = 1e3 * seconds if peak_bytes <= chip.memory else "does not fit"
            row[f"{strategy}: MB"] = peak_bytes / 1e6
        rows.append(row)
    return rows


def main(options: argparse.Namespace) -> int:
    """Print the predictions for each chip."""
    d = options.d
    print(f"D = {d}, bfloat16: predicted lower bounds, not measured. OpenCLIP: CLIP's loss only.")
    for name, chip in CHIPS.items():
        print(f"\n{name}, milliseconds on one GPU:\n\n{table(one_gpu_rows(chip, d))}")
        print(f"\n{name}, across ranks:\n\n{table(rank_rows(chip, d))}")
    return 0
