"""The strategies by which the columns of all ranks meet the rows of this rank.

"gather", also in one process: every rank has the text features of all ranks, (N, D).

    forward    all-gather of the text features (started early, in `terms/streamed.py`);
               all-reduces of the maxima of N columns, and of their sums
    backward   all-reduce of the sign of `upstream_scale` and, for float16, of a maximum; all-gather
               of N elements; reduce-scatter of the text gradients (N, D)

"ring": each rank passes a block of n text rows on to the next rank. After W steps every row has met
every column, in O(n D) memory per rank. Each block's column sums follow it one step later, and
every rank adds its rows' part.

A new strategy is two functions with a `Strategy` here, and its name in `options.DIST_IMPLS`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cyclip_loss.batch import Ranks
from cyclip_loss.logits import BlockLse, Gradients, Logits
from cyclip_loss.ranks.collectives import all_reduce_lse, padded, start_hop, sum_and_scatter

# Computes a block of logits: this rank's rows with some columns.
LseFunction = Callable[[Logits], BlockLse]
# The second argument: `SavedStatistics`, or None if a gradient needs none.
GradsFunction = Callable[[Logits, Any], Gradients]


class Strategy(NamedTuple):
    """Two functions. `logits` has this rank's rows, `ranks` the number of columns on each rank."""

    # Whether `logits` has the columns of all ranks, in their order, or this rank's own.
    gathers_columns: bool
    # (block_lse, logits, ranks): the log-sum-exps of this rank's rows and, complete, of the columns
    # of `logits`.
    log_sum_exps: Callable[..., BlockLse]
    # (block_grads, logits, the second argument of block_grads, which of the three are needed,
    # ranks): gradients of this rank's rows and its own columns, and its part of the scale's.
    gradients: Callable[..., Gradients]


def _gather_log_sum_exps(block_lse: LseFunction, logits: Logits, ranks: Ranks) -> BlockLse:
    own = block_lse(logits)
    if not logits.symmetric:
        return own
    columns = all_reduce_lse(own.of_columns, ranks)
    return own._replace(negatives_lse=torch.cat((own.of_rows, columns)))


def _gather_gradients(
    block_grads: GradsFunction, logits: Logits, saved: Any, needs: list[bool], ranks: Ranks
) -> Gradients:
    grads = block_grads(logits, saved)
    if needs[1] and ranks.size > 1:
        return grads._replace(columns=sum_and_scatter(grads.columns, ranks))
    return grads


def _ring_log_sum_exps(block_lse: LseFunction, logits: Logits, ranks: Ranks) -> BlockLse:
    num_rows, scale = logits.row_features.shape[0], logits.logit_scale
    # Running log-sum-exps are in float64, because every step rounds them.
    row_lse = scale.new_full((num_rows,), -torch.inf, dtype=torch.float64)
    pair_logits = scale.new_zeros(num_rows)

    def column_part(block: Logits) -> Tensor:
        part = block_lse(block)
        torch.logaddexp(row_lse, part.of_rows, out=row_lse)
        pair_logits.add_(part.pair_logits)  # 0 except in this rank's own block
        return part.of_columns

    max_columns = ranks.max_rows(logits.column_features.shape[0]) if logits.symmetric else 0
    column_lse = _ring(
        logits,
        None,
        row_lse.new_full((max_columns,), -torch.inf),
        column_part,
        lambda total, part: torch.logaddexp(total, part, out=total),
        ranks,
    )
    return BlockLse(torch.cat((row_lse, column_lse)).to(scale.dtype), pair_logits)


def _ring_gradients(
    block_grads: GradsFunction, logits: Logits, saved: Any, needs: list[bool], ranks: Ranks
) -> Gradients:
    needs_rows, needs_columns, needs_scale = needs
    new = logits.logit_scale
    row_grad = new.new_zeros(logits.row_features.shape if needs_rows else (0,))
    scale_grad = new.new_zeros(() if needs_scale else (0,))

    def column_part(block: Logits, divisor: Tensor | None = None) -> Tensor:
        block_saved = saved if divisor is None else saved._replace(column_log_divisor=divisor)
        rows, columns, scale = block_grads(block, block_saved)
        row_grad.add_(rows)  # both are empty if not needed, as is the scale's gradient
        scale_grad.add_(scale)
        return columns

    num_columns, d = logits.column_features.shape
    initial = new.new_zeros((ranks.max_rows(num_columns), d) if needs_columns else (0,))
    divisors = saved.column_log_divisor if logits.symmetric else None
    column_grad = _ring(logits, divisors, initial, column_part, Tensor.add_, ranks)
    return Gradients(row_grad, column_grad, scale_grad)


def _ring(
    logits: Logits,
    column_vector: Tensor | None,
    total: Tensor,
    column_part: Callable[..., Tensor],
    combine: Callable[[Tensor, Tensor], Any],
    ranks: Ranks,
) -> Tensor:
    """Send columns around the ring; return the total over ranks for this rank's columns.

    column_vector: an element for each column, sent with it; or None. total: the initial value of
    the total, padded; empty if none is wanted. column_part: given the block of the columns that are
    here, and their elements of `column_vector`, returns this rank's part for them, which `combine`
    adds to their total in place.
    """
    num_columns, is_summed = logits.column_features.shape[0], total.numel() > 0
    first_column = ranks.first_row(ranks.rank, num_columns)
    blocks = [padded(x, ranks) for x in (logits.column_features, column_vector) if x is not None]
    for step in range(ranks.size):
        is_last = step + 1 == ranks.size
        sent = [] if is_last else list(blocks)
        if is_summed and step > 0:
            sent.append(total)
        finish = start_hop(sent, ranks)
        owner = (ranks.rank - step) % ranks.size
        start, end = (ranks.first_row(rank, num_columns) for rank in (owner, owner + 1))
        count, part = end - start, None
        if count > 0:
            column_features, *vector = (block[:count] for block in blocks)
            block = logits._replace(
                column_features=column_features,
                column_ids=None if logits.column_ids is None else logits.column_ids[start:end],
                partner_offset=logits.partner_offset + first_column - start,
            )
            part = column_part(block, *vector)
        received = finish()
        if is_summed and step > 0:
            total = received.pop()
        if part is not None:
            combine(total[:count], part)
        if not is_last:
            blocks = received
        del part  # as large as a block: free it before the next step allocates its own
    return start_hop([total], ranks)()[0][:num_columns] if is_summed else total


STRATEGIES = {
    "gather": Strategy(True, _gather_log_sum_exps, _gather_gradients),
    "ring": Strategy(False, _ring_log_sum_exps, _ring_gradients),
}
