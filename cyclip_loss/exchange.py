"""A rank's image rows against the text columns of all ranks: alone, gathered, or in a ring.

All three give the log-sum-exps and gradients of the global batch to rounding. With n rows on each
of W ranks, N = W n:

    alone   there is one process: its columns are all of them
    gather  all-gather of the text features (N, D); all-reduces of N columns' maxima and pair logits
            and of their sums; backward, reduce-scatter of the partial text gradients (N, D)
    ring    W - 1 times a block of n text rows goes to the next rank while the one before it is
            multiplied; what the ranks add to it, column log-sum-exps or gradients, follows one
            step behind, and the W-th step brings that home. O(n D) memory on every rank.

Partial gradients are summed in the accumulation dtype: over many ranks, 16-bit sums would not hold.
Notation as in `contrastive.py`; text blocks of other ranks have no pairs here.

What is sent is sent inside of an operator, so that `torch.compile` neither sees nor moves it: taken
apart into graphs, a ring would keep every block that came for its backward pass, N x D in all, and
a rank without rows would leave out collectives whose result it has no use for.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cyclip_loss import distributed
from cyclip_loss.distributed import Hop, Ranks, padded
from cyclip_loss.ops import engine, like, operator

_Sweep = Callable[..., tuple[Tensor, Tensor, Tensor]]


def _lse_shapes(
    image: Tensor, columns: Tensor, scale: Tensor, symmetric: bool, *_: Any
) -> tuple[Tensor, ...]:
    # shape[0], not len: len would fix a symbolic size, and every N would compile anew.
    n, m = image.shape[0], columns.shape[0] if symmetric else 0
    return scale.new_empty(()), scale.new_empty(n), scale.new_empty(m), scale.new_empty(n)


@operator(_lse_shapes)
def contrastive_lse(
    image_features: Tensor,
    columns: Tensor,
    logit_scale: Tensor,
    symmetric: bool,
    impl: str,
    dist_impl: str,
    group_name: str,
    all_rows: list[int] | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The contrastive loss of the global batch, and what its gradients are made of.

    image_features: (n, D), this rank's; columns: its text features (n, D) or, gathered, those of
    all ranks (N, D); logit_scale: scalar of the accumulation dtype; the others: `Ranks.named`.

    Returns the loss, row_lse (n,), the log-sum-exps of all logits of this rank's rows, column_lse,
    those of `columns`, or empty if not `symmetric`, and pair_gradient (n,), the pairs' part of G
    (`eager.contrastive_grads`).
    """
    ranks = Ranks.by_name(dist_impl, group_name, all_rows)
    compute = engine(impl, image_features)

    def sweep(block: Tensor, first_column: int) -> tuple[Tensor, Tensor, Tensor]:
        return compute.contrastive_lse(  # type: ignore[no-any-return]
            image_features, block, logit_scale, first_column, symmetric
        )

    n = image_features.shape[0]
    first_column = 0
    if dist_impl == "ring":
        rows, own_columns, pair_logits = _ring_lse(sweep, columns, logit_scale, symmetric, ranks)
        column_pairs = pair_logits
    else:
        first_column = ranks.first_row(ranks.rank, n)
        rows, own_columns, pair_logits = sweep(columns, first_column)
        column_pairs = pair_logits
        if symmetric and ranks.group is not None:
            own_columns, column_pairs = distributed.log_sum_exp(own_columns, pair_logits, ranks)
    weight = 1 / (ranks.total(n) * (2 if symmetric else 1))
    loss, row_lse, column_lse, pair_gradient = compute.pair_terms(
        rows, own_columns, pair_logits, column_pairs, first_column, weight
    )
    if ranks.group is not None:
        loss = distributed.wait(distributed.start_all_reduce(loss, "sum", ranks.group))
    return loss, row_lse, column_lse, pair_gradient


