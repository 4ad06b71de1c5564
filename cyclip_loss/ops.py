"""The custom operators: four names that autograd calls, each computed by one of two engines.

(Four more, in `exchange.py`, are made of these and of collectives.)

The engines are `eager.py` and, on CUDA and ROCm, the Triton kernels; both have a function of each
operator's name, with the arguments of the signatures below less the last. To `torch.compile` an
operator is opaque but for the shapes given here. None has a derivative of its own: the autograd of
the loss is in `contrastive.py` and `cyclic.py`.
"""

from collections.abc import Callable
from functools import lru_cache
from importlib import metadata
from importlib.util import find_spec
from types import ModuleType
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.library import custom_op

from cyclip_loss import eager

IMPLS = ("auto", "triton", "eager", "reference")
# Before Triton 3.9 the kernels do not compile for sm_100, or come out without their products.
TRITON_FOR_BLACKWELL = (3, 9)


def _engine(impl: str, features: Tensor) -> ModuleType:
    """The module that computes: what `impl` names, or the fastest for the features' device.

    float64 is always computed by the eager engine: GPUs have no use for it here but in tests.
    """
    if impl == "eager" or features.dtype == torch.float64:
        return eager
    if impl == "triton" or (features.is_cuda and _has_kernels(features.device)):
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
    """Major and minor; without importing Triton."""
    return tuple(int(part) for part in metadata.version("triton").split(".")[:2])


class Operator:
    """One operator: `custom_op` where it is traced, and a shorter way for all else.

    Four calls through the dispatcher were a tenth of the loss at N = 128, D = 512 on CPU.
    Tracing needs them (`torch.compile`, `torch.export`, fake tensors), and so does grad mode, in
    which they refuse second derivatives; an ordinary forward and backward pass needs neither.

    compute: if not given, the function of this name of the engine that the last argument chooses.
    """

    def __init__(
        self, name: str, signature: str, compute: Callable[..., Any] | None = None
    ) -> None:
        self.name = name
        self._compute = compute or self._compute_by_engine
        self.custom_op: Any = custom_op(
            f"cyclip_loss::{name}", self._compute, mutates_args=(), schema=signature
        )

    def __call__(self, *arguments: Any) -> Any:
        """Arguments as in the signature, by position."""
        if (
            torch.compiler.is_compiling()
            or torch.is_grad_enabled()
            or any(isinstance(a, Tensor) and type(a) is not Tensor for a in arguments)
        ):
            return self.custom_op(*arguments)
        return self._compute(*arguments)

    def _compute_by_engine(self, *arguments: Any) -> Any:
        *arguments_of_engine, impl = arguments
        features = arguments[0]
        compute = getattr(_engine(impl, features), self.name)
        device_type = features.device.type
        if not torch.is_autocast_enabled(device_type):
            return compute(*arguments_of_engine)
        # The features have the autocast dtype already; logits, sums and gradients must not get it.
        with torch.autocast(device_type, enabled=False):
            return compute(*arguments_of_engine)


contrastive_lse = Operator(
    "contrastive_lse",
    "(Tensor image_features, Tensor text_features, Tensor logit_scale, SymInt first_column, "
    "bool symmetric, str impl) -> (Tensor, Tensor, Tensor)",
)
contrastive_grads = Operator(
    "contrastive_grads",
    "(Tensor image_features, Tensor text_features, Tensor logit_scale, Tensor row_lse, "
    "Tensor column_lse, Tensor pair_gradient, Tensor weight, SymInt first_column, "
    "bool symmetric, bool needs_image, bool needs_text, bool needs_scale, bool wide, str impl) "
    "-> (Tensor, Tensor, Tensor)",
)
cyclic_statistics = Operator(
    "cyclic_statistics",
    "(Tensor image_features, Tensor text_features, bool direct, bool with_cross, str impl) "
    "-> Tensor",
)
cyclic_grads = Operator(
    "cyclic_grads",
    "(Tensor image_features, Tensor text_features, Tensor statistics, Tensor coefficients, "
    "bool direct, bool with_cross, bool needs_image, bool needs_text, str impl) "
    "-> (Tensor, Tensor)",
)


def _contrastive_lse_shapes(
    image: Tensor, text: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor]:
    _, _, symmetric, _ = arguments
    # shape[0], not len: len would fix a symbolic size, and every N would compile anew.
    dtype = eager.accumulation_dtype(image.dtype)
    rows = image.new_empty(image.shape[0], dtype=dtype)
    columns = image.new_empty(text.shape[0] if symmetric else 0, dtype=dtype)
    return rows, columns, torch.empty_like(rows)


def _contrastive_grads_shapes(
    image: Tensor, text: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor]:
    row_lse, needs_image, needs_text, wide = arguments[1], *arguments[7:9], arguments[10]
    dtype = row_lse.dtype if wide else image.dtype
    return (
        _like(image, needs_image).to(dtype),
        _like(text, needs_text).to(dtype),
        row_lse.new_empty(()),
    )


def _cyclic_statistics_shapes(
    image: Tensor, text: Tensor, direct: bool, with_cross: bool, impl: str
) -> Tensor:
    n, d = image.shape
    shape = (n, n) if direct else (3 if with_cross else 2, d, d)
    return image.new_empty(shape, dtype=eager.accumulation_dtype(image.dtype))


def _cyclic_grads_shapes(image: Tensor, text: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    needs_image, needs_text = arguments[4:6]
    return _like(image, needs_image), _like(text, needs_text)


contrastive_lse.custom_op.register_fake(_contrastive_lse_shapes)
contrastive_grads.custom_op.register_fake(_contrastive_grads_shapes)
cyclic_statistics.custom_op.register_fake(_cyclic_statistics_shapes)
cyclic_grads.custom_op.register_fake(_cyclic_grads_shapes)


def _like(features: Tensor, needed: bool) -> Tensor:
    return features.new_empty(features.shape if needed else (0,))


def no_second_derivatives(ctx: Any, *grads: Tensor) -> NoReturn:
    """The derivative of an operator that gives gradients: an error."""
    raise RuntimeError(
        "cyclip_loss has first derivatives only: its gradients cannot be differentiated again "
        "(as a gradient penalty or create_graph=True with a second backward would)"
    )


# Without these a second backward through the gradients would silently leave the loss out.
contrastive_grads.custom_op.register_autograd(no_second_derivatives)
cyclic_grads.custom_op.register_autograd(no_second_derivatives)
