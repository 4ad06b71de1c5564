"""The records of one call: the ranks that share it, its checked arguments, and its plan."""

from typing import Any, NamedTuple

from torch import Tensor
from torch.distributed import ProcessGroup

from cyclip_loss.logits import Logits


class Ranks(NamedTuple):
    """The ranks that share the batch, in types that an operator of torch.compile can take.

    The methods take n, the rows of this rank. n is not a field: `torch.compile` would make a field
    a constant, and compile for every number of rows.
    """

    group_name: str = ""  # by which collectives find the group; empty in one process
    rank: int = 0  # of this process
    size: int = 1  # W, how many there are
    counts: list[int] | None = None  # rows on each rank; None: all hold equally many

    @property
    def group(self) -> ProcessGroup:
        """The process group; an error in one process."""
        # Not at the top: PyTorch may be built without distributed.
        from torch.distributed import distributed_c10d

        c10d: Any = distributed_c10d
        return c10d._resolve_process_group(self.group_name)  # type: ignore[no-any-return]

    def first_row(self, rank: int, n: int) -> int:
        """Where a rank's rows begin in the global batch."""
        return rank * n if self.counts is None else sum(self.counts[:rank])

    def total_rows(self, n: int) -> int:
        """N, the rows of the global batch."""
        return self.size * n if self.counts is None else sum(self.counts)

    def max_rows(self, n: int) -> int:
        """The most rows of any rank, to which the blocks that ranks send are padded."""
        return n if self.counts is None else max(self.counts)


class Comparison(NamedTuple):
    """Features whose rows a contrastive loss compares with the columns of all ranks.

    There is one of images with texts. With augmented views, there is one of each tower's features
    with those of its views. With extra negatives, there is one of the images with the negative
    texts, and one of the texts with the negative images.
    """

    name: str  # of the argument with the columns
    logits: Logits  # of this rank's rows and columns; without pairs for extra negatives
    ranks: Ranks  # with the number of columns on each


class Batch(NamedTuple):
    """The checked arguments of one call on this rank, which has n of the N pairs."""

    image_features: Tensor  # (n, D)
    text_features: Tensor  # (n, D)
    # With the number of pairs on each. The penalties alone need no comparison of ranks: their
    # all-reduce counts the rows.
    ranks: Ranks
    comparisons: tuple[Comparison, ...] = ()  # the first is of images with texts; empty: penalties
    logit_bias: Tensor | None = None  # scalar of the accumulation dtype

    # Not a property, which PyTorch 2.8 cannot trace.
    def total_pairs(self) -> int:
        """N. For the penalties alone, ranks are taken to hold equally many pairs."""
        return self.ranks.total_rows(self.image_features.shape[0])


class Plan(NamedTuple):
    """How a call is computed, in types that an operator of torch.compile can take.

    Backward follows the plan of its forward.
    """

    # "dense": N x N matrices, by plain PyTorch; "streamed": logits in blocks; "none": no term.
    contrastive: str
    # "dense"; "gram": D x D Gram matrices; "zeros": both lambdas are 0, but the terms are returned;
    # "none": both lambdas are 0.
    penalties: str
    impl: str  # the engine that was asked for, or "eager" if that one computes anyway
    # Whether rows and columns share one exponential of each logit: only in the eager engine on a
    # CPU, and not in a ring.
    shares_exponentials: bool
    # Of at most so many logits of a call, forward keeps these exponentials for backward.
    max_kept_exponentials: int
    strategy: str  # how columns reach the rows of other ranks, a name in `ranks.exchange`
    output_dict: bool  # whether the terms are returned one by one
    with_cross: bool  # whether the penalties need the Gram matrix C
    centered: bool  # whether penalties use centred features; False if none are computed
