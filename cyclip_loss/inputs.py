"""The first step of a call: check the arguments, cast them, and put them into a `Batch`.

A new argument of the call, such as `ids`, begins in `reference.py`. `loss.py` takes it, this file
checks it, `Logits` carries it to both engines, and `terms/dense.py` takes it, or `plan.py` keeps
such calls away from it. In the tests, `inputs.py`, `accuracy.py` and `rounding.py` get a value, the
call and its bounds.
"""

from collections.abc import Hashable, Sequence
from numbers import Real
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

from cyclip_loss import usage_warnings
from cyclip_loss.numerics import accumulation_dtype, autocast_is_on, is_capturing
from cyclip_loss.options import LARGEST, ContrastiveOptions, Options, PenaltyOptions
from cyclip_loss.plan import Batch, Plan
from cyclip_loss.ranks.agreement import check_ranks_agree
from cyclip_loss.ranks.groups import ranks_of

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
ID_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
# Modules and functions whose inputs were checked. Copies of a module are checked again.
_checked: WeakSet[Any] = WeakSet()


def prepare_pairs(
    image_features: Tensor, text_features: Tensor, options: Options, output_dict: bool
) -> Batch:
    """The batch of a call of the penalties alone. Raises as `CyCLIPLoss`."""
    if not isinstance(output_dict, bool):
        raise TypeError(f"output_dict must be a bool, got {output_dict!r}: pass no logit scale")
    ranks = ranks_of(options.process_group, options.distributed)
    image_features, text_features = check_features(
        image_features, text_features, may_be_empty=ranks.size > 1
    )
    total_pairs = ranks.total_rows(image_features.shape[0])
    return Batch(image_features, text_features, ranks, total_pairs)


def prepare(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    options: ContrastiveOptions,
    output_dict: bool = False,
    *,
    ids: Tensor | None = None,
    same_ids: str = "ignored",
    one_way: bool = False,
    logit_bias: Tensor | float | None = None,
    function: str = "CyCLIPLoss",
    **others: Tensor | None,
) -> Batch:
    """The batch of a call of a contrastive loss. Raises as `CyCLIPLoss`.

    Across ranks, compares the call with the other ranks' (`check_ranks_agree`). others: augmented
    and negative features, by their argument's name.
    """
    if not isinstance(output_dict, bool):
        raise TypeError(f"output_dict must be a bool, got {output_dict!r}: lambdas go by keyword")
    ranks = ranks_of(options.process_group, options.distributed)
    several = ranks.size > 1
    images, texts = check_features(image_features, text_features, may_be_empty=several)
    scale = check_scalar("logit_scale", logit_scale, images)
    bias = None if logit_bias is None else check_scalar("logit_bias", logit_bias, images)
    ids = check_ids(ids, images, same_ids)
    given: dict[str, Tensor] = {}
    for name, features in others.items():
        if features is not None:
            tower, own = ("image", images) if "image" in name else ("text", texts)
            names, is_view = (f"{tower}_features", name), name.startswith("augmented")
            given[name] = check_features(own, features, names, several, is_view)[1]
    row_features, column_features = [images], [texts]
    views = [name for name in given if name.startswith("augmented")]
    if len(views) == 1:
        missing = "text" if "image" in views[0] else "image"
        raise ValueError(f"augmented features go together: augmented_{missing}_features is None")
    if views:
        row_features += [images, texts]
        column_features += [given["augmented_image_features"], given["augmented_text_features"]]
    has_negatives = len(given) > len(views)
    if "negative_image_features" in given:
        # They stay on this rank.
        row_features[0] = torch.cat((images, given.pop("negative_image_features")))
    if "negative_text_features" in given:
        column_features[0] = torch.cat((texts, given["negative_text_features"]))

    column_ranks = ranks
    if several:
        sent = {"text_features": texts, **given}
        num_rows = {
            "image_features and text_features": images.shape[0],
            "negative_text_features": column_features[0].shape[0] - images.shape[0],
        }
        scalars = (scale,) if bias is None else (scale, bias)
        terms = [(x, y, *scalars) for x, y in zip(row_features, column_features)]  # noqa: B905
        signature: dict[str, Hashable] = {
            "the function": function,
            "one_way": one_way,
            **_collective_signature(sent, terms, options, output_dict),
            "whether ids are given": ids is not None,
            "same_ids": same_ids,
        }
        ranks, column_ranks = check_ranks_agree(
            ranks, images, num_rows, signature, options, options.uneven
        )
    return Batch(
        images,
        texts,
        ranks,
        ranks.total_rows(images.shape[0]),
        (column_ranks, ranks, ranks),
        scale,
        ids,
        tuple(row_features),
        tuple(column_features),
        has_negatives,
        logit_bias=bias,
        positives=ids is not None and same_ids == "positives",
        one_way=one_way,
    )


