"""The strategies "gather" and "local": every rank has the text features of all ranks, (N, D).

forward    all-gather of the text features (started early, in `terms/contrastive.py`); all-reduces
           of the maxima and pair logits of N columns, and of their sums
backward   reduce-scatter of the text gradients (N, D)

With "local", one process has all columns, and nothing is sent.
"""

from typing import Any

from cyclip_loss.logits import Gradients, Logits, LogSumExps
from cyclip_loss.ranks import collectives
from cyclip_loss.ranks.groups import Ranks
from cyclip_loss.ranks.strategy import BlockGrads, BlockLse


def log_sum_exps(block_lse: BlockLse, logits: Logits, ranks: Ranks) -> LogSumExps:
    """As in `Strategy`: of this rank's rows, and of all columns."""
    own = block_lse(logits)
    if not logits.symmetric or ranks.size == 1:
        return own
    paired_rows, paired_columns = logits.pairs
    column_lse, column_pair_logits = collectives.all_reduce_lse(
        own.column_negatives_lse, own.pair_logits[paired_rows], paired_columns, ranks
    )
    return LogSumExps(own.row_negatives_lse, column_lse, own.pair_logits, column_pair_logits)


def gradients(
    block_grads: BlockGrads,
    logits: Logits,
    saved: Any,
    needs: list[bool],
    ranks: Ranks,
) -> Gradients:
    """As in `Strategy`."""
    rows, columns, scale = block_grads(logits, saved)
    if needs[1] and ranks.size > 1:
        columns = collectives.sum_and_scatter(columns, ranks)
    return Gradients(rows, columns, scale)
