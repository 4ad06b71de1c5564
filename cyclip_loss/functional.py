"""The loss as functions: checks the inputs, applies autocast, adds the terms.

Common to all of them:

    image_features, text_features
        (N, D), N >= 1, D >= 1, of one floating dtype (float64, float32, bfloat16 or float16) on one
        device, in any strides, row i of one paired with row i of the other. The formulas take rows
        of unit length, as OpenCLIP's models return them; nothing is normalised here.
    logit_scale
        scalar (one element), already exponentiated; a tensor gets its gradient.
    lambda_inmodal, lambda_crossmodal
        weights of the penalties, 0.25 each in the paper. 0 switches a penalty off; both 0 is CLIP.
    reference_batch_size
        multiplies both penalties by reference_batch_size / N, so that a lambda means the same at
        every N: with 128 what it means at the paper's own batch size. None: the paper's formula.
        Not given: the same, and a `CyCLIPWarning`, once in a process, where the larger lambda times
        N is more than 8 times the paper's 0.25 * 128 (not while `torch.compile` traces).
    output_dict
        return the terms, each already weighted, instead of their sum.
    process_group, distributed, dist_impl, uneven
        as in `cyclip_loss.CyCLIPLoss`. Over ranks (torch.distributed initialised, more than one
        process) N counts the rows of all of them, and every rank has to make the call.
    impl
        "auto", the fastest engine for the features' device; "triton", the kernels for CUDA and
        ROCm; or "eager", PyTorch in bounded memory.

Results are scalars of float32 (float64 for float64 features), or a dict of such, NaN if a feature
is NaN or infinite. Under `torch.autocast` the features are cast to the autocast dtype (float64 ones
excepted, as autocast does); logits and sums are not. First derivatives only:
`cyclip_loss.reference` has all of them.

All raise TypeError where an argument is no tensor or number, or has a dtype that is not supported,
and ValueError where shapes or devices do not fit, within a rank or between ranks, a batch is empty,
a lambda is negative, `reference_batch_size` is below 1, an option is unknown, or the process group
cannot be used; RuntimeError inside of a `torch.func` transform.
"""

import math
from collections.abc import Hashable
from numbers import Integral, Real
from typing import TYPE_CHECKING, Literal, TypedDict, overload

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from cyclip_loss import contrastive, cyclic, small, warn
from cyclip_loss.distributed import Ranks, agree, check_dist_impl, group_of, start_gather
from cyclip_loss.eager import accumulation_dtype
from cyclip_loss.ops import IMPLS, autocast_is_on
from cyclip_loss.warn import NOT_GIVEN, NotGiven

if TYPE_CHECKING:
    from typing_extensions import Unpack

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class _PenaltyOptions(TypedDict, total=False):
    """For type checkers: what `cyclic_penalty` takes by keyword only."""

    reference_batch_size: int | NotGiven | None
    process_group: ProcessGroup | DeviceMesh | None
    distributed: bool
    impl: str


class _LossOptions(_PenaltyOptions, total=False):
    """For type checkers: what `cyclip_loss` takes by keyword only."""

    lambda_inmodal: float
    lambda_crossmodal: float
    augmented_image_features: Tensor | None
    augmented_text_features: Tensor | None
    dist_impl: str
    uneven: bool


