"""The first step of a call: check the arguments, cast them, and put them into a `Batch`.

A new argument of the call, such as `ids`, begins in `reference.py`. The losses take it, this file
checks it, `Logits` carries it to both engines, and `terms/dense.py` takes it, or `plan.py` keeps
such calls away from it. In the tests, `inputs.py`, `accuracy.py` and `rounding.py` get a value, the
call and its bounds.
"""

from collections.abc import Hashable
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

from cyclip_loss import usage_warnings
from cyclip_loss.batch import Batch, Comparison, Ranks
from cyclip_loss.logits import NO_PAIRS, Logits
from cyclip_loss.numerics import accumulation_dtype, autocast_is_on, is_capturing, is_traced
from cyclip_loss.options import (
    ContrastiveModule,
    ContrastiveOptions,
    Options,
    PenaltyOptions,
    boolean,
    number,
)
from cyclip_loss.ranks.agreement import check_ranks_agree
from cyclip_loss.ranks.groups import ranks_of

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
ID_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
# Of further features, those that are compared with the images; the others are with the texts.
COMPARED_WITH_IMAGES = ("negative_text", "augmented_image")
# Modules and functions whose inputs were checked. Copies of a module are checked again.
_checked: WeakSet[Any] = WeakSet()


def prepare_pairs(
    options: Options,
    image_features: Tensor,
    text_features: Tensor,
    output_dict: bool,
) -> Batch:
    """The batch of a call of the penalties alone. Raises as `CyCLIPLoss`."""
    boolean("output_dict", output_dict)
    ranks = ranks_of(options.process_group, options.distributed)
    pair = check_features(image_features, text_features, may_be_empty=ranks.size > 1)
    return Batch(*pair, ranks)


def prepare(
    options: ContrastiveOptions,
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    output_dict: bool = False,
    *,
    function: str = "",
    symmetric: bool,
    logit_bias: Tensor | float | None = None,
    **further: Any,
) -> Batch:
    """The batch of a call of a contrastive loss. Raises as `CyCLIPLoss`.

    Across ranks, the first call of a configuration is compared with the other ranks'.

    options: the module; function: the public name of the loss, by default the module's class;
    symmetric: whether the texts have log-sum-exps, too; further: ids, and augmented and negative
    features, by their argument's name.
    """
    images, texts, ranks, *_ = prepare_pairs(options, image_features, text_features, output_dict)
    positives = False
    if isinstance(options, ContrastiveModule):
        _check_rank(options, ranks)
        positives = options.same_ids == "positives"
    scale = check_scalar("logit_scale", logit_scale, images)
    bias = None if logit_bias is None else check_scalar("logit_bias", logit_bias, images)
    ids = check_ids("ids", further.pop("ids"), images)
    if ids is None and positives:
        raise ValueError("same_ids='positives' needs ids, got None")
    logits = Logits(images, texts, scale, ids, ids, 0, symmetric, positives)
    found = [Comparison("text_features", logits, ranks)]
    for name, features in further.items():
        kind, _, what = name.rpartition("_")
        if features is None or what == "ids":
            continue
        has_pairs = kind.startswith("augmented")
        rows, rows_name = texts, "text_features"
        if kind in COMPARED_WITH_IMAGES:
            rows, rows_name = images, "image_features"
        columns = check_features(rows, features, (rows_name, name), ranks.size > 1, has_pairs)[1]
        row_ids, column_ids, offset = ids, ids, 0
        if not has_pairs:
            column_ids = check_ids(f"{kind}_ids", further[f"{kind}_ids"], columns)
            if column_ids is None:
                row_ids = None
            elif ids is None:
                raise ValueError(f"{kind}_ids needs ids, got None")
            # NaN for features that are not finite, whose own logits may be -inf or masked. It has
            # to reach the scale.
            zero_or_nan = (columns - columns).detach()
            columns, scale = columns + zero_or_nan, scale + zero_or_nan.sum()
            offset = NO_PAIRS
        logits = Logits(
            rows, columns, scale, row_ids, column_ids, offset, False, positives and has_pairs
        )
        found.append(Comparison(name, logits, ranks))
    if sum(x.logits.has_pairs() for x in found) == 2:
        raise ValueError("augmented_image_features and augmented_text_features go together")
    counted: dict[str, Ranks] = {}
    if ranks.size > 1:
        function = function or type(options).__name__
        counted = _agreed_ranks(function, options, found, [scale, bias], output_dict, ranks)
        ranks = counted["image_features and text_features"]
    comparisons: list[Comparison] = []
    rest: list[Any]
    for name, logits, _ in found:
        rows, columns, _, *rest = logits
        columns_of_ranks = counted.get(name, ranks)
        # Extra negatives that no rank has are left out.
        if logits.has_pairs() or columns_of_ranks.total_rows(columns.shape[0]) > 0:
            logits = Logits(rows, columns, scale, *rest)  # whose scale is NaN in all or none
            comparisons.append(Comparison(name, logits, columns_of_ranks))
    return Batch(images, texts, ranks, tuple(comparisons), bias)


