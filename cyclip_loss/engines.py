"""Which engine computes.

There are two engines, modules with the same functions: `eager.py` and, on CUDA and ROCm, the Triton
kernels. Before "auto" uses the kernels, they are compared with PyTorch once.
"""

import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map

from cyclip_loss import eager
from cyclip_loss.checks import warn_once
from cyclip_loss.numerics import Logits, Lse, architecture, float32_is_exact, triton_version
from cyclip_loss.operators import is_capturing
from cyclip_loss.options import IMPLS

# Rows, columns and features of the batch on which the kernels are compared with PyTorch.
CHECK_SIZES = (600, 700, 200)


def engine(impl: str, features: Tensor) -> ModuleType:
    """The module that computes: the one `impl` names; for "auto", the kernels where they work.

    The eager engine always computes float64, which the kernels do not support, and a rank without
    rows, for which no kernel can be launched.

    Raises:
        ValueError: the kernels were asked for and do not run on the features' device, or
            CYCLIP_LOSS_IMPL is not one of `IMPLS`.
    """
    if impl == "auto":
        impl = os.environ.get("CYCLIP_LOSS_IMPL") or "auto"
        if impl not in IMPLS:
            raise ValueError(f"CYCLIP_LOSS_IMPL must be one of {', '.join(IMPLS)}, got {impl!r}")
    if impl == "eager" or features.dtype == torch.float64 or features.shape[0] == 0:
        return eager
    has_kernels = architecture(features.device) is not None
    if impl == "auto":
        exact = features.dtype == torch.float32 and float32_is_exact()
        if not has_kernels or not (
            is_capturing(features) or _kernels_work(features.device, features.dtype, exact)
        ):
            return eager
    elif features.is_cuda and not has_kernels:
        # The kernels might compile nevertheless, and give wrong results.
        raise ValueError(
            f"impl='triton': the kernels do not support {features.device} (they need Triton, and "
            "NVIDIA Ampere or newer, Blackwell with Triton 3.9 or newer, or AMD gfx942)"
        )
    from cyclip_loss import kernels

    if impl == "triton" and not (features.is_cuda or kernels.INTERPRETED):
        raise ValueError(
            f"impl='triton' needs features on a CUDA or ROCm device, got {features.device} "
            "(TRITON_INTERPRET=1 runs the kernels on CPU, for tests)"
        )
    return kernels


@lru_cache
def _kernels_work(device: torch.device, dtype: torch.dtype, exact: bool) -> bool:
    """Whether the kernels agree with PyTorch; checked once per device, dtype and precision.

    exact: whether float32 products are full, not tf32. Warns if the kernels fail or disagree.
    """
    try:
        from cyclip_loss import kernels

        # The caller's autocast, inference mode, default device and other modes are its thread's. So
        # they do not reach this thread.
        with ThreadPoolExecutor(1) as thread:
            problem = thread.submit(_compare, kernels, device, dtype, exact).result()
    except Exception as error:
        problem = f"{type(error).__name__}: {str(error).strip()[:500]}"
        try:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        except RuntimeError:
            raise RuntimeError(
                f"the Triton kernels of cyclip_loss left {device} unusable; restart with the "
                "environment variable CYCLIP_LOSS_IMPL=eager, which disables them"
            ) from error
    if problem is None:
        return True
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    warn_once(
        f"kernels: {device}, {dtype}, {exact}",
        f"the Triton kernels do not work on {device} ({name}, PyTorch {torch.__version__}, Triton "
        f"{'.'.join(map(str, triton_version()))}); PyTorch computes {dtype} instead, with the "
        f"same results but slower. {problem}",
    )
    return False


def _compare(*arguments: Any) -> str | None:
    """`disagreement`, whatever the process says of warnings and of deterministic algorithms."""
    mode = torch.get_deterministic_debug_mode()
    # Products would raise in this mode, unless an environment variable is set.
    torch.set_deterministic_debug_mode("default")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they may be errors
            return disagreement(*arguments)
    finally:
        torch.set_deterministic_debug_mode(mode)


@torch.no_grad()
def disagreement(compute: Any, device: torch.device, dtype: torch.dtype, exact: bool) -> str | None:
    """Which results of an engine are off by more than rounding, against eager float64; or None.

    Every function gets the same small batch: n != m, several tiles in each direction, sizes that
    are no multiple of a tile, some pairs nearly aligned. exact: as in `_kernels_work`.
    """
    rows, columns, d = CHECK_SIZES
    first, last = (columns - rows) // 2, (columns + rows) // 2
    # A generator of its own: the user's random numbers stay as they are.
    generator = torch.Generator("cpu").manual_seed(0)
    noise = torch.randn(rows + columns, d, generator=generator, dtype=torch.float64, device="cpu")
    image, text = F.normalize(noise, dim=1).tensor_split((rows,))
    text[first:last:5] = F.normalize(image[::5] + 0.01 * text[first:last:5])
    image, text = (x.to(dtype).to(device).double() for x in (image, text))
    scale, grad = image.new_tensor(20.0), image.new_tensor(1.5)
    bound = 2.0**-14 if dtype == torch.float32 and exact else 2.0**-6
    problems = []

    def narrow(argument: Any) -> Any:
        if isinstance(argument, Tensor) and argument.is_floating_point():
            return argument.to(dtype if argument.ndim == 2 else torch.float32)  # 2: features
        return argument

    def check(name: str, *arguments: Any) -> Any:
        """Compare a function of the engine with the eager one; return the exact results."""
        expected = exact_results = getattr(eager, name)(*arguments)
        results = getattr(compute, name)(*tree_map(narrow, arguments))
        if isinstance(results, Tensor):
            results, expected = [results], [expected]
        for at, (x, y) in enumerate(zip(results, expected, strict=True)):
            error = ((x - y).abs().max() / y.abs().max()).item()
            if x.shape != y.shape or not error <= bound:
                problems.append(f"result {at} of {name} is off by {error:.2g} of its largest value")
        return exact_results

    same = torch.arange(rows + columns, device=device).remainder(50).tensor_split((rows,))
    # Plain; then with ids and extra negatives, which only the last rows and columns are.
    for ids, pairs, forms in (((None, None), rows, (False, True)), (same, rows - 50, (True,))):
        logits = Logits(image, text, scale, ids[0], ids[1], first, pairs=pairs)
        negatives = check("contrastive_lse", logits)
        column_pairs = negatives[1] - 1  # every column has a pair, as across ranks
        column_pairs[first:last] = negatives[2]
        _, *lse = check("pair_terms", *negatives, column_pairs, first, 1 / rows)
        for wide in forms:
            check("contrastive_grads", logits, Lse(*lse), grad, 1 / rows, [True] * 3, wide)
    text = text[first:last]
    for with_cross in (False, True):
        weights = [scale.cpu() / rows, scale.cpu() / (rows << with_cross)]  # equal without C
        grads = [grad, 2 * grad] if with_cross else [grad]
        grams = check("cyclic_statistics", image, text, with_cross)
        check("cyclic_terms", grams, weights, with_cross)
        check("cyclic_grads", image, text, grams, grads, weights, 2, [True, True])
    return "; ".join(problems) or None
