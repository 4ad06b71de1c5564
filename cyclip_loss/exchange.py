"""A rank's image rows against the text columns of all ranks: gathered, or travelling in a ring.

Both ways give the log-sum-exps and gradients of the global batch to rounding. With n rows on each
of W ranks, N = W n:

    gather  all-gather of the text features (N, D); all-reduces of N columns' maxima and pair logits
            and of their sums; backward, reduce-scatter of the partial text gradients (N, D)
    ring    W - 1 times a block of n text rows goes to the next rank while the one before it is
            multiplied; what the ranks add to it, column log-sum-exps or gradients, follows one
            step behind, and the W-th step brings that home. O(n D) memory on every rank.

Partial gradients are summed in the accumulation dtype: over many ranks, 16-bit sums would not hold.
Notation as in `contrastive.py`; text blocks of other ranks have no pairs here.

Each way is two operators, forward and backward, with one signature. They are operators so that
`torch.compile` neither sees nor moves what they send: taken apart into graphs, a ring would keep
every block that came for its backward pass, N x D in all, and a rank without rows would leave out
collectives whose result it has no use for.
"""

from typing import Any

import torch
from torch import Tensor

from cyclip_loss import ops
from cyclip_loss.distributed import Hop, Ranks, log_sum_exp, padded, sum_and_scatter


