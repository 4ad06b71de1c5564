"""Which ranks share a batch, and how many rows each of them holds."""

from typing import Any, NamedTuple

import torch.distributed as dist
from torch.distributed import ProcessGroup

from cyclip_loss.options import NOT_STORED


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

    def rows_on(self, rank: int, n: int) -> int:
        """The number of rows of a rank."""
        return n if self.counts is None else self.counts[rank]

    def first_row(self, rank: int, n: int) -> int:
        """Where a rank's rows begin in the global batch."""
        return rank * n if self.counts is None else sum(self.counts[:rank])

    def total_rows(self, n: int) -> int:
        """N, the rows of the global batch."""
        return self.size * n if self.counts is None else sum(self.counts)

    def max_rows(self, n: int) -> int:
        """The most rows of any rank, to which the blocks that ranks send are padded."""
        return n if self.counts is None else max(self.counts)


def ranks_of(process_group: Any, distributed: bool = True) -> Ranks:
    """The ranks of a group; None is the default group, as in DDP. Not `distributed`: one process.

    Raises:
        TypeError: `process_group` is not a process group.
        ValueError: torch.distributed is not initialised, or this process is not in the group.
    """
    if not distributed:
        return Ranks()
    if not dist.is_available() or not dist.is_initialized():
        if process_group not in (None, NOT_STORED):  # a loaded module works in one process
            raise ValueError("process_group was given, but torch.distributed is not initialised")
        return Ranks()
    if process_group is None:
        process_group = dist.group.WORLD
    outside: Any = dist.GroupMember.NON_GROUP_MEMBER
    if process_group is outside:  # `new_group` returns it to processes outside the group
        raise ValueError(f"process_group does not contain this process, rank {dist.get_rank()}")
    if not isinstance(process_group, ProcessGroup):
        raise TypeError(f"process_group must be a ProcessGroup or None, got {process_group!r}")
    size = dist.get_world_size(process_group)
    if size == 1:
        return Ranks()
    return Ranks(process_group.group_name, dist.get_rank(process_group), size)
