"""What the chips can do: measured rates where somebody published them, with their source.

Per SM and clock, the three generations agree (CUDA C++ Programming Guide, "Throughput of Native
Arithmetic Instructions", compute capability 8.0, 9.0 and 10.0): 4 warp instructions issued; results
of 128 float32 additions or multiplications, 64 comparisons, selections and integer operations,
32 warp shuffles, 16 exponentials.
"""

from dataclasses import dataclass, replace

ISSUE_PER_CLOCK = 4  # warp instructions
HALF_RATE_PER_CLOCK = 2  # warp instructions of 64 lanes per clock
SHUFFLES_PER_CLOCK = 1
EXPONENTIALS_PER_CLOCK = 0.5
REGISTERS = 65536  # of an SM
# Assumed: a library product takes whole turns of the one of these output tiles that leaves the
# fewest SMs empty, at the same rate per element, and does not split its sum. cuBLAS has these
# (kernels named nvjet_tst_128x256_..., nvjet_tst_128x192_... in public profiles of PyTorch) and
# others, some of which split the sum (..._splitK_...); which it takes when is not documented.
LIBRARY_TILES = ((128, 256), (256, 128), (128, 192), (192, 128))


@dataclass(frozen=True)
class Chip:
    """Rates in units per second, sizes in bytes.

    matrix_rate: of the best bfloat16 product of the library. tf32: half of it.
    triton_fraction: of that rate, what a Triton main loop reaches on long products.
    library_tiles: output tiles that the library can take, rows and columns.
    """

    name: str
    arch: str
    sms: int
    clock: float
    matrix_rate: float
    memory_bandwidth: float
    l2_bandwidth: float
    l2_bytes: int
    triton_fraction: float
    library_tiles: tuple[tuple[int, int], ...] = LIBRARY_TILES


# matrix_rate: "Maximum Achievable Matmul FLOPS", github.com/stas00/ml-engineering,
# compute/accelerator: A100 SXM 271.2, H100 SXM 794.5, B200 1745 TFLOP/s. The 798 of the H100 is
# the ceiling that this project's target is set against.
# clock: what makes the data sheet's peak (312, 989.4, 2250 TFLOP/s at 2048, 4096, 8192 flops per
# SM and clock).
# memory, L2: github.com/te42kyfo/gpu-benches, gpu-l2-cache, large and small data sets: A100 80 GB
# 1.73 and 5.4 TB/s; H200, the same die as the H100, 3.89 and 9.7 TB/s; H100 PCIe with 114 of the
# 132 SMs, 6.9 TB/s of L2, which is 8.0 for 132: the lower one is taken.
# H100 memory: 3.0 of its 3.35 TB/s, as measured for this project's target.
# B200: device-to-device copies at 6.0 TB/s (newmind.ai, journal 18); 148 SMs and 126 MB of L2
# (chipsandcheese.com, "Nvidia's B200"); no figure found for its L2 bandwidth: per SM and clock as
# the H100, an assumption.
# triton_fraction: 03-matrix-multiplication against cuBLAS. A100: 223 of 229 TFLOP/s in bfloat16
# (triton-lang/triton #743). H100: 525 of 585 at 3,072^3 (#3672), but 666 of 794 for a persistent
# TMA kernel (meta-pytorch/tritonbench #894), which ours is not: 0.8. B200: without warp
# specialisation and two-SM products, which cuBLAS has; 0.87 for the latter alone (#9697): 0.7.
A100 = Chip("A100", "sm_80", 108, 1.41e9, 271.2e12, 1.73e12, 5.4e12, 40 * 10**6, 0.95)
H100 = Chip("H100", "sm_90", 132, 1.83e9, 798e12, 3.0e12, 8.0e12, 50 * 10**6, 0.8)
H200 = replace(H100, name="H200", memory_bandwidth=3.89e12)
B200 = Chip("B200", "sm_100", 148, 1.856e9, 1745e12, 6.0e12, 9.0e12, 126 * 10**6, 0.7)
CHIPS = {chip.name: chip for chip in (A100, H100, H200, B200)}


def chip_of(device_name: str) -> Chip | None:
    """The chip whose name is in the name that CUDA gives a device, if it is one of these."""
    return next((chip for name, chip in CHIPS.items() if name in device_name), None)