def _gather_lse(
    image: Tensor,  # (n, D)
    columns: Tensor,  # (N, D), the text features of all ranks
    scale: Tensor,
    symmetric: bool,
    impl: str,
    group_name: str,
    all_rows: list[int] | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-sum-exps of the negatives of this rank's rows (n,) and columns (n,); pair_logits (n,).

    And column_lse, pairs included, of all columns that the backward pass is given. Not symmetric:
    columns have none of it, so empty.
    """
    ranks = Ranks.by_name(group_name, all_rows)
    n = image.shape[0]
    first_row = ranks.first_row(ranks.group.rank, n)
    of_rows, partial, pair_logits = _lse(image, columns, scale, first_row, symmetric, impl)
    if not symmetric:
        return of_rows, partial, pair_logits, torch.empty_like(partial)
    of_columns, all_pair_logits = log_sum_exp(partial, pair_logits, ranks)
    own = of_columns[first_row : first_row + n].clone()
    return of_rows, own, pair_logits, torch.logaddexp(of_columns, all_pair_logits)


def _gather_grads(
    image: Tensor,
    columns: Tensor,
    scale: Tensor,
    row_lse: Tensor,
    column_lse: Tensor,
    pair_gradient: Tensor,
    weight: Tensor,
    symmetric: bool,
    needs_image: bool,
    needs_text: bool,
    needs_scale: bool,
    impl: str,
    group_name: str,
    all_rows: list[int] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of this rank's image and text features, (n, D), and its part of the scale's.

    In the accumulation dtype, and empty where not needed.
    """
    ranks = Ranks.by_name(group_name, all_rows)
    image_grad, text_grad, scale_grad = _grads(
        image,
        columns,
        scale,
        row_lse,
        column_lse,
        pair_gradient,
        weight,
        ranks.first_row(ranks.group.rank, image.shape[0]),
        symmetric,
        needs_image,
        needs_text,
        needs_scale,
        impl,
    )
    if needs_text:
        text_grad = sum_and_scatter(text_grad, ranks)
    return image_grad, text_grad, scale_grad


def _ring_lse(
    image: Tensor,  # (n, D)
    text: Tensor,  # (n, D), this rank's
    scale: Tensor,
    symmetric: bool,
    impl: str,
    group_name: str,
    all_rows: list[int] | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `_gather_lse`, from this rank's text and with its column_lse."""
    ranks = Ranks.by_name(group_name, all_rows)
    group = ranks.group
    n = text.shape[0]
    block = padded(text, ranks)
    # Log-sum-exps of what came so far, in float64: they are rounded at every step. Those of the
    # block's columns follow it.
    rows = scale.new_full((n,), -torch.inf, dtype=torch.float64)
    sums = scale.new_full((ranks.most(n),), -torch.inf, dtype=torch.float64)
    pair_logits = scale.new_zeros(n)
    for step in range(group.size):
        ahead = [block] if step + 1 < group.size else []
        behind = [sums] if symmetric and step > 0 else []
        hop = Hop([*ahead, *behind], group)
        owner = (group.rank - step) % group.size
        columns = block[: ranks.count(owner, n)]
        first_column = ranks.first_row(group.rank, n) - ranks.first_row(owner, n)
        of_rows, of_columns, pairs = _lse(image, columns, scale, first_column, symmetric, impl)
        rows = torch.logaddexp(rows, of_rows.double())
        if owner == group.rank:
            pair_logits = pairs
        came = hop.finish()
        if behind:
            sums = came.pop()
        if symmetric:
            so_far = sums[: of_columns.shape[0]]
            so_far.copy_(torch.logaddexp(so_far, of_columns.double()))
        if ahead:
            block = came.pop()
    row_negatives = rows.to(scale.dtype)
    if not symmetric:
        return row_negatives, scale.new_empty(0), pair_logits, scale.new_empty(0)
    [sums] = Hop([sums], group).finish()
    own = sums[:n].to(scale.dtype)
    return row_negatives, own, pair_logits, torch.logaddexp(own, pair_logits)


def _ring_grads(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    row_lse: Tensor,
    column_lse: Tensor,
    pair_gradient: Tensor,
    weight: Tensor,
    symmetric: bool,
    needs_image: bool,
    needs_text: bool,
    needs_scale: bool,
    impl: str,
    group_name: str,
    all_rows: list[int] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `_gather_grads`, from this rank's text and column_lse."""
    ranks = Ranks.by_name(group_name, all_rows)
    group = ranks.group
    n = text.shape[0]
    block = padded(text, ranks)
    # The columns' log-sum-exps travel with the block.
    block_lse = scale.new_zeros(ranks.most(n) if symmetric else 0)
    block_lse[: column_lse.shape[0]] = column_lse
    image_grad = scale.new_zeros(image.shape if needs_image else (0,))
    scale_grad = scale.new_zeros(())
    # The block's gradient follows it.
    text_grad = scale.new_zeros(ranks.most(n) if needs_text else 0, image.shape[1])
    for step in range(group.size):
        ahead = [block, block_lse][: 1 + symmetric] if step + 1 < group.size else []
        behind = [text_grad] if needs_text and step > 0 else []
        hop = Hop([*ahead, *behind], group)
        owner = (group.rank - step) % group.size
        count = ranks.count(owner, n)
        first_column = ranks.first_row(group.rank, n) - ranks.first_row(owner, n)
        image_part, text_part, scale_part = _grads(
            image,
            block[:count],
            scale,
            row_lse,
            block_lse[:count],
            pair_gradient,
            weight,
            first_column,
            symmetric,
            needs_image,
            needs_text,
            needs_scale,
            impl,
        )
        scale_grad = scale_grad + scale_part
        if needs_image:
            image_grad += image_part
        came = hop.finish()
        if behind:
            text_grad = came.pop()
        if needs_text:
            text_grad[:count].add_(text_part)
        if ahead:
            block, block_lse = came if symmetric else (came[0], block_lse)
        # Freed before the next step makes its own: each is as large as a block.
        del image_part, text_part, came, hop
    if not needs_text:
        return image_grad, scale.new_empty(0), scale_grad
    [text_grad] = Hop([text_grad], group).finish()
    return image_grad, text_grad[:n], scale_grad


def _lse(
    image: Tensor, columns: Tensor, scale: Tensor, first_column: int, symmetric: bool, impl: str
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator, and what it would give where a rank holds no row."""
    n, m = image.shape[0], columns.shape[0]
    if n == 0 or m == 0:
        of_columns = scale.new_full((m if symmetric else 0,), -torch.inf)
        return scale.new_full((n,), -torch.inf), of_columns, scale.new_zeros(n)
    return ops.contrastive_lse(image, columns, scale, first_column, symmetric, impl)  # type: ignore[no-any-return]


def _grads(
    image: Tensor,
    columns: Tensor,
    scale: Tensor,
    row_lse: Tensor,
    column_lse: Tensor,
    pair_gradient: Tensor,
    weight: Tensor,
    first_column: int,
    symmetric: bool,
    needs_image: bool,
    needs_text: bool,
    needs_scale: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator in the accumulation dtype, and zeros where a rank holds no row."""
    if image.shape[0] == 0 or columns.shape[0] == 0:
        image_shape = image.shape if needs_image else (0,)
        text_shape = columns.shape if needs_text else (0,)
        return scale.new_zeros(image_shape), scale.new_zeros(text_shape), scale.new_zeros(())
    return ops.contrastive_grads(  # type: ignore[no-any-return]
        image,
        columns,
        scale,
        row_lse,
        column_lse,
        pair_gradient,
        weight,
        first_column,
        symmetric,
        needs_image,
        needs_text,
        needs_scale,
        True,
        impl,
    )


def _lse_shapes(
    image: Tensor, columns: Tensor, scale: Tensor, symmetric: bool, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n, m = image.shape[0], columns.shape[0]
    own, all_columns = (n, m) if symmetric else (0, 0)
    of_rows, of_columns, pairs, lse = map(scale.new_empty, (n, own, n, all_columns))
    return of_rows, of_columns, pairs, lse


def _grads_shapes(
    image: Tensor, columns: Tensor, scale: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor]:
    image_grad, text_grad = (
        scale.new_empty(image.shape if needed else (0,)) for needed in arguments[5:7]
    )
    return image_grad, text_grad, scale.new_empty(())


def _operators(name: str, lse: Any, grads: Any) -> tuple[ops.Operator, ops.Operator]:
    forward = ops.Operator(
        f"{name}_lse",
        "(Tensor image, Tensor columns, Tensor scale, bool symmetric, str impl, str group_name, "
        "SymInt[]? all_rows) -> (Tensor, Tensor, Tensor, Tensor)",
        lse,
    )
    backward = ops.Operator(
        f"{name}_grads",
        "(Tensor image, Tensor columns, Tensor scale, Tensor row_lse, Tensor column_lse, "
        "Tensor pair_gradient, Tensor weight, bool symmetric, bool needs_image, bool needs_text, "
        "bool needs_scale, str impl, str group_name, SymInt[]? all_rows) "
        "-> (Tensor, Tensor, Tensor)",
        grads,
    )
    forward.custom_op.register_fake(_lse_shapes)
    backward.custom_op.register_fake(_grads_shapes)
    backward.custom_op.register_autograd(ops.no_second_derivatives)
    return forward, backward


gather_lse, gather_grads = _operators("gather", _gather_lse, _gather_grads)
ring_lse, ring_grads = _operators("ring", _ring_lse, _ring_grads)
