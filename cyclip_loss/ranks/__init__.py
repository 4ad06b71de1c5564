"""Who shares a batch: groups of ranks, what they must agree on, and how features reach them.

`strategy.py` is the interface of the two ways to exchange columns, `gather.py` and `ring.py`.
"""

from cyclip_loss.ranks import gather, ring
from cyclip_loss.ranks.strategy import Strategy

# "local": one process, which has all columns.
STRATEGIES: dict[str, Strategy] = {"local": gather, "gather": gather, "ring": ring}
