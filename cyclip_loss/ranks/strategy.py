"""The interface of a strategy: how the columns of all ranks meet the rows of this rank.

A new strategy is a file with these two functions, a line in `ranks/__init__.py` and a name in
`options.DIST_IMPLS`. If it gives rows all columns at once, as "gather" does, extend the comparisons
with "gather" in `terms/`.
"""

from collections.abc import Callable
from typing import Any, Protocol

from cyclip_loss.logits import Gradients, Logits, LogSumExps
from cyclip_loss.ranks.groups import Ranks

# What a strategy is given to compute a block of logits: this rank's rows with some columns.
BlockLse = Callable[[Logits], LogSumExps]
# The second argument: `SavedStatistics`, or None if a gradient needs none.
BlockGrads = Callable[[Logits, Any], Gradients]


class Strategy(Protocol):
    """Two functions, which modules define. `logits` has this rank's rows.

    Its columns are those of all ranks with "gather", and this rank's own with "ring". `ranks` has
    the number of columns on each rank.
    """

    def log_sum_exps(self, block_lse: BlockLse, logits: Logits, ranks: Ranks) -> LogSumExps:
        """The log-sum-exps of this rank's rows and, complete, of the columns of `logits`."""

    def gradients(
        self,
        block_grads: BlockGrads,
        logits: Logits,
        saved: Any,
        needs: list[bool],
        ranks: Ranks,
    ) -> Gradients:
        """Gradients of this rank's rows and its own columns, and its part of the scale's.

        saved: the second argument of `block_grads`. needs: which of the three are needed.
        """
