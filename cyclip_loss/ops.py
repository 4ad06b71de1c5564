"""The custom operators: four names that autograd calls and the dispatcher sends to an engine.

Every device is served by `eager.py` unless a kernel is registered for it. Each operator is opaque
to `torch.compile`, which needs only the shapes given here. None has a derivative of its own: the
formulas of the gradients are in `contrastive.py` and `cyclic.py`.
"""

import torch
from torch import Tensor
from torch.library import custom_op

from cyclip_loss import eager

contrastive_lse = custom_op("cyclip_loss::contrastive_lse", mutates_args=())(eager.contrastive_lse)
contrastive_grads = custom_op("cyclip_loss::contrastive_grads", mutates_args=())(
    eager.contrastive_grads
)
cyclic_statistics = custom_op("cyclip_loss::cyclic_statistics", mutates_args=())(
    eager.cyclic_statistics
)
cyclic_grads = custom_op("cyclip_loss::cyclic_grads", mutates_args=())(eager.cyclic_grads)


def _grads_like(features: Tensor, needed: bool) -> Tensor:
    return features.new_empty(features.shape if needed else (0,))


@contrastive_lse.register_fake
def _(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    first_column: int,
    with_columns: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    n, m = len(image_features), len(text_features)
    dtype = eager.accumulation_dtype(image_features.dtype)
    row_lse = image_features.new_empty(n, dtype=dtype)
    column_lse = image_features.new_empty(m if with_columns else 0, dtype=dtype)
    return row_lse, column_lse, torch.empty_like(row_lse)


@contrastive_grads.register_fake
def _(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    row_lse: Tensor,
    column_lse: Tensor,
    weight: Tensor,
    first_column: int,
    with_columns: bool,
    needs_image: bool,
    needs_text: bool,
    needs_scale: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    image_grad = _grads_like(image_features, needs_image)
    text_grad = _grads_like(text_features, needs_text)
    return image_grad, text_grad, row_lse.new_empty(())


@cyclic_statistics.register_fake
def _(image_features: Tensor, text_features: Tensor, direct: bool, with_cross: bool) -> Tensor:
    n, d = image_features.shape
    shape = (n, n) if direct else (3 if with_cross else 2, d, d)
    return image_features.new_empty(shape, dtype=eager.accumulation_dtype(image_features.dtype))


@cyclic_grads.register_fake
def _(
    image_features: Tensor,
    text_features: Tensor,
    statistics: Tensor,
    coefficients: Tensor,
    direct: bool,
    with_cross: bool,
    needs_image: bool,
    needs_text: bool,
) -> tuple[Tensor, Tensor]:
    return _grads_like(image_features, needs_image), _grads_like(text_features, needs_text)