def _ring_lse(
    sweep: _Sweep, text: Tensor, scale: Tensor, symmetric: bool, ranks: Ranks
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-sum-exps of the negatives of this rank's rows and columns (n,), and pair_logits (n,)."""
    group = ranks.group
    assert group is not None
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
        count = ranks.count(owner, n)
        of_columns = scale.new_empty(0)
        if count > 0:
            first_column = ranks.first_row(group.rank, n) - ranks.first_row(owner, n)
            of_rows, of_columns, pairs = sweep(block[:count], first_column)
            rows = torch.logaddexp(rows, of_rows.double())
            if owner == group.rank:
                pair_logits = pairs
        came = hop.finish()
        if behind:
            sums = came.pop()
        so_far = sums[: of_columns.shape[0]]
        so_far.copy_(torch.logaddexp(so_far, of_columns.double()))
        if ahead:
            block = came.pop()
    if symmetric:
        [sums] = Hop([sums], group).finish()
    return rows.to(scale.dtype), sums[: n if symmetric else 0].to(scale.dtype), pair_logits


def _grads_shapes(image: Tensor, columns: Tensor, scale: Tensor, *others: Any) -> tuple[Any, ...]:
    pair_gradient, needs, dist_impl = others[2], others[4], others[7]
    text = columns
    if dist_impl == "gather":
        text = columns.new_empty(pair_gradient.shape[0], columns.shape[1])
    return like(image, needs[0]), like(text, needs[1]), scale.new_empty(())


@operator(_grads_shapes, gives_gradients=True)
def contrastive_grads(
    image_features: Tensor,
    columns: Tensor,
    logit_scale: Tensor,
    row_lse: Tensor,
    column_lse: Tensor,
    pair_gradient: Tensor,
    grad: Tensor,
    needs: list[bool],
    symmetric: bool,
    impl: str,
    dist_impl: str,
    group_name: str,
    all_rows: list[int] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of this rank's image and text features, (n, D), and its part of the scale's.

    The first six arguments as `contrastive_lse` took and gave them; grad: scalar, by which the loss
    is multiplied; needs: which of the three are needed, the others are empty. Over W ranks they are
    W times the gradients of the global loss, because DDP will average.
    """
    ranks = Ranks.by_name(dist_impl, group_name, all_rows)
    compute = engine(impl, image_features)
    n = image_features.shape[0]
    alone = ranks.group is None
    weight = ranks.size / (ranks.total(n) * (2 if symmetric else 1))

    def sweep(block: Tensor, lse: Tensor, first_column: int) -> tuple[Tensor, Tensor, Tensor]:
        return compute.contrastive_grads(  # type: ignore[no-any-return]
            *(image_features, block, logit_scale, row_lse, lse, pair_gradient, grad),
            *(weight, first_column, symmetric, needs, not alone),
        )

    if dist_impl == "ring":
        grads = _ring_grads(sweep, image_features, columns, column_lse, symmetric, needs, ranks)
    else:
        grads = sweep(columns, column_lse, ranks.first_row(ranks.rank, n))
    image_grad, text_grad, scale_grad = grads
    if dist_impl == "gather" and needs[1]:
        text_grad = distributed.sum_and_scatter(text_grad, ranks)
    return image_grad.to(image_features.dtype), text_grad.to(columns.dtype), scale_grad


def _ring_grads(
    sweep: _Sweep,
    image: Tensor,
    text: Tensor,
    column_lse: Tensor,
    symmetric: bool,
    needs: list[bool],
    ranks: Ranks,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `contrastive_grads`, in the accumulation dtype."""
    group = ranks.group
    assert group is not None
    n, d = text.shape
    block = padded(text, ranks)
    # The columns' log-sum-exps travel with the block.
    block_lse = column_lse.new_zeros(ranks.most(n) if symmetric else 0)
    block_lse[: column_lse.shape[0]] = column_lse
    image_grad = column_lse.new_zeros(image.shape if needs[0] else (0,))
    scale_grad = column_lse.new_zeros(())
    # The block's gradient follows it.
    text_grad = column_lse.new_zeros(ranks.most(n) if needs[1] else 0, d)
    for step in range(group.size):
        ahead = [block, block_lse][: 1 + symmetric] if step + 1 < group.size else []
        behind = [text_grad] if needs[1] and step > 0 else []
        hop = Hop([*ahead, *behind], group)
        owner = (group.rank - step) % group.size
        count = ranks.count(owner, n)
        text_part = None
        if count > 0:
            first_column = ranks.first_row(group.rank, n) - ranks.first_row(owner, n)
            image_part, text_part, scale_part = sweep(
                block[:count], block_lse[:count], first_column
            )
            scale_grad = scale_grad + scale_part
            if needs[0]:
                image_grad += image_part
            del image_part
        came = hop.finish()
        if behind:
            text_grad = came.pop()
        if needs[1] and text_part is not None:
            text_grad[:count].add_(text_part)
        if ahead:
            block, block_lse = came if symmetric else (came[0], block_lse)
        # Freed before the next step makes its own: each is as large as a block.
        del text_part, came, hop
    if needs[1]:
        [text_grad] = Hop([text_grad], group).finish()
    return image_grad, text_grad[:n] if needs[1] else column_lse.new_empty(0), scale_grad
