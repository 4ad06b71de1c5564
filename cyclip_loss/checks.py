"""What the tensors of a call must be: errors for bad ones, warnings for likely mistakes."""

import sys
import warnings
from numbers import Real

import torch
import torch.distributed as dist
from torch import Tensor

from cyclip_loss.numerics import accumulation_dtype
from cyclip_loss.operators import autocast_is_on
from cyclip_loss.options import CyCLIPWarning, PenaltyOptions

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
ID_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)

PAPER_LAMBDA, PAPER_BATCH_SIZE = 0.25, 128  # Goel et al. 2022
# Penalties more than this many times as strong as the paper's cause a warning. In the icons
# experiment of reference_train, penalties four times as strong name fewer icons.
STRONG = 2
# Rows normalised in bfloat16 differ from length 1 by less than 1 %.
LENGTH_TOLERANCE = 0.05
# CLIP's scale starts at 1 / 0.07 = 14.3 and ends at 100. The logarithm of 100 is 4.6.
LEAST_SCALE = 5.0

_warned: set[str] = set()


def check_features(
    first: Tensor,
    second: Tensor,
    names: tuple[str, str] = ("image_features", "text_features"),
    may_be_empty: bool = False,
    autocast: bool = True,
    paired: bool = True,
) -> tuple[Tensor, Tensor]:
    """Two feature tensors (N, D), cast as autocast asks, or an error that names the argument.

    may_be_empty: allow N = 0, as on one of several ranks; autocast: False: cast nothing; paired:
    False: the second may have any number of rows.
    """
    for name, features in zip(names, (first, second)):  # noqa: B905 (PyTorch 2.8 can't trace strict)
        least = 0 if may_be_empty or not paired else 1
        if not isinstance(features, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(features).__name__}")
        _check_dense(name, features, "to_local")
        if features.dtype not in DTYPES:
            raise TypeError(
                f"{name} must be float64, float32, bfloat16 or float16, got {features.dtype}"
            )
        if features.ndim != 2 or features.shape[0] < least or features.shape[1] == 0:
            raise ValueError(
                f"{name} must have shape (N, D) with N >= {least} and D >= 1, "
                f"got {tuple(features.shape)}"
            )
    if second is first:  # torch.compile refuses the same tensor twice
        second = first.view_as(first)
    if autocast:
        first, second = _autocast(first), _autocast(second)
    size = "shape" if paired else "D"
    shapes = [tuple(x.shape) if paired else x.shape[1] for x in (first, second)]
    for what, error, a, b in (
        (size, ValueError, shapes[0], shapes[1]),
        ("device", ValueError, first.device, second.device),
        ("dtype", TypeError, first.dtype, second.dtype),
    ):
        if a != b:
            raise error(f"{' and '.join(names)} must have the same {what}, got {a} and {b}")
    return first, second


def _check_dense(name: str, tensor: Tensor, method: str) -> None:
    if type(tensor).__name__ == "DTensor":
        raise TypeError(f"{name} must be an ordinary tensor, got a DTensor: pass {name}.{method}()")
    if tensor.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got layout {tensor.layout}")


def _autocast(features: Tensor) -> Tensor:
    device_type = features.device.type
    if features.dtype != torch.float64 and autocast_is_on(device_type):
        return features.to(torch.get_autocast_dtype(device_type))
    return features


def check_logit_scale(logit_scale: Tensor | float, features: Tensor) -> Tensor:
    """logit_scale as a 0-dim tensor of the accumulation dtype on the features' device."""
    dtype = accumulation_dtype(features.dtype)
    if not isinstance(logit_scale, Tensor):
        if isinstance(logit_scale, bool) or not isinstance(logit_scale, Real):
            raise TypeError(
                f"logit_scale must be a scalar tensor or a number, got {type(logit_scale).__name__}"
            )
        # Not `new_full`: torch.compile would make the number a constant.
        return features.new_ones((), dtype=dtype) * float(logit_scale)
    _check_dense("logit_scale", logit_scale, "full_tensor")
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


