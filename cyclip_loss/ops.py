"""What makes a function an operator of `torch.ops.cyclip_loss`, and which engine computes.

There are four: `contrastive_lse` and `contrastive_grads` in `exchange.py`, `cyclic_statistics` and
`cyclic_grads` in `cyclic.py`. To `torch.compile` they are opaque but for the shapes of their
results, and they have no derivatives: the autograd of the loss is in `contrastive.py` and
`cyclic.py`.

The engines that they call are `eager.py` and, on CUDA and ROCm, the Triton kernels: two modules
with the same functions.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache, wraps
from importlib import metadata
from importlib.util import find_spec
from types import ModuleType
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor
from torch.library import custom_op

from cyclip_loss import eager

IMPLS = ("auto", "triton", "eager")
# Before Triton 3.9 the kernels do not compile for sm_100, or come out without their products.
TRITON_FOR_BLACKWELL = (3, 9)

_Function = TypeVar("_Function", bound=Callable[..., Any])


def engine(impl: str, features: Tensor) -> ModuleType:
    """The module that computes: what `impl` names, or the fastest for the features' device.

    float64 is always computed by the eager engine: GPUs have no use for it here but in tests. So is
    what a rank without rows has to contribute: no kernel can be launched for nothing.

    Raises:
        ValueError: the kernels were asked for, and do not run on the features' device.
    """
    if impl == "eager" or features.dtype == torch.float64 or features.shape[0] == 0:
        return eager
    has_kernels = features.is_cuda and _has_kernels(features.device)
    if impl == "triton" or has_kernels:
        # Elsewhere they might compile all the same, and be wrong.
        if features.is_cuda and not has_kernels:
            raise ValueError(
                f"impl='triton': the kernels are not for {features.device} (they need NVIDIA's "
                "Ampere, Hopper, or with Triton 3.9 Blackwell, or AMD's gfx942, and Triton)"
            )
        from cyclip_loss import kernels

        if not (features.is_cuda or kernels.INTERPRETED):
            raise ValueError(
                f"impl='triton' needs features on a CUDA or ROCm device, got {features.device} "
                "(TRITON_INTERPRET=1 runs the kernels on CPU, for tests)"
            )
        return kernels
    return eager


@lru_cache
def _has_kernels(device: torch.device) -> bool:
    """Whether Triton is there and the device has what the kernels need (NVIDIA: Ampere, 2020).

    On Blackwell (2024) they need a newer Triton than elsewhere.
    """
    if find_spec("triton") is None:
        return False
    if torch.version.hip is not None:  # only gfx942 has the tf32 products that the kernels use
        return torch.cuda.get_device_properties(device).gcnArchName.startswith("gfx942")
    capability = torch.cuda.get_device_capability(device)
    if capability >= (10, 0) and triton_version() < TRITON_FOR_BLACKWELL:
        return False
    return capability >= (8, 0)


def triton_version() -> tuple[int, ...]:
    """Major and minor; without importing Triton. (0, 0): there is none.

    PyTorch's own index calls the distribution `pytorch-triton`, or `pytorch-triton-rocm`.
    """
    for name in ("triton", "pytorch-triton", "pytorch-triton-rocm"):
        try:
            return tuple(int(part) for part in metadata.version(name).split(".")[:2])
        except metadata.PackageNotFoundError:
            continue
    return (0, 0)


def operator(
    shapes: Callable[..., Any], gives_gradients: bool = False
) -> Callable[[_Function], _Function]:
    """Make a function the operator `cyclip_loss::<its name>`; its annotations are the schema.

    The first argument is a tensor. The function is called by position, with autocast off: the
    features have the autocast dtype already, logits, sums and gradients must not get it.

    A call goes through PyTorch's dispatcher where something is traced (`torch.compile`,
    `torch.export`, fake tensors) and in grad mode, in which it refuses second derivatives. An
    ordinary forward and backward pass needs neither and calls the function itself: the dispatcher
    takes ten times as long (18 and 1.8 microseconds a call).

    Args:
        shapes: takes what the function takes; returns tensors like its results, of any values.
        gives_gradients: a derivative of the results would be a second derivative of the loss, and
            is an error. Without it a second backward pass would silently leave the loss out.
    """

    def declare(function: _Function) -> _Function:
        @wraps(function)
        def compute(*arguments: Any) -> Any:
            with without_autocast(arguments[0]):
                return function(*arguments)

        traced: Any = custom_op(f"cyclip_loss::{function.__name__}", compute, mutates_args=())
        traced.register_fake(shapes)
        if gives_gradients:
            traced.register_autograd(no_second_derivatives)

        @wraps(function)
        def call(*arguments: Any) -> Any:
            tensors = (a for a in arguments if isinstance(a, Tensor))
            if torch.is_grad_enabled() or is_traced(*tensors):
                return traced(*arguments)
            return compute(*arguments)

        return call  # type: ignore[return-value]

    return declare


def is_traced(*tensors: Tensor) -> bool:
    """Whether what is done to these is recorded rather than done, as by `torch.compile`.

    So may be what is done to subclasses, as fake tensors are; parameters are ordinary ones.
    """
    ordinary = (Tensor, torch.nn.Parameter)
    return torch.compiler.is_compiling() or any(type(x) not in ordinary for x in tensors)


def autocast_is_on(device_type: str) -> bool:
    """Whether it is, also for devices that have none, as "meta"."""
    # PyTorch 2.8 can't trace the first question, and "meta" is not compiled for.
    has_one = torch.compiler.is_compiling() or torch.amp.is_autocast_available(device_type)
    return has_one and torch.is_autocast_enabled(device_type)


def without_autocast(features: Tensor) -> AbstractContextManager[Any]:
    """Switches autocast off for the features' device; costs nothing where it is off already."""
    device_type = features.device.type
    if autocast_is_on(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def like(features: Tensor, needed: bool) -> Tensor:
    """A gradient's shape and dtype; nothing where it is not needed."""
    return features.new_empty(features.shape if needed else (0,))


def no_second_derivatives(ctx: Any, *grads: Tensor) -> NoReturn:
    """The derivative of what gives gradients: an error."""
    raise RuntimeError(
        "cyclip_loss has first derivatives only: its gradients cannot be differentiated again "
        "(as a gradient penalty or create_graph=True with a second backward would). "
        "cyclip_loss.reference.cyclip_loss has all derivatives, and N x N matrices"
    )
