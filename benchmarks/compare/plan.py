"""The sizes of a side-by-side run, on a CPU and on a CUDA device."""

import argparse
from dataclasses import dataclass, replace

import torch

LOGIT_SCALE = 14.3  # CLIP's initial value
# Distances between the two features of a pair. They shrink during training. None: random pairs.
DISTANCES = (None, 0.3, 0.03, 0.003, 0.001)
# The dtype of the features. Under "autocast" the loss runs in bfloat16 autocast, and its features
# are float32, as OpenCLIP's models normalise them in float32.
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "autocast": torch.float32,
}


@dataclass(frozen=True)
class Plan:
    """The sizes of a run."""

    dtypes: tuple[str, ...]  # of DTYPES
    sizes: tuple[tuple[int, int], ...]  # N, D
    timed_up_to: int  # the largest N with more than one timed round
    error_size: tuple[int, int]  # N, D
    seconds: float = 6.0  # for all rounds at one size
    min_rounds: int = 5


# The paper's batch size is 128.
CPU = Plan(
    dtypes=("float32",),
    sizes=(*((2**k, 512) for k in range(7, 14)), (2048, 1024)),
    timed_up_to=8192,
    error_size=(2048, 512),
)
# The most common sizes come first, because `gpu` may not have time for all sizes.
CUDA = Plan(
    dtypes=("bfloat16",),
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
)


def chosen(plan: Plan, options: argparse.Namespace) -> Plan:
    """The plan with the user's --sizes, --d and --dtype."""
    if options.sizes or options.d:
        sizes = dict.fromkeys(options.sizes or [n for n, _ in plan.sizes])
        d = options.d or 512
        n = min(max(sizes), plan.error_size[0])
        plan = replace(plan, sizes=tuple((n, d) for n in sizes), error_size=(n, d))
    return replace(plan, dtypes=tuple(options.dtype)) if options.dtype else plan
