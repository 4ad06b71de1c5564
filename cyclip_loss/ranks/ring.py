"""The strategy "ring": each rank passes a block of n text rows on to the next rank.

After W steps every row has met every column, in O(n D) memory per rank. Each block's column sums
follow it one step later, and every rank adds its rows' part.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cyclip_loss.logits import Gradients, Logits, LogSumExps
from cyclip_loss.ranks.collectives import padded, start_hop
from cyclip_loss.ranks.groups import Ranks
from cyclip_loss.ranks.strategy import BlockGrads, BlockLse


def log_sum_exps(block_lse: BlockLse, logits: Logits, ranks: Ranks) -> LogSumExps:
    """As in `Strategy`: of this rank's rows and its own columns."""
    num_rows, scale = logits.row_features.shape[0], logits.logit_scale
    # Running log-sum-exps are in float64, because every step rounds them.
    row_lse = scale.new_full((num_rows,), -torch.inf, dtype=torch.float64)
    pair_logits = scale.new_zeros(num_rows)

    def column_part(block: Logits, _: Tensor | None) -> Tensor:
        part = block_lse(block)
        row_lse.copy_(torch.logaddexp(row_lse, part.row_negatives_lse))
        pair_logits.add_(part.pair_logits)  # 0 except in this rank's own block
        return part.column_negatives_lse

    def combine(total: Tensor, part: Tensor) -> None:
        total.copy_(torch.logaddexp(total, part))

    initial = None
    if logits.symmetric:
        max_columns = ranks.max_rows(logits.column_features.shape[0])
        initial = row_lse.new_full((max_columns,), -torch.inf)
    column_lse = _ring(logits, None, initial, column_part, combine, ranks)
    return LogSumExps(
        row_lse.to(scale.dtype),
        scale.new_empty(0) if column_lse is None else column_lse.to(scale.dtype),
        pair_logits,
    )


def gradients(
    block_grads: BlockGrads,
    logits: Logits,
    saved: Any,
    needs: list[bool],
    ranks: Ranks,
) -> Gradients:
    """As in `Strategy`."""
    needs_rows, needs_columns, needs_scale = needs
    new = logits.logit_scale
    row_grad = new.new_zeros(logits.row_features.shape if needs_rows else (0,))
    scale_grad = new.new_zeros(() if needs_scale else (0,))

    def column_part(block: Logits, column_lse: Tensor | None) -> Tensor:
        here = saved if column_lse is None else saved._replace(column_lse=column_lse)
        rows, columns, scale = block_grads(block, here)
        if needs_rows:
            row_grad.add_(rows)
        if needs_scale:
            scale_grad.add_(scale)
        return columns

    num_columns, d = logits.column_features.shape
    initial = new.new_zeros(ranks.max_rows(num_columns), d) if needs_columns else None
    column_lse = saved.column_lse if logits.symmetric else None
    column_grad = _ring(logits, column_lse, initial, column_part, Tensor.add_, ranks)
    return Gradients(row_grad, new.new_empty(0) if column_grad is None else column_grad, scale_grad)


def _ring(
    logits: Logits,
    column_lse: Tensor | None,
    total: Tensor | None,
    column_part: Callable[[Logits, Tensor | None], Tensor],
    combine: Callable[[Tensor, Tensor], Any],
    ranks: Ranks,
) -> Tensor | None:
    """Send columns around the ring; return the total over ranks for this rank's columns.

    column_lse: log-sum-exps that travel with the columns, or None. total: the initial value of the
    total, padded, or None if none is wanted. `column_part(block, column_lse)` returns this rank's
    part for the columns that are here, which `combine` adds to their total in place.
    """
    num_columns = logits.column_features.shape[0]
    blocks = [padded(x, ranks) for x in (logits.column_features, column_lse) if x is not None]
    for step in range(ranks.size):
        is_last = step + 1 == ranks.size
        sent = [] if is_last else list(blocks)
        if total is not None and step > 0:
            sent.append(total)
        finish = start_hop(sent, ranks)
        owner = (ranks.rank - step) % ranks.size
        count = ranks.rows_on(owner, num_columns)
        part = None
        if count > 0:
            column_features, *lse = (block[:count] for block in blocks)
            block = _block_of(logits, column_features, owner, ranks)
            part = column_part(block, lse[0] if lse else None)
        received = finish()
        if total is not None and step > 0:
            total = received.pop()
        if total is not None and part is not None:
            combine(total[:count], part)
        if not is_last:
            blocks = received
        # Free these, each as large as a block, before the next step allocates its own.
        del part, received, finish, sent
    return None if total is None else start_hop([total], ranks)()[0][:num_columns]


def _block_of(logits: Logits, column_features: Tensor, owner: int, ranks: Ranks) -> Logits:
    """The logits of this rank's rows with the columns of the rank `owner`."""
    num_columns = logits.column_features.shape[0]
    start, ids = ranks.first_row(owner, num_columns), logits.column_ids
    return logits._replace(
        column_features=column_features,
        column_ids=None if ids is None else ids[start : start + len(column_features)],
        partner_offset=ranks.first_row(ranks.rank, num_columns) - start,
    )
