"""The strategies "gather" and "local": every rank has the text features of all ranks, (N, D).

forward    all-gather of the text features (started early, in `contrastive.py`); all-reduces of
           the maxima and pair logits of N columns, and of their sums
backward   reduce-scatter of the text gradients (N, D)

With "local", one process has all columns, and nothing is sent.
"""

from typing import Any

from torch import Tensor

from cyclip_loss import distributed
from cyclip_loss.distributed import Ranks
from cyclip_loss.logits import Logits, LogSumExps, SavedStatistics


def log_sum_exps(compute: Any, logits: Logits, ranks: Ranks) -> LogSumExps:
    """The log-sum-exps of this rank's rows and, complete, of all columns.

    logits: this rank's rows with all columns.
    """
    row_lse, column_lse, pair_logits, *other_positives = compute.contrastive_lse(logits)
    if not logits.symmetric or ranks.group is None:
        return LogSumExps(row_lse, column_lse, pair_logits, None, *other_positives)
    own_pair_logits = pair_logits[: logits.num_pairs]
    column_lse, column_pair_logits = distributed.log_sum_exp(
        column_lse, own_pair_logits, logits.first_column, ranks
    )
    return LogSumExps(row_lse, column_lse, pair_logits, column_pair_logits, *other_positives)


def gradients(
    compute: Any,
    logits: Logits,
    saved: SavedStatistics,
    grad: Tensor,
    weight: float,
    needs: list[bool],
    wide: bool,
    ranks: Ranks,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `eager.contrastive_grads`, of this rank's rows and its own columns."""
    row_grad, column_grad, scale_grad = compute.contrastive_grads(
        logits, saved, grad, weight, needs, wide
    )
    if needs[1] and ranks.group is not None:
        column_grad = distributed.sum_and_scatter(column_grad, ranks)
    return row_grad, column_grad, scale_grad
