"""A rank's image rows against the text columns of all ranks: gathered, or travelling in a ring.

Both ways give the log-sum-exps and gradients of the global batch to rounding. With n rows on each
of W ranks, N = W n:

    gather  all-gather of the text features (N, D); all-reduces of N columns' maxima and sums;
            backward, reduce-scatter of the partial text gradients (N, D)
    ring    W - 1 times a block of n text rows goes to the next rank while the one before it is
            multiplied; what the ranks add to it, column log-sum-exps or gradients, follows one
            step behind, and the W-th step brings that home. O(n D) memory on every rank.

Partial gradients are summed in the accumulation dtype: over many ranks, 16-bit sums would not hold.
Notation as in `contrastive.py`; text blocks of other ranks have no pairs here.
"""

import torch
from torch import Tensor

from cyclip_loss import ops
from cyclip_loss.distributed import (
    Hop,
    Ranks,
    log_sum_exp,
    padded,
    sum_and_scatter,
)

Needs = tuple[bool, bool, bool]  # gradients of image_features, text_features, logit_scale


def gathered_lse(
    image: Tensor, columns: Tensor, scale: Tensor, symmetric: bool, impl: str, ranks: Ranks
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Negatives of this rank's rows (n,) and columns (n,) over all ranks, pair_logits (n,).

    And column_lse (N,), pairs included, for `gathered_grads`. Not symmetric: no columns, so empty.
    """
    n = image.shape[0]
    first_row = ranks.first_row(ranks.group.rank, n)
    row_negatives, partial, pair_logits = _lse(image, columns, scale, first_row, symmetric, impl)
    if not symmetric:
        return row_negatives, partial, pair_logits, partial
    column_negatives, all_pair_logits = log_sum_exp(partial, pair_logits, ranks)
    own = column_negatives[first_row : first_row + n]
    return row_negatives, own, pair_logits, torch.logaddexp(column_negatives, all_pair_logits)


def gathered_grads(
    image: Tensor,
    columns: Tensor,
    scale: Tensor,
    row_lse: Tensor,
    column_lse: Tensor,
    pair_gradient: Tensor,
    weight: Tensor,
    symmetric: bool,
    needs: Needs,
    impl: str,
    ranks: Ranks,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of this rank's image and text features, (n, D), and its part of the scale's."""
    first_row = ranks.first_row(ranks.group.rank, image.shape[0])
    image_grad, text_grad, scale_grad = _grads(
        image,
        columns,
        scale,
        row_lse,
        column_lse,
        pair_gradient,
        weight,
        first_row,
        symmetric,
        needs,
        impl,
    )
    if needs[1]:
        text_grad = sum_and_scatter(text_grad, ranks)
    return image_grad, text_grad, scale_grad


def ring_lse(
    image: Tensor, text: Tensor, scale: Tensor, symmetric: bool, impl: str, ranks: Ranks
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `gathered_lse`, with the column_lse of this rank's text only, for `ring_grads`."""
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
            block = came[0]
    row_negatives = rows.to(scale.dtype)
    if not symmetric:
        empty = scale.new_empty(0)
        return row_negatives, empty, pair_logits, empty
    [sums] = Hop([sums], group).finish()
    own = sums[:n].to(scale.dtype)
    return row_negatives, own, pair_logits, torch.logaddexp(own, pair_logits)


def ring_grads(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    row_lse: Tensor,
    column_lse: Tensor,
    pair_gradient: Tensor,
    weight: Tensor,
    symmetric: bool,
    needs: Needs,
    impl: str,
    ranks: Ranks,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `gathered_grads`, given the text and column_lse of this rank only."""
    group = ranks.group
    n = text.shape[0]
    block = padded(text, ranks)
    # The columns' log-sum-exps travel with the block.
    block_lse = scale.new_zeros(ranks.most(n) if symmetric else 0)
    block_lse[: column_lse.shape[0]] = column_lse
    image_grad = scale.new_zeros(image.shape)
    scale_grad = scale.new_zeros(())
    # The block's gradient follows it.
    text_grad = scale.new_zeros(ranks.most(n) if needs[1] else 0, image.shape[1])
    for step in range(group.size):
        ahead = [block, block_lse][: 1 + symmetric] if step + 1 < group.size else []
        behind = [text_grad] if needs[1] and step > 0 else []
        hop = Hop([*ahead, *behind], group)
        owner = (group.rank - step) % group.size
        count = ranks.count(owner, n)
        first_column = ranks.first_row(group.rank, n) - ranks.first_row(owner, n)
        part, text_part, scale_part = _grads(
            image,
            block[:count],
            scale,
            row_lse,
            block_lse[:count],
            pair_gradient,
            weight,
            first_column,
            symmetric,
            needs,
            impl,
        )
        scale_grad = scale_grad + scale_part
        if needs[0]:
            image_grad += part
        came = hop.finish()
        if behind:
            text_grad = came.pop()
        if needs[1]:
            text_grad[:count].add_(text_part)
        if ahead:
            block, block_lse = came if symmetric else (came[0], block_lse)
    if needs[1]:
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
    needs: Needs,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator in the accumulation dtype, and zeros where a rank holds no row."""
    if image.shape[0] == 0 or columns.shape[0] == 0:
        return scale.new_zeros(image.shape), scale.new_zeros(columns.shape), scale.new_zeros(())
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
        *needs,
        True,
        impl,
    )
