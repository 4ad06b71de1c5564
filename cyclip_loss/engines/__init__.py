"""Where a call is computed: which engine, for which features.

An engine is a module with the five functions that `eager.py` defines: `contrastive_lse`,
`contrastive_grads`, `elementwise_terms`, `gram_matrices` and `cyclic_grads`. Besides "eager" there
is "triton", the kernels for CUDA and ROCm. With "auto", each layout of a call is compared with
PyTorch before an engine computes it (`verification.py`); such an engine is a "verified" one.

A further engine is its module, its name in `options.IMPLS`, and a branch in `choose`.
"""

import os
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from cyclip_loss.engines import eager
from cyclip_loss.engines.verification import VerifiedKernels, described
from cyclip_loss.inputs import check_features
from cyclip_loss.numerics import architecture, float32_is_exact
from cyclip_loss.options import IMPLS, one_of
from cyclip_loss.usage_warnings import warn_once

# What "auto" means. Read once: to look up a variable that is not set takes as long as the check of
# the features.
IMPL_OF_AUTO = os.environ.get("CYCLIP_LOSS_IMPL") or "auto"


def engine_of(features: Tensor, impl: str = "auto") -> str:
    """What computes such features in this process, and why, in words to print.

    Args:
        features: (N, D), N >= 1, cast as autocast asks. Only their dtype, device and D count.
        impl: the module's option.

    Raises:
        TypeError, ValueError: as a call in one process with these features and this `impl`.

    >>> engine_of(torch.ones(8, 4), impl="eager")
    "PyTorch: impl is 'eager'"
    """
    return choose(impl, check_features(features, features, ("features",) * 2)[0])[1]


def choose(impl: str, features: Tensor) -> tuple[Any, str]:
    """The functions of the engine for features of this dtype and device; and the engine in words.

    The eager engine always computes float64, which no other engine supports. With "auto" it
    computes what they do not support.

    Raises:
        ValueError: an engine was asked for that does not support such features, or is not
            installed; or `impl` or CYCLIP_LOSS_IMPL is not one of `IMPLS`.
    """
    source, asked = ("CYCLIP_LOSS_IMPL", IMPL_OF_AUTO) if impl == "auto" else ("impl", impl)
    one_of(IMPLS)(source, asked)
    if features.dtype == torch.float64:
        return eager, "PyTorch: the kernels do not compute float64"
    if asked == "eager":
        return eager, f"PyTorch: {source} is 'eager'"
    why_not = _why_not_triton(features, asked)
    if why_not and asked == "triton":
        raise ValueError(f"{source}={asked!r}: {why_not}")
    if not why_not:
        kernels = verified(features)
        if asked == "triton":
            return kernels.kernels, "Triton kernels"
        if kernels.problem is None:
            return kernels, "Triton kernels"
        why_not = kernels.problem
    return eager, f"PyTorch: {why_not}"


def load(impl: str, features: Tensor) -> Any:
    """The functions of the engine for such features.

    On a rank without rows no kernel can be launched, so the eager engine computes.
    """
    return eager if impl == "eager" or features.shape[0] == 0 else choose(impl, features)[0]


def verified(features: Tensor) -> VerifiedKernels:
    """The kernels for such features, which remember the layouts that were compared.

    A wrong layout switches them off for the features' device, dtype and precision.
    """
    return _verified(features.device, features.dtype, float32_is_exact())


@lru_cache
def _verified(device: torch.device, dtype: torch.dtype, _: bool) -> VerifiedKernels:
    from cyclip_loss.engines import triton

    return VerifiedKernels(triton, device, dtype)


def _why_not_triton(features: Tensor, asked: str) -> str:
    """Why the kernels do not compute such features; empty if they do.

    asked: with "triton", they are also interpreted on other devices than a GPU. With "auto", a
    warning says why they cannot be imported.
    """
    unsupported = (
        f"the kernels do not support {features.device.type} (they need NVIDIA Ampere or newer, "
        "Blackwell with Triton 3.9 or newer, or AMD gfx942)"
    )
    if architecture(features.device) is None and (features.is_cuda or asked == "auto"):
        return unsupported
    problem = _import_problem()
    if problem:
        if asked == "auto":
            warn_once(
                "triton",
                f"{problem}. PyTorch computes instead, with the same results but slower. "
                "CYCLIP_LOSS_IMPL=eager chooses it without this warning",
                every_rank=True,
            )
        return problem
    from cyclip_loss.engines import triton

    if not (features.is_cuda or triton.INTERPRETED):
        return unsupported
    return f"D is above {triton.MAX_D}" if features.shape[1] > triton.MAX_D else ""


@lru_cache
def _import_problem() -> str:
    """Why the kernels cannot be imported: Triton is missing or broken. Empty if they can."""
    try:
        import cyclip_loss.engines.triton  # noqa: F401
    except Exception as error:
        return (
            f"the Triton kernels cannot be imported: {described(error)}. Install the Triton that "
            "belongs to your version of PyTorch: `pip install triton` (Windows: `triton-windows`; "
            "ROCm: the one that PyTorch's index lists beside it)"
        )
    return ""
