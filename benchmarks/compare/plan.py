"""What a side-by-side run measures, on a CPU and on a CUDA device."""

from dataclasses import dataclass
from itertools import product

import torch

# Of texts from their images, as in a model that is trained further and further; None: random pairs.
DISTANCES = (None, 0.3, 0.03, 0.003, 0.001)


@dataclass(frozen=True)
class Plan:
    """Sizes of a run."""

    dtype: torch.dtype
    sizes: tuple[tuple[int, int], ...]  # N, D
    timed_up_to: int  # the largest N that runs again and again; beyond it, each loss runs once
    error_at: tuple[int, int]
    model: str  # of the training step
    batch_size: int
    matrix: int  # rows and columns of the product whose rate is measured
    seconds: float = 6.0  # of interleaved runs of a size
    least: int = 5  # interleaved runs of a size


# The paper's own batch is 128.
CPU = Plan(
    dtype=torch.float32,
    sizes=(*product((128, 512, 2048), (512, 1024)), (8192, 512), (32768, 512)),
    timed_up_to=8192,
    error_at=(2048, 512),
    model="tiny",
    batch_size=256,
    matrix=4096,
)
# First what is most asked for: `gpu` may not have time for all.
CUDA = Plan(
    dtype=torch.bfloat16,
    sizes=(
        *((4096, 512), (65536, 768), (16384, 512), (1024, 512), (32768, 768)),
        *((512, 512), (2048, 512), (8192, 512), (262144, 768)),
    ),
    timed_up_to=262144,
    error_at=(8192, 512),
    model="ViT-B-32",
    batch_size=1024,
    matrix=8192,
)
