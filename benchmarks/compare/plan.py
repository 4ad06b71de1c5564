"""The sizes of a side-by-side run, on a CPU and on a CUDA device."""

from dataclasses import dataclass

import torch

LOGIT_SCALE = 14.3  # CLIP's initial value
# Distances between the two features of a pair. They shrink during training. None: random pairs.
DISTANCES = (None, 0.3, 0.03, 0.003, 0.001)


@dataclass(frozen=True)
class Plan:
    """The sizes of a run."""

    dtype: torch.dtype
    sizes: tuple[tuple[int, int], ...]  # N, D
    timed_up_to: int  # the largest N that is timed in rounds; beyond it, each loss runs once
    error_size: tuple[int, int]  # N, D
    matrix: int  # size of the square matrices whose product gives the matmul rate
    matrix_seconds: float = 2.0  # for the measurement of the matmul rate
    seconds: float = 6.0  # for all rounds at one size
    min_rounds: int = 5


# The paper's batch size is 128.
CPU = Plan(
    dtype=torch.float32,
    sizes=(*((n, 512) for n in (128, 256, 512, 1024, 2048, 8192, 32768)), (2048, 1024)),
    timed_up_to=8192,
    error_size=(2048, 512),
    matrix=4096,
)
# The most common sizes come first, because `gpu` may not have time for all sizes.
CUDA = Plan(
    dtype=torch.bfloat16,
    sizes=(
        (4096, 512),
        (65536, 768),
        (16384, 512),
        (1024, 512),
        (32768, 768),
        (512, 512),
        (2048, 512),
        (8192, 512),
        (262144, 768),
    ),
    timed_up_to=262144,
    error_size=(8192, 512),
    matrix=8192,
)