@overload
def cyclic_penalty(
    image_features: Tensor,
    text_features: Tensor,
    lambda_inmodal: float = 0.25,
    lambda_crossmodal: float = 0.25,
    output_dict: Literal[False] = False,
    **options: "Unpack[_PenaltyOptions]",
) -> Tensor: ...
@overload
def cyclic_penalty(
    image_features: Tensor,
    text_features: Tensor,
    lambda_inmodal: float = 0.25,
    lambda_crossmodal: float = 0.25,
    output_dict: Literal[True] = ...,
    **options: "Unpack[_PenaltyOptions]",
) -> dict[str, Tensor]: ...
@overload
def cyclic_penalty(
    image_features: Tensor,
    text_features: Tensor,
    lambda_inmodal: float = 0.25,
    lambda_crossmodal: float = 0.25,
    output_dict: bool = ...,
    **options: "Unpack[_PenaltyOptions]",
) -> Tensor | dict[str, Tensor]: ...
def cyclic_penalty(
    image_features: Tensor,
    text_features: Tensor,
    lambda_inmodal: float = 0.25,
    lambda_crossmodal: float = 0.25,
    output_dict: bool = False,
    *,
    reference_batch_size: int | NotGiven | None = NOT_GIVEN,
    process_group: ProcessGroup | DeviceMesh | None = None,
    distributed: bool = True,
    impl: str = "auto",
) -> Tensor | dict[str, Tensor]:
    """lambda_inmodal * P_in + lambda_crossmodal * P_cross (Goel et al. 2022, eq. 2 and 3).

    Takes O(N D^2) flops and O(N D + D^2) memory; independent of any logit scale. Over ranks, which
    may hold any numbers of rows, no feature travels: there is one all-reduce of 3 D^2 + 1 elements,
    and none in backward. Then N, for the warning, is W times this rank's rows.

    Returns a scalar or, with `output_dict`, `inmodal_cyclic_loss` and `crossmodal_cyclic_loss`.
    """
    check_impl(impl)
    check_lambdas(lambda_inmodal, lambda_crossmodal)
    reference = check_reference_batch_size(reference_batch_size)
    ranks = Ranks(group_of(process_group) if distributed else None)
    image_features, text_features = check_features(
        image_features, text_features, may_be_empty=ranks.size > 1
    )
    penalty = (image_features, text_features, lambda_inmodal, lambda_crossmodal)
    if reference_batch_size == NOT_GIVEN:
        n = ranks.total(image_features.shape[0])
        warn.of_strong_penalties(max(lambda_inmodal, lambda_crossmodal), n)
    if ranks.group is None and small.penalties_are_small(*penalty, output_dict, impl):
        terms = small.cyclic_penalties(*penalty, output_dict, reference)
    else:
        started = cyclic.start_penalties(*penalty, impl, ranks)
        terms = cyclic.cyclic_penalties(*penalty, output_dict, impl, started, ranks.size, reference)
    if output_dict:
        return {"inmodal_cyclic_loss": terms[0], "crossmodal_cyclic_loss": terms[1]}
    return terms[0]


@overload
def cyclip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | None = None,
    output_dict: Literal[False] = False,
    **options: "Unpack[_LossOptions]",
) -> Tensor: ...
@overload
def cyclip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | None = None,
    output_dict: Literal[True] = ...,
    **options: "Unpack[_LossOptions]",
) -> dict[str, Tensor]: ...
@overload
def cyclip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | None = None,
    output_dict: bool = ...,
    **options: "Unpack[_LossOptions]",
) -> Tensor | dict[str, Tensor]: ...
def cyclip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | None = None,
    output_dict: bool = False,
    *,
    lambda_inmodal: float = 0.25,
    lambda_crossmodal: float = 0.25,
    reference_batch_size: int | NotGiven | None = NOT_GIVEN,
    augmented_image_features: Tensor | None = None,
    augmented_text_features: Tensor | None = None,
    process_group: ProcessGroup | DeviceMesh | None = None,
    distributed: bool = True,
    dist_impl: str = "gather",
    uneven: bool = False,
    impl: str = "auto",
) -> Tensor | dict[str, Tensor]:
    """The CyCLIP loss: contrastive + lambda_inmodal * P_in + lambda_crossmodal * P_cross.

    logit_bias: shifts every logit alike, so it changes nothing; its gradient is zero.

    augmented_image_features, augmented_text_features: (N, D), features of a second, augmented view
    of the same pairs; both or neither. The contrastive term is then the mean of the cross-modal
    loss and the in-modal one, in which each row has to find its own augmented view (the `--inmodal`
    option of the authors' code).

    Returns a scalar or, with `output_dict`, `contrastive_loss`, `inmodal_cyclic_loss` and
    `crossmodal_cyclic_loss`.
    """
    check_impl(impl)
    check_lambdas(lambda_inmodal, lambda_crossmodal)
    reference = check_reference_batch_size(reference_batch_size)
    check_dist_impl(dist_impl)
    group = group_of(process_group) if distributed else None
    image_features, text_features = check_features(
        image_features, text_features, may_be_empty=group is not None
    )
    scale = _check_logit_scale(logit_scale, image_features)
    # Rows and columns of each contrastive loss, the cross-modal one first.
    pairs = [(image_features, text_features)]
    if augmented_image_features is not None or augmented_text_features is not None:
        pairs += _augmented_pairs(
            *pairs[0], augmented_image_features, augmented_text_features, group is not None
        )
    penalty = (image_features, text_features, lambda_inmodal, lambda_crossmodal)
    ranks = Ranks()
    if group is not None:
        ranks = agree(
            group,
            dist_impl,
            image_features,
            uneven,
            _kind(pairs, lambda_inmodal, lambda_crossmodal),
            {
                "lambda_inmodal": lambda_inmodal,
                "lambda_crossmodal": lambda_crossmodal,
                "reference_batch_size": reference,
            },
        )
    if reference_batch_size == NOT_GIVEN:
        n = ranks.total(image_features.shape[0])
        warn.of_strong_penalties(max(lambda_inmodal, lambda_crossmodal), n)
    if group is None and len(pairs) == 1 and small.loss_is_small(*pairs[0], impl):
        terms = small.cyclip_terms(
            *pairs[0], scale, lambda_inmodal, lambda_crossmodal, output_dict, reference
        )
        loss, penalties = terms[0], terms[1:]
    else:
        # Over ranks the columns are on their way while the Gram matrices are computed, and those
        # while the contrastive losses are.
        gathered = [start_gather(columns, ranks) for _, columns in pairs]
        started = cyclic.start_penalties(*penalty, impl, ranks)
        losses = [
            contrastive.contrastive_loss(*pair, scale, gathered.pop(0), at == 0, impl, ranks)
            for at, pair in enumerate(pairs)
        ]
        penalties = cyclic.cyclic_penalties(
            *penalty, output_dict, impl, started, ranks.size, reference
        )
        loss = losses[0]
        if len(losses) > 1:
            loss = (loss + (losses[1] + losses[2]) / 2) / 2
    if logit_bias is not None:
        loss = loss + _zero_of_bias(logit_bias, loss)
    if output_dict:
        return {
            "contrastive_loss": loss,
            "inmodal_cyclic_loss": penalties[0],
            "crossmodal_cyclic_loss": penalties[1],
        }
    return sum(penalties, loss)


