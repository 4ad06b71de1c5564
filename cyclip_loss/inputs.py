"""The first step of a call: check the arguments, cast them, and put them into a `Batch`.

A new argument of the call, such as `ids`, begins in `reference.py`. The losses take it, this file
checks it, `Logits` carries it to both engines, and `terms/dense.py` takes it, or `plan.py` keeps
such calls away from it. In the tests, `inputs.py`, `accuracy.py` and `rounding.py` get a value, the
call and its bounds.
"""

from collections.abc import Hashable
from math import inf
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

from cyclip_loss import usage_warnings
from cyclip_loss.batch import Batch, Comparison, Plan, Ranks
from cyclip_loss.numerics import accumulation_dtype, autocast_is_on, is_capturing, is_traced
from cyclip_loss.options import ContrastiveModule, ContrastiveOptions, Options, number
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
    pair = check_features(image_features, text_features, may_be_empty=ranks.size > 1)
    return Batch(*pair, ranks)


def prepare(
    function: str,
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    options: ContrastiveOptions,
    output_dict: bool = False,
    *,
    same_ids: str = "ignored",
    logit_bias: Tensor | float | None = None,
    **others: Tensor | None,
) -> Batch:
    """The batch of a call of a contrastive loss, before `agree`. Raises as `CyCLIPLoss`.

    function: the public name of the loss; others: ids, and augmented and negative features, by
    their argument's name.
    """
    if not isinstance(output_dict, bool):
        hint = "pass lambdas to the constructor, and ids by keyword"
        raise TypeError(f"output_dict must be a bool, got {output_dict!r}: {hint}")
    ranks = ranks_of(options.process_group, options.distributed)
    several = ranks.size > 1
    images, texts = check_features(image_features, text_features, may_be_empty=several)
    if isinstance(options, ContrastiveModule) and options.distributed:
        _check_rank(options, ranks)
    scale = check_scalar("logit_scale", logit_scale, images)
    bias = None if logit_bias is None else check_scalar("logit_bias", logit_bias, images)
    ids = check_ids("ids", others.pop("ids"), images)
    if ids is None and same_ids == "positives":
        raise ValueError("same_ids='positives' needs ids, got None")
    comparisons = [Comparison("text_features", images, texts, ids, ids, True, ranks)]
    others = {name: value for name, value in others.items() if value is not None}
    sources = (
        {}
        if not others
        else {
            "negative_text": images,
            "negative_image": texts,
            "augmented_image": images,
            "augmented_text": texts,
        }
    )
    for name, rows in sources.items():
        features, has_pairs = others.get(f"{name}_features"), name.startswith("augmented")
        column_ids = ids if has_pairs else others.get(f"{name}_ids")
        if features is None:
            if column_ids is not None and not has_pairs:
                raise ValueError(f"{name}_ids needs {name}_features, got None")
            continue
        names = "image_features" if rows is images else "text_features", f"{name}_features"
        columns = check_features(rows, features, names, several, has_pairs)[1]
        if not has_pairs:
            column_ids = check_ids(f"{name}_ids", column_ids, columns)
            if column_ids is not None and ids is None:
                raise ValueError(f"{name}_ids needs ids, got None")
            # A negative that is not finite makes all of this rank's logits NaN. It might have only
            # logits of -inf, or be left out by its id, and the loss would stay finite.
            zero = (columns - columns).detach()
            columns, scale = columns + zero, scale + zero.sum()
        row_ids = None if column_ids is None else ids
        comparison = Comparison(names[1], rows, columns, row_ids, column_ids, has_pairs, ranks)
        comparisons.append(comparison)
    given = {comparison.name for comparison in comparisons}
    views = {"augmented_image_features", "augmented_text_features"}
    if len(views & given) == 1:
        (missing,) = views - given
        raise ValueError(f"augmented features go together: {missing} is None")
    positives = same_ids == "positives"
    return Batch(images, texts, ranks, function, scale, bias, tuple(comparisons), positives)


def _check_rank(options: ContrastiveModule, ranks: Ranks) -> None:
    """Raise unless `rank` and `world_size` are the group's or OpenCLIP's defaults, 0 and 1."""
    rank, world_size = max(options.rank, 0), max(options.world_size, 1)
    if rank not in (0, ranks.rank) or world_size not in (1, ranks.size):
        raise ValueError(
            f"rank={options.rank} and world_size={options.world_size} were given, but this process "
            f"is rank {ranks.rank} of {ranks.size}; is torch.distributed initialised?"
        )