def check_ids(ids: Tensor | None, features: Tensor, same_ids: str) -> Tensor | None:
    """ids as int64, or an error: (N,), integers, on the features' device."""
    if ids is None:
        if same_ids == "positives":
            raise ValueError("same_ids='positives' needs ids, got None")
        return None
    if not isinstance(ids, Tensor) or ids.dtype not in ID_DTYPES:
        got = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
        raise TypeError(f"ids must be a tensor of int8 to int64 or uint8, got {got}")
    _check_dense("ids", ids, "to_local")
    if ids.shape != features.shape[:1] or ids.device != features.device:
        raise ValueError(
            f"ids must have shape ({features.shape[0]},) on the features' device "
            f"{features.device}, got {tuple(ids.shape)} on {ids.device}"
        )
    return ids.to(torch.int64).contiguous()


def zero_of_bias(logit_bias: Tensor | float, loss: Tensor) -> Tensor:
    """0 with a gradient of 0 to the bias: DDP needs a gradient for every parameter."""
    if isinstance(logit_bias, bool) or not isinstance(logit_bias, (Tensor, Real)):
        hint = ": pass output_dict by keyword" if isinstance(logit_bias, bool) else ""
        raise TypeError(f"logit_bias must be a tensor, a number or None, got {logit_bias!r}{hint}")
    bias = torch.as_tensor(logit_bias)
    if bias.numel() != 1:
        raise ValueError(f"logit_bias must have one element, got shape {tuple(bias.shape)}")
    return (bias.reshape(()) * 0).to(loss)


def warn_once(subject: str, text: str) -> None:
    """Warn with the user's line, once per process and subject; across ranks, on rank 0 only."""
    if subject in _warned or (dist.is_available() and dist.is_initialized() and dist.get_rank()):
        return
    _warned.add(subject)
    level, frame = 1, sys._getframe(0)
    libraries = ("cyclip_loss", "torch")
    while frame.f_back and frame.f_globals.get("__name__", "").split(".")[0] in libraries:
        level, frame = level + 1, frame.f_back
    warnings.warn(text, CyCLIPWarning, stacklevel=level)


def warn_of_strong_penalties(options: PenaltyOptions, n: int) -> None:
    """Warn if lambda * N is more than STRONG times the paper's 0.25 * 128.

    n: N, the rows of the global batch. Does nothing with a reference batch size, nor while
    `torch.compile` traces, as compiled code would depend on N.
    """
    if torch.compiler.is_compiling() or options.reference_batch_size is not None:
        return
    weight = max(options.lambda_inmodal, options.lambda_crossmodal)
    times = weight * n / (PAPER_LAMBDA * PAPER_BATCH_SIZE)
    if times > STRONG:
        warn_once(
            "strong penalties",
            f"lambda = {weight:g} in a batch of {n} is {times:.3g} times as strong as the paper's "
            f"{PAPER_LAMBDA} in a batch of {PAPER_BATCH_SIZE}: the penalties grow with the batch. "
            f"With reference_batch_size={PAPER_BATCH_SIZE} a lambda has the same effect at every "
            "batch size. If you want the paper's formula: warnings.filterwarnings('ignore', "
            "category=cyclip_loss.CyCLIPWarning)",
        )


def warn_of_unusual_inputs(features: list[Tensor], logit_scale: Tensor | float) -> None:
    """Warn of rows that are not of unit length, and of a scale that looks like a logarithm.

    features: (n, D) each, n >= 1 in the first, checked. Waits for the device.
    """
    dtype = accumulation_dtype(features[0].dtype)
    norm = torch.linalg.vector_norm
    lengths = torch.cat([norm(rows.detach(), dim=1, dtype=dtype) for rows in features])
    shortest, longest = torch.stack(lengths.aminmax()).tolist()
    # NaN fails both comparisons, so it causes no warning.
    if shortest < 1 - LENGTH_TOLERANCE or longest > 1 + LENGTH_TOLERANCE:
        warn_once(
            "lengths",
            f"the rows of the features have lengths from {shortest:.3g} to {longest:.3g}; the loss "
            "expects rows of unit length and does not normalise them: "
            "torch.nn.functional.normalize(features, dim=-1)",
        )
    scale = float(logit_scale.detach() if isinstance(logit_scale, Tensor) else logit_scale)
    if scale < LEAST_SCALE:
        warn_once(
            "scale",
            f"logit_scale is {scale:.3g}, where CLIP's is from 14.3 to 100. If it is a logarithm, "
            "as the parameter of CLIP's models is, pass logit_scale.exp()",
        )