def _check_rank(options: ContrastiveModule, ranks: Ranks) -> None:
    """Raise unless `rank` and `world_size` are the group's or OpenCLIP's defaults, 0 and 1."""
    world_size = max(options.world_size, 1)
    fits = options.rank in (0, ranks.rank) and world_size in (1, ranks.size)
    if options.distributed and not fits:
        raise ValueError(
            f"rank={options.rank} and world_size={options.world_size} were given, but this process "
            f"is rank {ranks.rank} of {ranks.size}; is torch.distributed initialised?"
        )


def _agreed_ranks(
    function: str,
    options: ContrastiveOptions,
    found: list[Comparison],
    scalars: list[Tensor | None],
    output_dict: bool,
    ranks: Ranks,
) -> dict[str, Ranks]:
    """The ranks with their numbers of rows, by arguments, after a comparison with the other ranks.

    The signature has what decides which collectives run, besides options, by the name that error
    messages use. Raises as `check_ranks_agree`.
    """
    images = found[0].logits.row_features
    num_rows = {
        "image_features and text_features": images.shape[0],
        "negative_text_features": 0,
        "negative_image_features": 0,
    }
    trains = torch.is_grad_enabled()
    differentiated, with_ids, trained = [], [], []
    for name, logits, _ in found:
        inputs = logits.column_features, logits.row_features, *scalars
        requires = [trains and x is not None and x.requires_grad for x in inputs]
        differentiated.append(any(requires))
        if requires[0]:
            trained.append(name)
        if logits.column_ids is not None:
            with_ids.append(name)
        if name in num_rows:
            num_rows[name] = logits.column_features.shape[0]
    has_penalties = is_apart = False
    if isinstance(options, PenaltyOptions):
        has_penalties = options.has_penalties()
        is_apart = has_penalties and options.needs_cross(output_dict)
    signature: dict[str, Hashable] = {
        "the function": function,
        # A term whose backward runs on some ranks only would wait for the others.
        "whether an input of each contrastive term requires a gradient": tuple(differentiated),
        "whether a penalty has a weight": has_penalties,
        # More is sent for penalties that are computed one by one.
        "whether the penalties are computed apart (output_dict, or different lambdas)": is_apart,
        "which of the augmented and negative features are given": ", ".join(x.name for x in found),
        "for which features ids are given": ", ".join(with_ids),
        # Their gradients are summed across ranks.
        "which of the features require a gradient": ", ".join(trained),
    }
    return check_ranks_agree(ranks, images, num_rows, signature, options)


