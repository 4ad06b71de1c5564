"""What a side-by-side run measures: the sizes for a CPU, for a CUDA device, and for a dry run."""

from dataclasses import dataclass

import torch

Size = tuple[int, int]  # N, D
# Distances of text and image; None: random pairs.
RANDOM_AND_ALIGNED = (None, 0.3, 0.03, 0.003, 0.001)
ALIGNED = RANDOM_AND_ALIGNED[1:]


@dataclass(frozen=True)
class Accuracy:
    """Pairs to compare with float64 on."""

    n: int
    d: int
    dtype: torch.dtype
    distances: tuple[float | None, ...] = RANDOM_AND_ALIGNED


@dataclass(frozen=True)
class Plan:
    """Sizes of a run.

    fresh: those of `costs` whose memory is measured in fresh processes (on CPU; a resident set is
        too rough for smaller ones).
    timed_up_to: the largest N that is timed in interleaved runs; beyond it, each loss runs once.
    parts_up_to: the largest N at which our contrastive term and our penalties also run alone.
    """

    dtype: torch.dtype
    costs: tuple[Size, ...]
    fresh: tuple[Size, ...]
    timed_up_to: int
    parts_up_to: int
    losses: tuple[Accuracy, ...]
    penalties: tuple[Accuracy, ...]
    model: str
    batch_size: int
    matrix: int  # rows and columns of the product whose rate is measured
    seconds: float  # on interleaved runs of a size, at least
    least: int  # interleaved runs of a size


# The paper's own batch is 128. N sweeps at D = 512, D at N = 2,048.
CPU = Plan(
    dtype=torch.float32,
    costs=(
        *((128, 512), (128, 1024), (512, 512), (512, 1024)),
        *((2048, 128), (2048, 512), (2048, 1024), (2048, 2048)),
        *((8192, 512), (32768, 512)),
    ),
    fresh=(
        *((512, 512), (512, 1024)),
        *((2048, 128), (2048, 512), (2048, 1024), (2048, 2048)),
        *((8192, 512), (32768, 512)),
    ),
    timed_up_to=8192,
    parts_up_to=8192,
    losses=(Accuracy(2048, 512, torch.float32),),
    penalties=(
        Accuracy(2048, 512, torch.float32, ALIGNED),
        Accuracy(8192, 512, torch.float32, ALIGNED),
    ),
    model="tiny",
    batch_size=256,
    matrix=4096,
    seconds=6.0,
    least=5,
)
CUDA = Plan(
    dtype=torch.bfloat16,
    costs=(
        *((1024, 512), (8192, 512), (16384, 256), (16384, 512), (16384, 768), (16384, 1024)),
        *((32768, 512), (65536, 512), (131072, 512)),
    ),
    fresh=(),
    timed_up_to=131072,
    parts_up_to=131072,
    losses=(Accuracy(8192, 512, torch.float32), Accuracy(8192, 512, torch.bfloat16)),
    penalties=(
        Accuracy(8192, 512, torch.float32, ALIGNED),
        Accuracy(8192, 512, torch.bfloat16, ALIGNED),
    ),
    model="ViT-B-32",
    batch_size=1024,
    matrix=8192,
    seconds=6.0,
    least=5,
)
DRY_RUN = Plan(
    dtype=torch.float32,
    costs=((32, 16), (64, 16), (64, 48), (128, 16), (256, 16)),
    fresh=((128, 16), (256, 16)),
    timed_up_to=128,
    parts_up_to=128,
    losses=(Accuracy(64, 16, torch.float32),),
    penalties=(Accuracy(64, 16, torch.float32, ALIGNED),),
    model="tiny",
    batch_size=8,
    matrix=64,
    seconds=0.1,
    least=3,
)
