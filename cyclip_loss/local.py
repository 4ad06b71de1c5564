"""The strategy of one process, which has all columns."""

from typing import Any

from torch import Tensor

from cyclip_loss.distributed import Ranks
from cyclip_loss.logits import Logits, LogSumExps, SavedStatistics


def log_sum_exps(compute: Any, logits: Logits, ranks: Ranks) -> LogSumExps:
    """The log-sum-exps of all rows and columns, which one process has."""
    row_lse, column_lse, pair_logits, *other_positives = compute.contrastive_lse(logits)
    return LogSumExps(row_lse, column_lse, pair_logits, None, *other_positives)


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
    """As `eager.contrastive_grads`."""
    grads: tuple[Tensor, Tensor, Tensor] = compute.contrastive_grads(
        logits, saved, grad, weight, needs, wide
    )
    return grads