def _kind(
    pairs: list[tuple[Tensor, Tensor]], lambda_inmodal: float, lambda_crossmodal: float
) -> dict[str, Hashable]:
    """What decides which collectives run, by the name that an error would call it."""
    features = pairs[0][0]
    names = ("text_features", "augmented_image_features", "augmented_text_features")
    trained = [
        names[i]
        for i, (_, columns) in enumerate(pairs)
        if torch.is_grad_enabled() and columns.requires_grad
    ]
    return {
        "D": features.shape[1],
        "dtype": features.dtype,
        "the device type": features.device.type,
        "whether a penalty has a weight": lambda_inmodal > 0 or lambda_crossmodal > 0,
        "whether augmented features are given": len(pairs) > 1,
        # Their gradients are summed over ranks.
        "which of the text and augmented features require a gradient": ", ".join(trained),
    }


def check_lambdas(lambda_inmodal: float, lambda_crossmodal: float) -> None:
    """Raise unless both are finite numbers >= 0."""
    check_lambda("lambda_inmodal", lambda_inmodal)
    check_lambda("lambda_crossmodal", lambda_crossmodal)


def check_lambda(name: str, value: float) -> None:
    """Raise unless it is a finite number >= 0.

    A bool is refused by name: `ClipLoss(False, True)` passes `local_loss` and `gather_with_grad` by
    position, which must not turn into weights.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number >= 0, got {value!r}")
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} must be finite and >= 0, got {value!r}")


def check_reference_batch_size(value: int | NotGiven | None) -> int | None:
    """The value, None if it is not given; raise unless it is that, an integer >= 1 or None."""
    if value is None or value == NOT_GIVEN:
        return None
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"reference_batch_size must be an integer >= 1 or None, got {value!r}")
    if value < 1:
        raise ValueError(f"reference_batch_size must be >= 1, got {value}")
    return value


def check_impl(impl: str) -> None:
    """Raise unless `impl` names an implementation."""
    if impl not in IMPLS:
        hint = ": call cyclip_loss.reference.cyclip_loss instead" if impl == "reference" else ""
        raise ValueError(f"impl must be one of {', '.join(IMPLS)}, got {impl!r}{hint}")


def check_features(
    first: Tensor,
    second: Tensor,
    first_name: str = "image_features",
    second_name: str = "text_features",
    may_be_empty: bool = False,
) -> tuple[Tensor, Tensor]:
    """The two feature tensors, cast as autocast asks, or an error that names the argument.

    may_be_empty: 0 rows are allowed, as on one of several ranks.
    """
    tracing = torch.compiler.is_compiling()
    for name, features in ((first_name, first), (second_name, second)):
        if not isinstance(features, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(features).__name__}")
        if not tracing and torch._C._functorch.is_functorch_wrapped_tensor(features):
            raise RuntimeError(
                f"{name} is inside of a torch.func transform, which cyclip_loss does not support: "
                "use loss.backward() or torch.autograd.grad. cyclip_loss.reference.cyclip_loss can "
                "be transformed, and has N x N matrices"
            )
        if features.dtype not in DTYPES:
            raise TypeError(
                f"{name} must be float64, float32, bfloat16 or float16, got {features.dtype}"
            )
        least = 0 if may_be_empty else 1
        if features.ndim != 2 or features.shape[0] < least or features.shape[1] == 0:
            raise ValueError(
                f"{name} must have shape (N, D) with N >= {least} and D >= 1, "
                f"got {tuple(features.shape)}"
            )
    if first.shape != second.shape:
        raise ValueError(
            f"{first_name} and {second_name} must have the same shape, "
            f"got {tuple(first.shape)} and {tuple(second.shape)}"
        )
    if first.device != second.device:
        raise ValueError(
            f"{first_name} and {second_name} must be on the same device, "
            f"got {first.device} and {second.device}"
        )
    first, second = _autocast(first), _autocast(second)
    if first.dtype != second.dtype:
        raise TypeError(
            f"{first_name} and {second_name} must have the same dtype, "
            f"got {first.dtype} and {second.dtype}"
        )
    return first, second


def _augmented_pairs(
    image_features: Tensor,
    text_features: Tensor,
    augmented_image_features: Tensor | None,
    augmented_text_features: Tensor | None,
    may_be_empty: bool,
) -> list[tuple[Tensor, Tensor]]:
    """Each modality's features with their augmented view, checked."""
    if augmented_image_features is None or augmented_text_features is None:
        missing = "image" if augmented_image_features is None else "text"
        raise ValueError(
            "augmented_image_features and augmented_text_features go together, "
            f"but augmented_{missing}_features is None"
        )
    return [
        check_features(features, augmented, name, f"augmented_{name}", may_be_empty)
        for features, augmented, name in (
            (image_features, augmented_image_features, "image_features"),
            (text_features, augmented_text_features, "text_features"),
        )
    ]