def agree(batch: Batch, plan: Plan, options: ContrastiveOptions) -> Batch:
    """The batch with the numbers of rows on each rank, after a comparison with the other ranks'.

    Extra negatives are left out if there are none on any rank. The signature has what decides which
    collectives run, by the name that error messages use. Raises as `check_ranks_agree`.
    """
    if batch.ranks.size == 1:
        return _compared(batch, {})
    trains, comparisons = torch.is_grad_enabled(), batch.comparisons
    scalars = [x for x in (batch.logit_scale, batch.logit_bias) if x is not None]
    differentiated = [
        trains and any(x.requires_grad for x in (c.row_features, c.column_features, *scalars))
        for c in comparisons
    ]
    trained = [c.name for c in comparisons if trains and c.column_features.requires_grad]
    has_penalties = plan.penalties == "gram"
    signature: dict[str, Hashable] = {
        "the function": batch.function,
        # A term whose backward runs on some ranks only would wait for the others.
        "whether an input of each contrastive term requires a gradient": tuple(differentiated),
        "dist_impl": options.dist_impl,
        "uneven": options.uneven,
        "whether a penalty has a weight": has_penalties,
        # More is sent for penalties that are computed one by one.
        "whether the penalties are computed apart (output_dict, or different lambdas)": (
            has_penalties and plan.with_cross
        ),
        "whether the features of the penalties are centered": plan.centered,
        "which of the augmented and negative features are given": ", ".join(
            c.name for c in comparisons[1:]
        ),
        "for which features ids are given": ", ".join(
            c.name for c in comparisons if c.column_ids is not None
        ),
        "same_ids": "positives" if batch.positives else "ignored",
        # Their gradients are summed across ranks.
        "which of the features require a gradient": ", ".join(trained),
    }
    num_rows = {
        "image_features and text_features": batch.image_features.shape[0],
        "negative_text_features": 0,
        "negative_image_features": 0,
        **{c.name: c.column_features.shape[0] for c in comparisons if not c.has_pairs},
    }
    found = check_ranks_agree(
        batch.ranks,
        batch.image_features,
        num_rows,
        signature,
        options,
        options.uneven,
    )
    return _compared(batch, found)


def _compared(batch: Batch, found: dict[str, Ranks]) -> Batch:
    """The batch with these ranks, and without comparisons that no rank has columns for."""
    pair_ranks = found.get("image_features and text_features", batch.ranks)
    kept = []
    for name, rows, columns, row_ids, column_ids, has_pairs, _ in batch.comparisons:
        ranks = found.get(name, pair_ranks)
        if has_pairs or ranks.total_rows(columns.shape[0]) > 0:
            kept.append(Comparison(name, rows, columns, row_ids, column_ids, has_pairs, ranks))
    # Not `_replace`, which PyTorch 2.8 cannot trace.
    images, texts, _, function, scale, bias, _, positives = batch
    return Batch(images, texts, pair_ranks, function, scale, bias, tuple(kept), positives)


def check_inputs_once(called: Any, batch: Batch) -> None:
    """Warn of unusual features or an unusual scale, in the first call that has rows.

    The check waits for the device, once. It is skipped while a CUDA graph is captured. called: the
    module or function.
    """
    image = batch.image_features
    # `is_traced` comes first: compiled code must not depend on what was checked.
    if is_traced(image) or called in _checked or image.shape[0] == 0:
        return
    if not image.is_meta and not is_capturing(image):
        _checked.add(called)
        features = [image, batch.text_features, *[c.column_features for c in batch.comparisons]]
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
    must = f"{names[0]} and {names[1]} must have the same"
    if paired and first.shape != second.shape:
        raise ValueError(f"{must} shape, got {tuple(first.shape)} and {tuple(second.shape)}")
    if first.shape[1] != second.shape[1]:
        raise ValueError(f"{must} D, got {first.shape[1]} and {second.shape[1]}")
    if first.device != second.device:
        raise ValueError(f"{must} device, got {first.device} and {second.device}")
    if first.dtype != second.dtype:
        raise TypeError(f"{must} dtype, got {first.dtype} and {second.dtype}")
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
        given = number(name, value, "a scalar tensor or a number")
        least = 0 if name == "logit_scale" else -inf
        if not is_traced(features) and not least < given < inf:
            raise ValueError(f"{name} must be finite and > {least}, got {value}")
        # Not `new_full`: torch.compile would make the number a constant.
        return features.new_ones((), dtype=dtype) * given
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


def check_ids(name: str, ids: Tensor | None, features: Tensor) -> Tensor | None:
    """ids as int64, or an error: (N,), integers, on the device of the features (N, D)."""
    if ids is None:
        return None
    if not isinstance(ids, Tensor) or ids.dtype not in ID_DTYPES:
        got = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
        raise TypeError(f"{name} must be a tensor of int8 to int64 or uint8, got {got}")
    _check_dense(name, ids, "to_local")
    if ids.shape != features.shape[:1] or ids.device != features.device:
        raise ValueError(
            f"{name} must have shape ({features.shape[0]},) on the features' device "
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
    weights = CAPTION_WEIGHTS[:length] if length <= 128 else _caption_weights(length)
    factors = torch.tensor(weights, dtype=torch.int64, device=tokens.device)
    return (tokens.long() * factors).sum(dim=1)  # wraps around at 64 bits


def _caption_weights(length: int) -> list[int]:
    """Powers of an odd number, as signed 64-bit numbers: the hash is a polynomial modulo 2^64."""
    return [(pow(0x9E3779B97F4A7C15, i, 2**64) + 2**63) % 2**64 - 2**63 for i in range(length)]


# Not computed in `caption_ids`: torch.compile computes constants of 64 bits wrongly.
CAPTION_WEIGHTS = _caption_weights(128)