def warn_of_mistakes(called: Any, batch: Batch) -> None:
    """Warn of penalties that are too strong and, in the first call that has rows, of its inputs.

    The check of the inputs waits for the device, once. It is skipped while a CUDA graph is
    captured. called: the module or function.
    """
    image = batch.image_features
    # `is_traced` comes first: compiled code must not depend on what was checked.
    if is_traced(image):
        return
    if isinstance(called, PenaltyOptions):
        usage_warnings.warn_of_penalties(called, batch.total_pairs())
    if called in _checked or image.shape[0] == 0 or image.is_meta or is_capturing(image):
        return
    _checked.add(called)
    logits = [x.logits for x in batch.comparisons]
    features = [image, batch.text_features, *[x.column_features for x in logits]]
    usage_warnings.warn_of_unusual_inputs(features, logits[0].logit_scale if logits else None)


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
        _check_local(name, features, "to_local")
        if features.dtype not in DTYPES:
            raise TypeError(
                f"{name} must be float64, float32, bfloat16 or float16, got {features.dtype}"
            )
        shape = features.shape
        if len(shape) != 2 or shape[0] < min_rows or shape[1] == 0:
            raise ValueError(
                f"{name} must have shape (N, D) with N >= {min_rows} and D >= 1, got {tuple(shape)}"
            )
    if second is first:  # torch.compile refuses the same tensor twice
        second = first.view_as(first)
    # A collective's result that nobody has waited for is of a type of its own, but is not traced.
    first, second = (
        x.clone() if type(x).__name__ == "AsyncCollectiveTensor" else x for x in (first, second)
    )
    if autocast and autocast_is_on(first.device.type):
        dtype = torch.get_autocast_dtype(first.device.type)
        first, second = (x if x.dtype == torch.float64 else x.to(dtype) for x in (first, second))
    must = f"{names[0]} and {names[1]} must have the same"
    # Unless paired, only D is compared: compiled code must not depend on whether M is N.
    if paired:
        if first.shape != second.shape:
            raise ValueError(f"{must} shape, got {tuple(first.shape)} and {tuple(second.shape)}")
    elif first.shape[1] != second.shape[1]:
        raise ValueError(f"{must} D, got {first.shape[1]} and {second.shape[1]}")
    if first.device != second.device:
        raise ValueError(f"{must} device, got {first.device} and {second.device}")
    if first.dtype != second.dtype:
        raise TypeError(f"{must} dtype, got {first.dtype} and {second.dtype}")
    return first, second


def _check_local(name: str, tensor: Tensor, method: str) -> None:
    if type(tensor).__name__ == "DTensor":
        raise TypeError(f"{name} must be an ordinary tensor, got a DTensor: pass {name}.{method}()")


def check_scalar(name: str, value: Tensor | float, features: Tensor) -> Tensor:
    """The scale or the bias as a 0-dim tensor of the accumulation dtype on the features' device."""
    dtype = accumulation_dtype(features.dtype)
    if not isinstance(value, Tensor):
        # Not `new_full`: torch.compile would make the number a constant.
        return features.new_ones((), dtype=dtype) * number(
            name, value, "a scalar tensor or a number"
        )
    _check_local(name, value, "full_tensor")
    if value.numel() != 1:
        raise ValueError(f"{name} must have one element, got shape {tuple(value.shape)}")
    value = value if value.ndim == 0 else value.reshape(())  # a view takes time in backward
    return value.to(device=features.device, dtype=dtype)


def check_ids(name: str, ids: Tensor | None, features: Tensor) -> Tensor | None:
    """ids as int64, or an error: (N,), integers, on the device of the features (N, D)."""
    if ids is None:
        return None
    if not isinstance(ids, Tensor) or ids.dtype not in ID_DTYPES:
        got = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
        raise TypeError(f"{name} must be a tensor of int8 to int64 or uint8, got {got}")
    if ids.shape != features.shape[:1] or ids.device != features.device:
        raise ValueError(
            f"{name} must have shape ({features.shape[0]},) on the features' device "
            f"{features.device}, got {tuple(ids.shape)} on {ids.device}"
        )
    return ids.to(torch.int64).contiguous()


def caption_ids(tokens: Tensor, pad_id: int = 0) -> Tensor:
    """`ids` of captions: a hash, (N,) int64, of each row of token numbers (N, context length).

    It is the same on every rank, and padding at the end of a row, by tokens that are `pad_id`, does
    not change it. With another `pad_id`, a caption has another hash. Among 65,536
    different captions, two have the same hash with a probability of 2^-33.
    """
    # Powers of an odd number modulo 2^64, at which products and sums wrap around.
    weights = torch.full((tokens.shape[1],), 0x5BD1E995, device=tokens.device).cumprod(0)
    return ((tokens - pad_id) * weights).sum(dim=1)