def _collective_signature(
    sent: dict[str, Tensor],
    terms: Sequence[tuple[Tensor, ...]],
    options: ContrastiveOptions,
    output_dict: bool,
) -> dict[str, Hashable]:
    """What decides which collectives run, by the name that error messages use.

    sent: the features that reach other ranks, by their argument's name; terms: the inputs of each
    contrastive term that may require a gradient.
    """
    grad_mode = torch.is_grad_enabled()
    differentiated = [grad_mode and any(x.requires_grad for x in inputs) for inputs in terms]
    trained = [name for name, x in sent.items() if x.requires_grad and grad_mode]
    has_penalties = isinstance(options, PenaltyOptions) and options.has_penalties()
    return {
        # A term whose backward runs on some ranks only would wait for the others.
        "whether an input of each contrastive term requires a gradient": tuple(differentiated),
        "dist_impl": options.dist_impl,
        "uneven": options.uneven,
        "whether a penalty has a weight": has_penalties,
        # More is sent for penalties that are computed one by one.
        "whether the penalties are computed apart (output_dict, or different lambdas)": (
            has_penalties and options.needs_cross(output_dict)  # type: ignore[attr-defined]
        ),
        "which of the augmented and negative features are given": ", ".join(sent),
        # Their gradients are summed across ranks.
        "which of the features require a gradient": ", ".join(trained),
    }


def check_inputs_once(called: Any, batch: Batch, plan: Plan) -> None:
    """Warn of unusual features or an unusual scale, in the first call that has rows.

    The check waits for the device, once. It is skipped while `torch.compile` traces or a CUDA graph
    is captured. called: the module or function.
    """
    image = batch.image_features
    # `traced` comes first: compiled code must not depend on what was checked.
    if plan.traced or called in _checked or image.shape[0] == 0:
        return
    if not image.is_meta and not is_capturing(image):
        _checked.add(called)
        features = [image, batch.text_features, *batch.row_features, *batch.column_features]
        usage_warnings.warn_of_unusual_inputs(features, batch.logit_scale)


def check_features(
    first: Tensor,
    second: Tensor,
    names: tuple[str, str] = ("image_features", "text_features"),
    may_be_empty: bool = False,
    paired: bool = True,
    autocast: bool = True,
) -> tuple[Tensor, Tensor]:
    """Two feature tensors (N, D), cast as autocast asks, or an error that names the argument.

    may_be_empty: allow N = 0, as on one of several ranks. paired: False allows the second any
    number of rows. autocast: False casts nothing.
    """
    min_rows = 0 if may_be_empty or not paired else 1
    for name, features in zip(names, (first, second)):  # noqa: B905 (PyTorch 2.8 can't trace strict)
        if not isinstance(features, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(features).__name__}")
        _check_dense(name, features, "to_local")
        if features.dtype not in DTYPES:
            raise TypeError(
                f"{name} must be float64, float32, bfloat16 or float16, got {features.dtype}"
            )
        if features.ndim != 2 or features.shape[0] < min_rows or features.shape[1] == 0:
            raise ValueError(
                f"{name} must have shape (N, D) with N >= {min_rows} and D >= 1, "
                f"got {tuple(features.shape)}"
            )
    if second is first:  # torch.compile refuses the same tensor twice
        second = first.view_as(first)
    if autocast and autocast_is_on(first.device.type):
        dtype = torch.get_autocast_dtype(first.device.type)
        first, second = (x if x.dtype == torch.float64 else x.to(dtype) for x in (first, second))
    shapes: Any = tuple(first.shape), tuple(second.shape)
    if not paired:
        shapes = first.shape[1], second.shape[1]
    compared: list[tuple[str, type[Exception], Any, Any]] = [
        ("shape" if paired else "D", ValueError, *shapes),
        ("device", ValueError, first.device, second.device),
        ("dtype", TypeError, first.dtype, second.dtype),
    ]
    for what, error, a, b in compared:
        if a != b:
            raise error(f"{' and '.join(names)} must have the same {what}, got {a} and {b}")
    return first, second


