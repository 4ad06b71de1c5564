"""Where a call is computed: which engine, for which features.

An engine has the five functions that `eager.py` defines: `contrastive_lse`, `contrastive_grads`,
`elementwise_terms`, `gram_matrices` and `cyclic_grads`. The other engine, on CUDA and ROCm, is the
Triton kernels. With "auto", each layout of a call is compared with PyTorch before a kernel computes
it (`verification.py`).
"""

import os
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from cyclip_loss.engines import eager
from cyclip_loss.engines.verification import VerifiedKernels
from cyclip_loss.numerics import architecture
from cyclip_loss.options import IMPLS
from cyclip_loss.usage_warnings import warn_once


def choose(impl: str, features: Tensor) -> tuple[str, str]:
    """The engine for features of this dtype and device, and what computes them, in words.

    The engine: "eager", "kernels" or "verified kernels". The eager engine always computes float64,
    which the kernels do not support. With "auto" it also computes a D that is too large for the
    kernels' offsets.

    Raises:
        ValueError: the kernels were asked for, and Triton or a device that they support is
            missing; or CYCLIP_LOSS_IMPL is not one of `IMPLS`.
    """
    asked = impl
    if impl == "auto":
        asked = os.environ.get("CYCLIP_LOSS_IMPL") or "auto"
        if asked not in IMPLS:
            raise ValueError(f"CYCLIP_LOSS_IMPL must be one of {', '.join(IMPLS)}, got {asked!r}")
    why_not = ""
    if asked == "eager":
        why_not = "impl or CYCLIP_LOSS_IMPL is 'eager'"
    elif features.dtype == torch.float64:
        why_not = "the kernels do not compute float64"
    elif asked == "auto":
        why_not = _why_not_kernels(features)
    else:
        name = f"impl={impl!r}" if impl == asked else f"CYCLIP_LOSS_IMPL={asked}"
        _check_kernels(name, features)
    if why_not:
        return "eager", f"PyTorch: {why_not}"
    return "verified kernels" if asked == "auto" else "kernels", "Triton kernels"


def _why_not_kernels(features: Tensor) -> str:
    """Why the kernels do not compute such features; empty if they do."""
    if architecture(features.device) is None:
        return f"the kernels do not support {features.device.type}"
    if not _kernels_import():
        return "the kernels cannot be imported"
    import cyclip_loss.kernels as kernels

    return f"D is above {kernels.MAX_D}" if features.shape[1] > kernels.MAX_D else ""


def _check_kernels(name: str, features: Tensor) -> None:
    """Raise ValueError unless Triton and a device that the kernels support are there.

    name: what asked for the kernels.
    """
    if features.is_cuda and architecture(features.device) is None:
        # The kernels might compile nevertheless, and give wrong results.
        raise ValueError(
            f"{name}: the kernels do not support {features.device} (they need "
            "NVIDIA Ampere or newer, Blackwell with Triton 3.9 or newer, or AMD gfx942)"
        )
    if find_spec("triton") is None:
        raise ValueError(
            f"{name} needs Triton, which is not installed, and features on a CUDA or ROCm "
            f"device, got {features.device}"
        )
    import cyclip_loss.kernels as kernels

    if not (features.is_cuda or kernels.INTERPRETED):
        raise ValueError(
            f"{name} needs features on a CUDA or ROCm device, got {features.device} "
            "(TRITON_INTERPRET=1 runs the kernels on CPU, for tests)"
        )


def load(engine: str, features: Tensor) -> Any:
    """The functions of an engine, for such features.

    On a rank without rows no kernel can be launched, so the eager engine computes.

    engine: as `choose` returns it, or one of `IMPLS` in compiled code, whose operators can choose
    only when they run.
    """
    if engine in ("auto", "triton"):
        engine, _ = choose(engine, features)
    if engine == "eager" or features.shape[0] == 0:
        return eager
    if engine == "kernels":
        import cyclip_loss.kernels as kernels

        return kernels
    return verified(features)


@lru_cache
def _kernels_import() -> bool:
    """Whether the kernels can be imported. Warns if not: Triton is missing or broken."""
    try:
        import cyclip_loss.kernels  # noqa: F401
    except Exception as error:
        warn_once(
            "triton",
            "the Triton kernels cannot be imported, so PyTorch computes instead, with the same "
            f"results but slower. {type(error).__name__}: {str(error).strip()[:500]}. Install the "
            "Triton that belongs to your version of PyTorch: `pip install triton` (Windows: "
            "`triton-windows`; ROCm: the one that PyTorch's index lists beside it). "
            "CYCLIP_LOSS_IMPL=eager chooses PyTorch without this warning",
            every_rank=True,
        )
        return False
    return True


def verified(features: Tensor) -> VerifiedKernels:
    """The engine for such features, which remembers the layouts that it compared.

    A wrong layout switches the kernels off for the features' device, dtype and precision.
    """
    import cyclip_loss.kernels as kernels

    precision = kernels.configs.precision_of(features)
    return _verified(features.device, features.dtype, precision)


@lru_cache
def _verified(device: torch.device, dtype: torch.dtype, _: Any) -> VerifiedKernels:
    import cyclip_loss.kernels as kernels

    return VerifiedKernels(kernels, eager, device, dtype)
