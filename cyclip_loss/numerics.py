"""What all parts share: dtypes, autocast, matrix products, strips; which GPUs have kernels."""

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache, reduce
from math import gcd
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves

# Elements of one strip. On a CPU, 2^20 float32 are 4 MB: with fewer, the products of a strip have
# too few rows for two threads. Other devices need 2^26 elements to be busy.
STRIP_ELEMENTS = {"cpu": 2**20}
STRIP_ELEMENTS_OTHER_DEVICES = 2**26
# With fewer rows a matrix product is not efficient, however wide the strip. Up to 256 rows may take
# 2^23 elements.
MIN_STRIP_ROWS, FULL_SPEED_ROWS, FULL_SPEED_ELEMENTS = 64, 256, 2**23

# Tile sizes depend on the largest power of two, at most this, that divides D.
MAX_DIVISOR = 128

# Before 3.9, Triton does not compile the kernels for sm_100, or leaves their products out.
TRITON_FOR_BLACKWELL = (3, 9)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums, log-sum-exps and losses for features of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def autocast_is_on(device_type: str) -> bool:
    """Whether autocast is on; False for "meta", which has no autocast."""
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def without_autocast(features: Tensor) -> AbstractContextManager[Any]:
    """Switch autocast off for the features' device; costs nothing where it is off already."""
    device_type = features.device.type
    if autocast_is_on(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def is_traced(features: Tensor) -> bool:
    """Whether torch.compile or torch.export records the call, or the features are of a tensor type
    with a dispatch of its own, such as fake tensors.
    """
    dispatch = type(features).__torch_dispatch__
    return torch.compiler.is_compiling() or dispatch is not Tensor.__torch_dispatch__


def tensors_of(tree: Any) -> list[Tensor]:
    """All tensors in tuples, lists and records, in order."""
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]


def divisor_of(d: int) -> int:
    """The largest power of two, at most 128, that divides D. All D that share it share kernels."""
    return gcd(d, MAX_DIVISOR)


def float32_is_exact() -> bool:
    """Whether PyTorch's settings ask for full float32 products, not tf32."""
    matmul = torch.backends.cuda.matmul
    if hasattr(matmul, "fp32_precision"):  # since PyTorch 2.9; the older name sets it, too
        return matmul.fp32_precision not in ("tf32", "bf16")
    return torch.get_float32_matmul_precision() == "highest"


def softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)), which rounds to x above the threshold of the dtype.

    A higher threshold would need smaller upstream gradients: backward multiplies them by exp(x).
    """
    return F.softplus(x, threshold=40.0 if x.dtype == torch.float64 else 20.0)


# Makes the features' GPU the current one, which Triton launches on and NCCL sends from.
on_device_of: Any = torch.cuda.device_of


def is_capturing(features: Tensor) -> bool:
    """Whether a CUDA graph is being captured, in which nothing may wait for the device."""
    return features.is_cuda and torch.cuda.is_current_stream_capturing()


def rows_per_strip(row_length: int, device: torch.device) -> int:
    """The number of rows, of `row_length` elements each, in one strip."""
    elements = STRIP_ELEMENTS.get(device.type, STRIP_ELEMENTS_OTHER_DEVICES)
    fast = min(FULL_SPEED_ROWS, FULL_SPEED_ELEMENTS // row_length)
    return max(MIN_STRIP_ROWS, elements // row_length, fast)


def float16_shift(features: Tensor) -> int:
    """The power of 2 by which G is multiplied before it is rounded to the dtype of the features.

    float16 keeps 11 bits only above 6e-5, and most of G is smaller. So 2^14 G is rounded, whose
    largest possible element, 2^15, still fits.
    """
    return 14 if features.dtype == torch.float16 else 0


def has_wide_products(features: Tensor) -> bool:
    """Whether PyTorch multiplies 16-bit matrices of this dtype and device into a float32 one.

    On a CPU they are widened instead, which keeps all digits of G.
    """
    if features.dtype.itemsize != 2 or features.is_cpu:
        return False
    # With float16 accumulation PyTorch refuses a float32 result.
    setting = torch.backends.cuda.matmul.allow_fp16_accumulation
    return _try_wide_products(features.device, features.dtype, setting)


@lru_cache
def _try_wide_products(device: torch.device, dtype: torch.dtype, _: Any) -> bool:
    """Whether a small float32 product of 16-bit matrices works."""
    a = torch.ones(16, 16, dtype=dtype, device=device)
    options: Any = {"out_dtype": torch.float32}
    try:
        product = torch.mm(a, a, **options)
        torch.mm(a, a, **options, out=product)
    except RuntimeError:
        return False
    return True


def matmul(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a b. dtype: the result's; if it is wider than a's, also the sums'."""
    if dtype != a.dtype and has_wide_products(a):
        return torch.mm(a, b, out_dtype=dtype)
    return torch.matmul(a.to(dtype), b.to(dtype))


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b, summed in total's dtype: the accumulation dtype of a."""
    if has_wide_products(a):
        total += matmul(a, b, total.dtype)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))


def sum_of_rows(features: Tensor) -> Tensor:
    """The sum over the rows, (D,), in the accumulation dtype.

    In strips, because a CPU widens 16-bit rows before it adds them. Compiled code widens none.
    """
    (_, d), dtype = features.shape, accumulation_dtype(features.dtype)
    strips = [features]
    if not is_traced(features):
        strips = [*torch.split(features, rows_per_strip(d, features.device))]
    return reduce(torch.add, [x.sum(dim=0, dtype=dtype) for x in strips])


@lru_cache
def architecture(device: torch.device) -> str | None:
    """The name of the tile table used for a device; None if the kernels do not support it.

    They need Ampere or newer, and Blackwell needs a newer Triton. All of the sm_100 family take
    sm_100's table, and other devices without one sm_86's.
    """
    if device.type != "cuda":
        return None
    if torch.version.hip is not None:  # only gfx942 has the tf32 products that the kernels use
        name = torch.cuda.get_device_properties(device).gcnArchName
        return "gfx942" if name.startswith("gfx942") else None
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8 or (major >= 10 and triton_version() < TRITON_FOR_BLACKWELL):
        return None
    if major == 10:
        return "sm_100"
    name = f"sm_{major}{minor}"
    return name if name in ("sm_80", "sm_89", "sm_90", "sm_120") else "sm_86"


def triton_version() -> tuple[int, ...]:
    """Major and minor version. Without a Triton that works, the one that Blackwell needs."""
    try:
        import triton
    except Exception:  # whoever imports the kernels hears what is wrong
        return TRITON_FOR_BLACKWELL
    return tuple(int(part) for part in triton.__version__.split(".")[:2])