def _check_dense(name: str, tensor: Tensor, method: str) -> None:
    if type(tensor).__name__ == "DTensor":
        raise TypeError(f"{name} must be an ordinary tensor, got a DTensor: pass {name}.{method}()")
    if tensor.is_nested or tensor.layout != torch.strided:
        got = f"layout {tensor.layout}, nested: {tensor.is_nested}"
        raise TypeError(f"{name} must be a dense tensor, got {got}")


def check_scalar(name: str, value: Tensor | float, features: Tensor) -> Tensor:
    """The scale or the bias as a 0-dim tensor of the accumulation dtype on the features' device."""
    dtype = accumulation_dtype(features.dtype)
    if not isinstance(value, Tensor):
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"{name} must be a scalar tensor or a number, got {value!r}")
        if not torch.compiler.is_compiling():
            if name == "logit_scale" and not 0 < value <= LARGEST:
                raise ValueError(f"{name} must be finite and > 0, got {value}")
            if not -LARGEST <= value <= LARGEST:
                raise ValueError(f"{name} must be finite, got {value}")
        # Not `new_full`: torch.compile would make the number a constant.
        return features.new_ones((), dtype=dtype) * float(value)
    _check_dense(name, value, "full_tensor")
    if value.numel() != 1:
        raise ValueError(f"{name} must have one element, got shape {tuple(value.shape)}")
    if not value.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {value.dtype}")
    # As in PyTorch's own arithmetic, a 0-dim CPU tensor goes with features on any device.
    if value.device != features.device and (value.device.type != "cpu" or value.ndim != 0):
        raise ValueError(
            f"{name} must be on the features' device {features.device}, got {value.device}"
        )
    value = value if value.ndim == 0 else value.reshape(())  # a view takes time in backward
    return value.to(device=features.device, dtype=dtype)


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


def caption_ids(tokens: Tensor) -> Tensor:
    """`ids` of captions: a hash, (N,) int64, of each row of token numbers (N, context length).

    It is the same on every rank, and zeros at the end of a row do not change it. Among 65,536
    different captions, two have the same hash with a probability of 2^-33.

    Raises:
        TypeError: `tokens` is not an integer tensor of two dimensions.
    """
    must = "tokens must be an integer tensor (N, context length), got"
    if not isinstance(tokens, Tensor):
        raise TypeError(f"{must} {type(tokens).__name__}")
    _check_dense("tokens", tokens, "to_local")  # first: a nested tensor has no shape
    if tokens.ndim != 2 or tokens.dtype not in ID_DTYPES:
        raise TypeError(f"{must} {tokens.dtype} of shape {tuple(tokens.shape)}")
    length = tokens.shape[1]
    weights = CAPTION_WEIGHTS[:length]
    if length > len(weights):
        weights = [_split_mix(i) for i in range(1, length + 1)]
    factors = torch.tensor(weights, dtype=torch.int64, device=tokens.device)
    return (tokens.long() * factors).sum(dim=1)  # wraps around at 64 bits


def _split_mix(i: int) -> int:
    """The i-th number of SplitMix64 (Steele et al. 2014), as a signed 64-bit number."""

    def wrapped(x: int) -> int:
        return (x + 2**63) % 2**64 - 2**63

    mixed = wrapped(i * -0x61C8864680B583EB)
    mixed = wrapped((mixed ^ (mixed >> 30)) * -0x40A7B892E31B1A47)
    return mixed ^ (mixed >> 27)


# Not computed in `caption_ids`: torch.compile computes constants of 64 bits wrongly.
CAPTION_WEIGHTS = [_split_mix(i) for i in range(1, 129)]