def _autocast(features: Tensor) -> Tensor:
    device_type = features.device.type
    if features.dtype != torch.float64 and autocast_is_on(device_type):
        return features.to(torch.get_autocast_dtype(device_type))
    return features


def _check_logit_scale(logit_scale: Tensor | float, features: Tensor) -> Tensor:
    """logit_scale as a 0-dim tensor of the accumulation dtype on the features' device."""
    dtype = accumulation_dtype(features.dtype)
    if not isinstance(logit_scale, Tensor):
        if isinstance(logit_scale, bool) or not isinstance(logit_scale, Real):
            raise TypeError(
                f"logit_scale must be a scalar tensor or a number, got {type(logit_scale).__name__}"
            )
        return features.new_full((), float(logit_scale), dtype=dtype)
    if logit_scale.numel() != 1:
        raise ValueError(f"logit_scale must have one element, got shape {tuple(logit_scale.shape)}")
    if not logit_scale.is_floating_point():
        raise TypeError(f"logit_scale must be a floating-point tensor, got {logit_scale.dtype}")
    # As in PyTorch's own arithmetic, a 0-dim CPU tensor goes with features on any device.
    if logit_scale.device != features.device and (
        logit_scale.device.type != "cpu" or logit_scale.ndim != 0
    ):
        raise ValueError(
            f"logit_scale must be on the features' device {features.device}, "
            f"got {logit_scale.device}"
        )
    return logit_scale.reshape(()).to(device=features.device, dtype=dtype)


def _zero_of_bias(logit_bias: Tensor, loss: Tensor) -> Tensor:
    """0, attached to the bias: DistributedDataParallel wants a gradient for every parameter."""
    if not isinstance(logit_bias, Tensor):
        if isinstance(logit_bias, Real) and not isinstance(logit_bias, bool):
            return torch.zeros_like(loss)
        hint = ": pass output_dict by keyword" if isinstance(logit_bias, bool) else ""
        raise TypeError(f"logit_bias must be a tensor, a number or None, got {logit_bias!r}{hint}")
    if logit_bias.numel() != 1:
        raise ValueError(f"logit_bias must have one element, got shape {tuple(logit_bias.shape)}")
    return (logit_bias.reshape(()) * 0).to(device=loss.device, dtype=loss.dtype)
