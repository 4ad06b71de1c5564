"""Warnings, each given once per process; and those of likely mistakes in a call."""

import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cyclip_loss.options import PRESETS, as_keywords

PAPER_LAMBDA, PAPER_BATCH_SIZE = 0.25, 128  # Goel et al. 2022
# Penalties more than this many times as strong as the paper's cause a warning. In our experiment
# with 250,000 icons, penalties four times as strong lower the accuracy.
STRONG = 2
# Rows normalised in bfloat16 differ from length 1 by less than 1 %.
LENGTH_TOLERANCE = 0.05
# CLIP's scale starts at 1 / 0.07 = 14.3 and ends at 100. The logarithm of 100 is 4.6.
LEAST_SCALE = 5.0

_warned: set[str] = set()


class CyCLIPWarning(UserWarning):
    """The category of this package's warnings, for `warnings.filterwarnings`."""


def warn_once(subject: str, text: str, every_rank: bool = False) -> None:
    """Warn once per process and subject.

    every_rank: warn on every rank that has the problem, because other ranks may not have it; else
    on rank 0 only.
    """
    rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
    if subject in _warned or (rank > 0 and not every_rank):
        return
    if rank > 0:
        text = f"rank {rank}: {text}"
    _warned.add(subject)
    warnings.warn(f"{text} (more: docs/questions.md)", CyCLIPWarning, stacklevel=2)


def warn_of_penalties(options: Any, num_pairs: int) -> None:
    """Warn if lambda * N is more than STRONG times the paper's 0.25 * 128.

    A reference batch size switches the warning off. options: a `PenaltyOptions`.
    """
    largest = max(options.lambda_inmodal, options.lambda_crossmodal)
    times = largest * num_pairs / (PAPER_LAMBDA * PAPER_BATCH_SIZE)
    if options.reference_batch_size is None and times > STRONG:
        advised = as_keywords(PRESETS["recommended"])
        warn_once(
            "strong penalties",
            f"lambda = {largest:g} in a batch of {num_pairs} is {times:.3g} times as strong as the "
            f"paper's {PAPER_LAMBDA} in a batch of {PAPER_BATCH_SIZE}: the penalties grow with the "
            f"batch. We advise {advised}. If you want the paper's formula: "
            "warnings.filterwarnings('ignore', category=cyclip_loss.CyCLIPWarning)",
        )


def warn_of_unusual_inputs(features: list[Tensor], logit_scale: Tensor | None) -> None:
    """Warn of rows that are not of unit length, and of a scale that can't be CLIP's.

    features: (n, D) each, n >= 1 in the first, checked; logit_scale: None for the penalties alone.
    Waits for the device.
    """
    dtype = torch.promote_types(features[0].dtype, torch.float32)
    lengths = [torch.linalg.vector_norm(x.detach(), dim=1, dtype=dtype) for x in features]
    shortest, longest = torch.stack(torch.cat(lengths).aminmax()).tolist()
    # NaN fails both comparisons, so it causes no warning.
    if shortest < 1 - LENGTH_TOLERANCE or longest > 1 + LENGTH_TOLERANCE:
        warn_once(
            "lengths",
            f"the rows of the features have lengths from {shortest:.3g} to {longest:.3g}; the loss "
            "expects rows of unit length and does not normalise them: "
            "torch.nn.functional.normalize(features, dim=-1)",
        )
    if logit_scale is None:
        return
    scale = logit_scale.item()
    if not LEAST_SCALE <= scale < torch.inf:
        warn_once(
            "scale",
            f"logit_scale is {scale:.3g}, where CLIP's is from 14.3 to 100. A small one may be a "
            "logarithm, as the parameter of CLIP's models is: pass logit_scale.exp()",
        )
