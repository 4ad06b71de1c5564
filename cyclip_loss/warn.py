"""Warnings of settings that are legal and probably not meant, each once in a process."""

import warnings
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from cyclip_loss.eager import accumulation_dtype
from cyclip_loss.ops import is_traced

# `reference_batch_size` as given, if it is: the paper's formula, which is warned of in large
# batches. None, said explicitly, is the same formula, without a warning.
NotGiven = Literal["not given"]
NOT_GIVEN: NotGiven = "not given"

PAPER_LAMBDA, PAPER_BATCH_SIZE = 0.25, 128  # Goel et al. 2022
TIMES_THE_PAPERS = 2  # four times already costs names: the rehearsal in reference_train
# Rows normalised in bfloat16 differ from length 1 by less than 1 %.
LENGTH_TOLERANCE = 0.05
# CLIP's scale starts at 1 / 0.07 = 14.3 and ends at 100. The logarithm of 100 is 4.6.
LEAST_SCALE = 5.0

_said: set[str] = set()


class CyCLIPWarning(UserWarning):
    """The category of this package's warnings, for `warnings.filterwarnings`."""


def _say(subject: str, text: str) -> None:
    """Warn, once in a process and, over ranks, in the first process only."""
    if subject in _said or (dist.is_available() and dist.is_initialized() and dist.get_rank() > 0):
        return
    _said.add(subject)
    warnings.warn(text, CyCLIPWarning, stacklevel=2)


def of_strong_penalties(weight: float, n: int) -> None:
    """Warn if lambda * N, to which the penalties grow, is far from the paper's 0.25 * 128.

    weight: the larger lambda; n: N, the rows of the global batch. Not while `torch.compile` traces:
    what it compiles would depend on N.
    """
    if torch.compiler.is_compiling():
        return
    times = weight * n / (PAPER_LAMBDA * PAPER_BATCH_SIZE)
    if times > TIMES_THE_PAPERS:
        _say(
            "strong penalties",
            f"lambda = {weight:g} in a batch of {n} is {times:.0f} times as strong as the paper's "
            f"{PAPER_LAMBDA} in a batch of {PAPER_BATCH_SIZE}: the penalties grow with the batch. "
            f"Here {PAPER_LAMBDA * PAPER_BATCH_SIZE / n:.3g} is as strong as the paper's. With "
            f"reference_batch_size={PAPER_BATCH_SIZE} a lambda means the same at every batch size; "
            "reference_batch_size=None is the paper's formula without this warning",
        )


class FirstLook:
    """Looks whether a module's first features and scale are what the formulas take, and warns.

    At three numbers, which the host does not wait for: on the CPU it looks in the first call, on
    CUDA in the first one that finds them there. Never on other devices, while `torch.compile`
    traces or a CUDA graph is captured. A copy of the module looks for itself.
    """

    def __init__(self) -> None:
        self._numbers: Tensor | None = None
        self._arrival: Any = None
        self._done = False

    def __reduce__(self) -> tuple[Any, ...]:
        return FirstLook, ()

    def __call__(
        self, image: Tensor, text: Tensor, logit_scale: Tensor | float = LEAST_SCALE
    ) -> None:
        """image, text: (n, D), n >= 0; logit_scale: scalar; all checked."""
        # In this order: what is compiled must not depend on `_done`.
        if is_traced(image, text) or self._done:
            return
        on_cuda = image.device.type == "cuda"
        if on_cuda and torch.cuda.is_current_stream_capturing():
            return
        if self._numbers is None:
            self._done = len(image) == 0 or not (on_cuda or image.device.type == "cpu")
            if self._done:
                return
            self._numbers = _numbers(image, text, logit_scale).to("cpu", non_blocking=True)
            if on_cuda:
                self._arrival = torch.cuda.Event()  # type: ignore[no-untyped-call]
                self._arrival.record(torch.cuda.current_stream(image.device))
        if self._arrival is None or self._arrival.query():
            shortest, longest, scale = self._numbers.tolist()
            self._numbers, self._arrival, self._done = None, None, True
            # Written so that NaN is none of this file's business.
            if shortest < 1 - LENGTH_TOLERANCE or longest > 1 + LENGTH_TOLERANCE:
                _say(
                    "lengths",
                    f"the rows of the features have lengths from {shortest:.3g} to {longest:.3g}; "
                    "the loss takes rows of unit length and does not normalise them: "
                    "torch.nn.functional.normalize(features, dim=-1)",
                )
            if scale < LEAST_SCALE:
                _say(
                    "scale",
                    f"logit_scale is {scale:.3g}, where CLIP's is from 14.3 to 100: it is taken as "
                    "it is, so if it is the logarithm, as the parameter of CLIP's models is, pass "
                    "logit_scale.exp()",
                )


def _numbers(image: Tensor, text: Tensor, logit_scale: Tensor | float) -> Tensor:
    """The least and the largest length of a row, and the scale: (3,)."""
    dtype = accumulation_dtype(image.dtype)
    lengths = torch.cat(
        [torch.linalg.vector_norm(rows.detach(), dim=1, dtype=dtype) for rows in (image, text)]
    )
    # A sum, as it takes a number, or a scalar on the CPU, to any device without a copy.
    scale = lengths.new_zeros(()) + logit_scale
    return torch.stack((*lengths.aminmax(), scale.detach().reshape(())))
